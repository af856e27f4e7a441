"""report: what it says of whole, unfinished and damaged folders, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path

import pytest
import torch

import detdistill
from detdistill.cli import main
from detdistill.comparison.compare import read_comparison
from detdistill.comparison.result import write_comparison
from detdistill.comparison.study import Study, study_text
from detdistill.models import build_model, save_model
from detdistill.models.checkpoints.weights import file_hash
from detdistill.recipe import dump_recipe, parse_recipe
from detdistill.report.report import try_report

CPU = {"device": "cpu", "workers": 0}
AP = {"baseline": {0: 0.10, 1: 0.12, 2: 0.11}, "ima": {0: 0.20, 1: 0.24, 2: 0.22}}
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_run(folder: Path, ap: float | None, seed: int = 0, weights: bool = False, **sections) -> Path:
    """A run's folder; without an AP it is not finished."""
    recipe = parse_recipe({
        "data": {"format": "digits", "train_size": 8, "val_size": 3, "image_size": 64},
        "student": {"backbone": "mobilenetv3_small_050", "channels": 8, "head_depth": 1, "strides": [16, 32]},
        "training": {"seed": seed},
        **sections,
    })  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "environment.json").write_text('{"python": "3.11.7", "packages": {"torch": "2.8.0"}}')
    rows = [{"step": s, "lr": 0.1, "loss": 3 / s, "loss/cls": 2 / s, "loss/box": 1 / s} for s in range(1, 9)]
    rows += [{"step": s, "AP": (ap or 0.1) * s / 8, "AP50": (ap or 0.1) * s / 4} for s in (4, 8)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ap is not None:
        result = {
            "status": "finished",
            "main": "AP",
            "metrics": {"AP": ap, "AP50": 2 * ap, "APL": None, "minutes": 3.0},
            "per_class": {"0": ap, EVIL: ap / 2, "never": None},
        }
        (folder / "result.json").write_text(json.dumps(result))
    if weights:
        torch.manual_seed(seed)
        model = build_model(recipe.student, [str(digit) for digit in range(10)])
        torch.nn.init.constant_(model.head.cls.bias, 0.0)
        save_model(model, folder / "student.safetensors")
    return folder


def make_comparison(folder: Path, numbers=AP, weights: bool = False, unequal=()) -> Path:
    for arm, by_seed in numbers.items():
        for seed, ap in by_seed.items():
            make_run(folder / arm / str(seed), ap, seed, weights and seed == 0)
    arms = {arm: ("methods=[]",) if arm == "baseline" else (f"methods=[{arm}]",) for arm in numbers}
    seeds = tuple(dict.fromkeys(seed for by_seed in numbers.values() for seed in by_seed))
    write_comparison(read_comparison(Study(Path("student.yaml"), arms, seeds, folder, unequal)))
    return folder


def words(file: Path, start: str = "", end: str = "</body>") -> str:
    """The text between two marks, without tags and the inside of style, script and pictures."""
    text = file.read_text(encoding="utf-8")
    text = re.sub(
        r"<(style|script|svg)\b.*?</\1>", " ", text[text.index(start) :].partition(end)[0], flags=re.S
    )
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


def head(file: Path) -> str:
    return words(file, "<header>", "</header>")


def section(file: Path, name: str) -> str:
    return words(file, f'<section id="{name}"', "</section>")


def test_a_comparison_is_told_whole(tmp_path, capsys):
    folder = make_comparison(tmp_path / "study", weights=True)
    teacher = make_run(tmp_path / "teacher", 0.5, weights=True)
    assert main(["report", str(folder), "--teacher", str(teacher), "--device", "cpu", "--workers", "0"]) == 0
    file = folder / "report.html"
    assert capsys.readouterr().out == f"report: {file}\n"
    assert "ima is better than baseline: +11.0 AP, from 11.0 to 22.0" in head(file)
    # Differences of 10, 12 and 10 or 11 points: their t-interval (df 2) by hand.
    reach = 4.302653 * math.sqrt((1 + 0 + 1) / 2) / math.sqrt(3)
    assert f"95% interval +{11 - reach:.1f} to +{11 + reach:.1f}, 3 seeds" in head(file)
    assert "ima goes 28% of the way to it" in head(file)  # 11 of 39 points
    assert "Missing" not in words(file, "<body>")
    results = section(file, "results")
    assert f"ima 20.0 24.0 22.0 22.0 +11.0 +{11 - reach:.1f} to +{11 + reach:.1f} 3/3 better 3.0" in results
    text = file.read_text(encoding="utf-8")
    assert text.count('class="slide"') == 3  # as many as there are images
    assert "TIDE" in section(file, "kinds-of-error")
    assert "fewer parameters" in section(file, "cost")
    assert "torch 2.8.0" in section(file, "machine")
    assert "baseline: 'methods=[]' ima: 'methods=[ima]'" in section(file, "recipe")
    assert "detdistill train student.yaml 'methods=[ima]' training.seed=2 --out" in section(file, "reproduce")
    assert EVIL not in text
    assert f"{EVIL} 5.5 11.0 25.0 +5.5" in section(file, "by-class")
    assert len(text) < 6_000_000


def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path):
    numbers = {**AP, "late": {0: None, 1: None, 2: None}, "short": {0: 0.1}, "gone": {0: 0.3, 1: 0.3}}
    folder = make_comparison(tmp_path / "study", numbers)
    (folder / "gone" / "1" / "recipe.yaml").unlink()
    (folder / "gone" / "0" / "metrics.jsonl").write_text("no json\n")
    (folder / "ima" / "0" / "result.json").write_text("{")
    (folder / "ima" / "1" / "environment.json").unlink()
    content = json.loads((folder / "comparison.json").read_text())
    content["arms"][3]["failed"] = [1]
    del content["arms"][0]["metrics"]["2"]["AP"]
    (folder / "comparison.json").write_text(json.dumps(content))
    file = detdistill.write_report(folder, out=tmp_path / "new" / "r.html", **CPU)
    said = head(file)
    assert "late: seeds 0, 1, 2 not finished" in said
    assert "short: seed 1 failed" in said
    assert "short: seed 2 not finished" in said
    assert "gone, seed 1: no run in" in said
    assert "gone, seed 0: no metrics.jsonl to read" in said
    assert "ima, seed 0: no result.json to read, so not in the means by class" in said
    assert "baseline: seed 2 without AP in the result" in said
    assert "gone: better than baseline; +19.0 AP" in said  # by 20 and 18 points
    assert "student.safetensors" in section(file, "kinds-of-error")  # not there
    assert "the runs have no pictures" in section(file, "pictures")
    assert "Missing" in section(file, "cost")
    assert "baseline 10.0 12.0 11.0" in section(file, "results")
    assert "failed" in section(file, "results")
    assert "AP on the validation images" in section(file, "training")


