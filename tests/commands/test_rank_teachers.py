"""Candidate teachers: what is measured of them, in which order they come, and those that cannot be used."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

import detdistill
from detdistill.cli import main
from detdistill.cli.printing import print_ranking, write_json
from detdistill.commands import rank_teachers as module
from detdistill.commands.rank_teachers import TeacherRanking, TeacherScore, rank_teachers, step_costs
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.evaluation.detector import evaluate_detector
from detdistill.evaluation.evaluate import open_split
from detdistill.models import build_model, load_model, save_model
from detdistill.recipe import TrainingConfig, load_recipe, model_config

RECIPE = """
data: {format: digits, train_size: 8, val_size: 10, image_size: 64}
student: {family: fcos, backbone: mobilenetv3_small_050, channels: 16, head_depth: 1, strides: [8, 16, 32]}
training: {max_steps: 2, batch_size: 4, workers: 0, device: cpu}
"""
DIGITS = [str(digit) for digit in range(10)]


def save(path, classes=DIGITS, seed=0, **section):
    torch.manual_seed(seed)
    section = {"backbone": "mobilenetv3_small_050", "channels": 16, "head_depth": 1, **section}
    section.setdefault("strides", (8, 16, 32))
    model = build_model(model_config(family="fcos", **section), classes)
    save_model(model, path)
    return model


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "student.yaml"
    file.write_text(RECIPE)
    return file


def test_what_is_measured_of_two_teachers_and_a_trained_student(recipe, tmp_path) -> None:
    paths = [tmp_path / "same.safetensors", tmp_path / "large.safetensors"]
    student, large = save(paths[0], seed=1), save(paths[1], seed=2, channels=32, head_depth=2)
    ranking = rank_teachers(recipe, paths, student=paths[0], images=5, limit=6, rounds=1, device="cpu")
    assert not ranking.refused
    assert (ranking.images, ranking.measured_images, ranking.val_images) == (5, 6, 10)
    assert ranking.methods == ("ima",)
    scores = {score.teacher: score for score in ranking.scores}
    same, other = scores[str(paths[0])], scores[str(paths[1])]
    assert same.parameter_ratio == 1
    assert same.parameters == sum(p.numel() for p in student.parameters())
    assert other.parameter_ratio == sum(p.numel() for p in large.parameters()) / same.parameters
    assert other.step_cost > 0  # how it is told from the times: with a clock of its own, below
    assert list(same.cka_start) == [8, 16, 32]
    assert same.cka_trained == pytest.approx({8: 1, 16: 1, 32: 1})
    assert max(other.cka_trained.values()) < 0.99
    assert max(same.cka_start.values()) < 0.99
    assert same.gap == 0
    truth = evaluate_detector(load_model(paths[1]), open_split(load_recipe(recipe), "val"), limit=6)
    assert other.quality == truth.coco.as_dict()["AP"]
    assert other.gap == pytest.approx(other.quality - ranking.student_quality)
    assert "6 of 10 validation images" in ranking.recommendation


def test_measuring_changes_nothing(recipe, tmp_path) -> None:
    """Nor does the order of the candidates: each meets the student that the run would start from."""
    paths = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(paths, start=1):
        save(path, seed=seed)
    options = {"images": 4, "limit": 4, "rounds": 1, "device": "cpu"}
    there, back = (
        {score.teacher: replace(score, step_cost=0) for score in rank_teachers(recipe, order, **options).scores}
        for order in (paths, paths[::-1])
    )
    assert there == back
    assert {path.name for path in tmp_path.glob("*")} == {"student.yaml", "1.safetensors", "2.safetensors"}


def test_the_cost_of_a_step_is_that_of_the_teacher(monkeypatch) -> None:
    """With a clock of our own: a step alone takes 1, with the teacher 3, whatever the machine's drift."""
    model = build_model(
        model_config(
            family="fcos", backbone="mobilenetv3_small_050", channels=8, strides=(8, 16), head_depth=1
        ),
        ("a",),
    )
    pairs = {"t": Pair(model, build_model(model_config(**model.spec["model"]), ("a",)), ["mimic"])}
    now, drift = 0.0, 1.0

    def step(pair, *_):
        nonlocal now, drift
        now += drift * (1 if pair.teacher is None else 3)
        drift *= 1 if pair.teacher is None else 2  # twice as slow in each round

    monkeypatch.setattr(module, "_step", step)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    assert step_costs(model, pairs, [], [], TrainingConfig(), rounds=4) == {"t": 3}


