"""analyze: the file it writes, the detections it keeps, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from detdistill.cli import main
from detdistill.comparison import analysis as module
from detdistill.comparison.analysis import analyze, detections_of
from detdistill.errors import UserError
from detdistill.evaluation.errors import AREAS, KINDS, TIDE_KINDS
from detdistill.evaluation.evaluate import evaluate, open_split
from detdistill.models import build_model, save_model
from detdistill.recipe import dump_recipe, parse_recipe

CPU = {"device": "cpu", "workers": 0}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_run(folder: Path, seed: int, val_size: int = 4) -> Path:
    """A finished run's folder with an untrained student whose every cell is a detection."""
    recipe = parse_recipe({
        "data": {"format": "digits", "train_size": 8, "val_size": val_size, "image_size": 64},
        "student": {"backbone": "mobilenetv3_small_050", "channels": 8, "head_depth": 1, "strides": [16, 32]},
    })  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "result.json").write_text('{"status": "finished", "metrics": {}, "per_class": {}}')
    torch.manual_seed(seed)
    model = build_model(recipe.student, [str(digit) for digit in range(10)])
    torch.nn.init.constant_(model.head.cls.bias, 0.0)
    save_model(model, folder / "student.safetensors")
    return folder


@pytest.fixture
def runs(tmp_path):
    return make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1)


def test_three_runs_side_by_side(runs, tmp_path, capsys):
    baseline, distilled = runs
    arguments = [
        "analyze",
        distilled,
        "--baseline",
        baseline,
        "--teacher",
        baseline,
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    assert main([str(word) for word in arguments]) == 0
    printed = capsys.readouterr().out
    assert "no supercategories: Sim is Loc" in printed
    assert "images differ" in printed
    content = json.loads((distilled / "analysis" / "analysis.json").read_text())
    assert [model["role"] for model in content["models"]] == ["teacher", "baseline", "distilled"]
    for model, run in zip(content["models"], (baseline, baseline, distilled), strict=True):
        assert model["numbers"]["AP50"] == pytest.approx(evaluate(run, run, **CPU).coco.AP50, abs=1e-5)
        assert model["under"]["all"]["all"]["C50"] == pytest.approx(model["numbers"]["AP50"], abs=1e-5)
        assert set(model["tide"]["dAP"]) == set(TIDE_KINDS)
        assert set(model["curves"]["all"]) == set(AREAS)
        assert set(model["curves"]["all"]["all"]) == set(KINDS)
    changed = content["difference"]
    kinds = [change["kind"] for image in changed["images"] for change in image["changes"]]
    assert changed["counts"] == {kind: kinds.count(kind) for kind in changed["counts"]}
    assert sum(changed["counts"].values()) > 0
    for name in ("difference", "errors", "errors_by_class"):
        assert (distilled / "analysis" / f"{name}.png").stat().st_size > 1000
    assert all(Path(image["path"]).is_file() for image in changed["images"])


def test_one_run_alone(runs, tmp_path):
    analysis = analyze(runs[0], out=tmp_path / "out", **CPU)
    assert [model.role for model in analysis.models] == ["run"]
    assert analysis.differences is None
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["difference"] is None


def test_detections_are_kept_until_weights_images_or_file_change(runs, monkeypatch):
    run, other = runs
    split = open_split(run, "val")
    detected = []
    real = module.evaluate_detector
    monkeypatch.setattr(module, "evaluate_detector", lambda *a, **k: detected.append(1) or real(*a, **k))
    first, second = (detections_of(run, split, **CPU) for _ in range(2))
    assert len(detected) == 1
    for a, b in zip(first, second, strict=True):
        assert len(a["scores"])
        np.testing.assert_allclose(a["boxes"], b["boxes"], atol=1e-5)
        assert (a["labels"] == b["labels"]).all()
        assert (a["scores"] == b["scores"]).all()
    (run / "student.safetensors").write_bytes((other / "student.safetensors").read_bytes())
    detections_of(run, split, **CPU)
    assert len(detected) == 2
    (run / "detections.json").write_text("[]")
    detections_of(run, split, **CPU)
    assert len(detected) == 3
    detections_of(run, open_split(make_run(run.parent / "c", 0, val_size=3), "val"), **CPU)
    assert len(detected) == 4


def comparison(folder: Path, metrics: dict[str, dict[str, float]]) -> Path:
    arms = [
        {
            "name": name,
            "runs": {seed: f"{name}/{seed}" for seed in by_seed},
            "metrics": {s: {"AP": ap} for s, ap in by_seed.items()},
            "overrides": [],
            "failed": [],
        }
        for name, by_seed in metrics.items()
    ]
    for arm in arms:
        for run in arm["runs"].values():
            make_run(folder / run, 0)
    content = {
        "recipe": "student.yaml", "baseline": "none", "metric": "AP", "seeds": [0, 1], "unequal": [],
        "arms": arms,
    }  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(content))
    return folder


def test_a_comparison_gives_its_baseline_and_best_arm(tmp_path):
    folder = comparison(tmp_path, {"none": {"0": 0.9, "1": 0.1}, "ima": {"1": 0.3}, "fgd": {"1": 0.2}})
    analysis = analyze(folder, **CPU)
    assert [(model.role, model.run) for model in analysis.models] == [
        ("baseline", folder / "none" / "1"),
        ("distilled", folder / "ima" / "1"),
    ]
    assert (folder / "analysis" / "analysis.json").is_file()


def test_what_cannot_be_analyzed_is_said_in_one_line(runs, tmp_path):
    run, other = runs
    cases = [(tmp_path / "nowhere", {}, "no run folder")]
    unfinished = make_run(tmp_path / "unfinished", 0)
    (unfinished / "result.json").unlink()
    cases.append((unfinished, {}, "not finished"))
    cases.append((run, {"baseline": unfinished}, "not finished"))
    damaged = make_run(tmp_path / "damaged", 0)
    (damaged / "result.json").write_text("{")
    cases.append((damaged, {}, "damaged"))
    without = make_run(tmp_path / "without", 0)
    (without / "student.safetensors").unlink()
    cases.append((without, {}, "no student.safetensors"))
    cases.append((run, {"baseline": make_run(tmp_path / "more", 0, val_size=5)}, "other validation images"))
    lonely = comparison(tmp_path / "lonely", {"none": {"0": 0.9}, "ima": {}})
    cases.append((lonely, {}, "no seed was finished"))
    (other / "comparison.json").write_text("[]")
    cases.append((other, {}, "damaged"))
    for folder, options, message in cases:
        with pytest.raises(UserError, match=message) as error:
            analyze(folder, **options, **CPU)
        assert "\n" not in str(error.value)