def test_unequal_budgets_are_the_first_thing_told(tmp_path):
    file = detdistill.write_report(
        make_comparison(tmp_path / "study", unequal=("training.epochs",)), models=False
    )
    assert "Not a fair comparison: ima has +11.0 AP" in head(file)
    assert "The arms differ in training.epochs" in head(file)
    assert "is better than baseline: +" not in words(file, "<h1>", "</h1>")


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            {"baseline": {0: 0.2, 1: 0.2, 2: 0.3}, "ima": {0: 0.3, 1: 0.1, 2: 0.3}},
            "No measurable gain: ima has +0.0",
        ),
        ({"baseline": {0: 0.2, 1: 0.2}, "ima": {0: 0.3, 1: 0.1}}, "Two seeds cannot tell: ima has"),
        ({"baseline": {0: 0.2}, "ima": {0: 0.3}}, "One seed, no verdict: ima has +10.0 AP"),
        ({"baseline": {0: 0.3, 1: 0.32}, "ima": {0: 0.1, 1: 0.12}}, "ima is worse than baseline: −20.0 AP"),
        ({"baseline": {0: 0.3}, "ima": {1: 0.1}}, "Nothing to compare yet"),
    ],
)
def test_the_verdict_in_plain_words(tmp_path, numbers, said):
    file = detdistill.write_report(make_comparison(tmp_path / "study", numbers), models=False)
    assert said in words(file, "<h1>", "</h1>")


def test_two_runs_are_a_comparison_of_one_seed(tmp_path):
    baseline = make_run(tmp_path / "a", 0.1, weights=True)
    run = make_run(tmp_path / "b", 0.2, weights=True, student={
        "backbone": "mobilenetv3_small_050", "channels": 16, "head_depth": 1, "strides": [16, 32],
    })  # fmt: skip
    file = detdistill.write_report(run, baseline=baseline, **CPU)
    assert "Not a fair comparison: distilled has +10.0 AP, from 10.0 to 20.0" in head(file)
    assert "student.channels" in head(file)
    assert file.read_text().count('class="slide"') == 3
    assert f"baseline is {baseline}; distilled is {run}" in section(file, "kinds-of-error")
    assert f"--baseline {baseline}" in section(file, "reproduce")


def test_one_run_beside_the_truth(tmp_path):
    run = make_run(tmp_path / "run", 0.25, weights=True)
    (run / "costs.json").write_text(json.dumps({"tiny": {
        "parameters": 2_500_000, "macs": 10**9, "checkpoint_bytes": 10**7, "latency": {"50": 0.1, "90": 0.2},
        "images_per_second": 10.0, "size": [64, 64], "device": "a toaster",
    }}))  # fmt: skip
    file = detdistill.write_report(run, **CPU)
    assert "run: 25.0 AP" in head(file)
    assert "ground truth" in section(file, "pictures")
    assert "tiny 2.50 1.00 10.0 100.0 200.0 10.0" in section(file, "cost")
    assert "a toaster" in section(file, "cost")
    (run / "costs.json").write_text('{"tiny": {"parameters": 1}}')
    assert "KeyError" in section(detdistill.write_report(run, **CPU), "cost")