def test_candidates_of_no_use_are_told_and_the_others_ranked(recipe, tmp_path, capsys) -> None:
    good, cats = tmp_path / "good.safetensors", tmp_path / "cats.safetensors"
    save(good, seed=1)
    save(cats, classes=("cat", "dog"))
    save(tmp_path / "sized.safetensors", size=64)
    folder = tmp_path / "run"  # the same file once more, as a run
    folder.mkdir()
    (folder / "student.safetensors").symlink_to(good)
    (tmp_path / "empty").mkdir()
    useless = {
        cats: "knows cat, dog and none",
        folder: f"the same file as {good}",
        tmp_path / "empty": "no student.safetensors",
        tmp_path / "none": "no such weights file",
        tmp_path / "sized.safetensors": "give the student a `size`",
    }
    out = tmp_path / "ranking.json"
    command = ["rank-teachers", str(recipe), "--teachers", *map(str, [good, *useless]), "training.batch_size=2"]
    options = ["--images", "2", "--limit", "2", "--rounds", "1", "--device", "cpu", "--json", str(out)]
    assert main([*command, *options]) == 2
    printed = capsys.readouterr().out
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == printed.count("cannot be used") == len(useless)
    for (path, said), error in zip(useless.items(), errors, strict=True):
        assert str(path) in error
        assert said in error
    assert f"recommended: {good} (the only one)" in printed
    content = json.loads(out.read_text())
    assert [score["teacher"] for score in content["scores"]] == [str(good)]
    assert [teacher for teacher, _ in content["refused"]] == list(map(str, useless))
    assert content["scores"][0]["cka_start"].keys() == {"8", "16", "32"}


def test_teachers_are_words_too_and_none_may_be_left(recipe, tmp_path, capsys) -> None:
    assert main(["rank-teachers", str(recipe), str(tmp_path / "no"), "--device", "cpu"]) == 2
    assert "none of the candidates can teach this student" in capsys.readouterr().out
    assert main(["rank-teachers", str(recipe), "--device", "cpu"]) == 2
    assert "name at least one teacher" in capsys.readouterr().err


def test_another_model_is_no_trained_student(recipe, tmp_path) -> None:
    save(tmp_path / "wide.safetensors", channels=32)
    with pytest.raises(UserError, match="another model than the recipe's student"):
        rank_teachers(recipe, [tmp_path / "x"], student=tmp_path / "wide.safetensors", device="cpu")


def test_the_public_name() -> None:
    assert detdistill.rank_teachers is rank_teachers


# --- order and words -------------------------------------------------------------------------------------


def score(name, ap, cost, gap=None, trained=None):
    return TeacherScore(name, "fcos", ap, gap, {8: 0.5}, trained, cost, 10, 2.0)


def ranked(*scores):
    return TeacherRanking(tuple(module._ranked(scores)), (), ("ima",), 64, "AP", 500, 500, None)


def test_ap_first_and_cost_among_equals() -> None:
    ranking = ranked(
        score("c", 0.20, 1.0), score("b", 0.395, 1.5), score("a", 0.40, 3.0), score("d", 0.385, 1.1)
    )
    assert [s.teacher for s in ranking.scores] == ["b", "a", "d", "c"]
    assert "recommended: b (as good as a, at the least cost)" in ranking.recommendation


def test_a_clear_lead_and_an_ap_that_cannot_be_told() -> None:
    ranking = ranked(score("b", math.nan, 1.0), score("a", 0.40, 3.0))
    assert [s.teacher for s in ranking.scores] == ["a", "b"]
    assert "recommended: a (40.0 AP ahead)" in ranking.recommendation


def test_a_student_that_is_as_good_alone() -> None:
    assert "better than the baseline" in ranked(score("a", 0.40, 3.0, gap=-0.01)).recommendation
    assert "better than the baseline" not in ranked(score("a", 0.40, 3.0, gap=0.1)).recommendation


def test_features_that_say_otherwise_are_told() -> None:
    best, other = (score("a", 0.49, 1.0, trained={8: 0.1, 16: 0.14}), score("b", 0.45, 1.0, trained={8: 0.16}))
    told = ranked(best, other).recommendation
    assert "recommended: a" in told
    assert "but the features of b are nearer to the trained student's (CKA 0.160, not 0.120)" in told
    assert "but the" not in ranked(best, score("b", 0.45, 1.0, trained={8: 0.12})).recommendation
    assert "but the" not in ranked(score("a", 0.49, 1.0), score("b", 0.45, 1.0)).recommendation


def test_what_cannot_be_told_is_null_in_json_and_a_dash_in_print(tmp_path, capsys) -> None:
    ranking = ranked(score("a", math.nan, 1.0))
    write_json(tmp_path / "ranking.json", asdict(ranking))
    content = json.loads((tmp_path / "ranking.json").read_text(), parse_constant=pytest.fail)
    assert content["scores"][0]["quality"] is None
    print_ranking(ranking)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["a"])
    assert row.split() == ["a", "fcos", "–", "0.500", "×", "1.00", "0.00", "×", "2.0"]