def test_an_unfinished_run(tmp_path):
    run = make_run(tmp_path / "run", None)
    file = detdistill.write_report(run, **CPU)
    assert "run has no result yet" in head(file)
    assert "Its last evaluation, at step 8: 10.0 AP" in head(file)
    assert "not finished" in head(file)
    assert "not finished" in section(file, "kinds-of-error")
    assert "Loss" in section(file, "training")
    with (run / "metrics.jsonl").open("a") as rows:
        rows.write('[1]\n{"step": "x"}\n{"step": 9, "AP"')
    assert section(detdistill.write_report(run, **CPU), "training") == section(file, "training")


def test_a_teacher_that_cannot_be_used_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", 0.2, weights=True)
    teacher = make_run(tmp_path / "teacher", 0.4)  # without weights
    file = detdistill.write_report(run, teacher=teacher, **CPU)
    errors = section(file, "kinds-of-error")
    assert "Missing" in errors
    assert "Precision over recall" in errors


def test_the_teacher_is_found_by_the_recipes(tmp_path):
    teacher = make_run(tmp_path / "teacher", 0.4)
    taught = {"teacher": {"weights": str(teacher / "student.safetensors")}, "methods": ["ima"]}
    run = make_run(tmp_path / "run", 0.2, **taught)
    assert "The teacher has 40.0 AP" in head(detdistill.write_report(run, models=False))
    (teacher / "result.json").unlink()
    assert "no finished run to be found" in head(detdistill.write_report(run, models=False))


def test_the_teacher_is_told_with_its_number_and_hash(tmp_path):
    teacher = make_run(tmp_path / "teacher", 0.4, weights=True)
    known = file_hash(teacher / "student.safetensors")
    taught = {"teacher": {"weights": str(teacher)}, "methods": ["ima"]}
    folder = tmp_path / "study"
    for seed in (0, 1):
        make_run(folder / "baseline" / str(seed), 0.1, seed)
        make_run(folder / "ima" / str(seed), 0.2, seed, **taught)
        (folder / "ima" / str(seed) / "teacher.sha256").write_text(known)
    study = Study(Path("student.yaml"), {"baseline": ("methods=[]",), "ima": ()}, (0, 1), folder)
    (folder / "study.yaml").write_text(study_text(study))
    write_comparison(read_comparison(study))
    content = json.loads((folder / "comparison.json").read_text())
    (told,) = content["teachers"]
    assert (told["weights"], told["sha256"], told["arms"]) == (str(teacher), known, ["ima"])
    assert (told["run"], told["metrics"]["AP"]) == (str(teacher), 0.4)
    assert content["command"] == f"detdistill compare {folder}/study.yaml --metric AP --out {folder}-again"
    reproduce = section(detdistill.write_report(folder, models=False), "reproduce")
    assert f"{teacher} ima 40.0 {known}" in reproduce
    assert content["command"] in reproduce
    assert f"detdistill train {teacher}/recipe.yaml --out {teacher}-again" in reproduce

    # Once the file is another one, the teacher's number is not that of what the runs had.
    (teacher / "student.safetensors").write_bytes(b"something else")
    write_comparison(read_comparison(study))
    (told,) = json.loads((folder / "comparison.json").read_text())["teachers"]
    assert (told["run"], told["metrics"], told["sha256"]) == (None, {}, known)

    # Runs whose teachers were of other content are no fair comparison.
    (folder / "ima" / "1" / "teacher.sha256").write_text("0" * 64)
    comparison = read_comparison(study)
    assert "not a fair comparison: the teacher" in comparison.verdict
    assert "ima had 00000000" in comparison.verdict
    write_comparison(comparison)
    said = head(detdistill.write_report(folder, models=False))
    assert "Not a fair comparison: ima has +10.0 AP, from 10.0 to 20.0, with another teacher" in said
    assert "changed between the runs" in said


def test_what_is_no_run_is_refused_in_a_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    study = make_comparison(tmp_path / "study")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "comparison.json").write_text('{"metric": "AP", "baseline": "x", "arms": []}')
    for arguments, said in (
        ([tmp_path / "file"], "a file"),
        ([tmp_path / "nowhere"], "not there"),
        ([tmp_path / "empty"], "neither a comparison"),
        ([tmp_path / "broken"], "damaged"),
        ([study, "--baseline", study / "baseline" / "0"], "leave --baseline out"),
        ([study, "--teacher", tmp_path / "empty"], "no run folder"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert said in error
    assert not list(tmp_path.rglob("report.html"))


def test_a_finished_comparison_never_fails_for_its_report(tmp_path, monkeypatch):
    said: list[str] = []
    try_report(tmp_path, said.append)
    assert said[0].startswith("warning: no report (")
    monkeypatch.setattr("detdistill.report.report.read_subject", lambda *_: 1 / 0)
    try_report(tmp_path, said.append)
    assert "division by zero" in said[1]
