"""Semantic segmentation by the same verbs, loop and files as detection."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix

import detdistill
from detdistill.cli import main
from detdistill.commands.rank_teachers import rank_teachers
from detdistill.errors import UserError
from detdistill.evaluation.measure import Evaluation
from detdistill.evaluation.segmentation import SegmentationEvaluation
from detdistill.models import build_model, save_model
from detdistill.recipe import parse_recipe
from detdistill.training import loop
from detdistill.training.loop import train

from ..golden_runs.runs import make_label_maps

CLASSES = ["road", "sky", "tree"]
TRAINING = {
    "max_steps": 4, "epochs": 100, "batch_size": 4, "workers": 0, "evaluate_every": 0, "device": "cpu",
    "ema": 0.9, "optimizer": {"lr": 0.02}, "schedule": {"name": "poly", "warmup": 0},
    "augment": {
        "flip": 0.5, "photometric": True, "scale": [0.5, 2.0], "crop_size": [48, 56], "multi_scale": [0.8, 1.2],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_label_maps(tmp_path_factory.mktemp("data"), val=5)


def tree(data: Path, training: Any = (), **sections: Any) -> dict[str, Any]:
    student = {"family": "pspnet", "backbone": "mobilenetv3_small_050", "channels": 16}
    return {
        "data": str(data), "student": student, "training": {**TRAINING, **dict(training)}, **sections,
    }  # fmt: skip


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "teacher"
    student = {"family": "deeplabv3", "backbone": "mobilenetv3_small_050", "channels": 24}
    train(parse_recipe(tree(data, student=student)), run)
    return run


def test_a_run_leaves_what_a_detectors_run_leaves(data: Path, teacher: Path) -> None:
    result = json.loads((teacher / "result.json").read_text())
    assert (result["status"], result["main"]) == ("finished", "mIoU")
    assert set(result["metrics"]) == {"mIoU", "pixel_accuracy", "mean_accuracy", "minutes", "steps"}
    assert list(result["per_class"]) == CLASSES
    assert "mIoU" in (teacher / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in ("student.safetensors", "best.safetensors", "curves.png", "samples.png"):
        assert (teacher / name).is_file()
    evaluation = detdistill.evaluate(teacher, data, batch_size=2, workers=0, device="cpu")
    assert isinstance(evaluation, SegmentationEvaluation)
    assert evaluation.numbers()["mIoU"] == pytest.approx(result["metrics"]["mIoU"], abs=1e-6)
    assert evaluation.confusion.sum() == 5 * 45 * 64  # every pixel that has a label
    assert set(evaluation.label_maps) == set(range(5))


def test_interrupted_and_resumed_is_uninterrupted(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["ima", {"mimic": {"weight": "auto"}}]
    recipe = parse_recipe(tree(data, teacher=str(teacher), methods=methods))
    train(recipe, tmp_path / "whole")
    original = loop.optimization_step

    def interrupted(*args: Any) -> Any:
        outcome = original(*args)
        if outcome.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimization_step", interrupted)
        with pytest.raises(SystemExit):
            train(recipe, tmp_path / "parts")
    train(recipe, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / run / "student.safetensors") for run in ("whole", "parts"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert not any(name.startswith("methods") for name in whole)


def test_the_verbs(data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree(data, {"max_steps": 1}, teacher=str(teacher), methods=["mimic"])))
    assert main(["check", str(recipe)]) == 0
    assert "pspnet mobilenetv3_small_050" in capsys.readouterr().out
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert "finished: mIoU " in capsys.readouterr().out
    weights = str(tmp_path / "run")
    numbers = tmp_path / "numbers.json"
    evaluate = ["evaluate", weights, "--data", str(data), "--workers", "0", "--device", "cpu"]
    assert main([*evaluate, "--json", str(numbers)]) == 0
    assert "IoU" in capsys.readouterr().out
    assert list(json.loads(numbers.read_text())["per_class"]) == CLASSES
    assert main(["predict", weights, str(data / "images" / "val"), "--out", str(tmp_path / "seen")]) == 0
    assert "5 images: " in capsys.readouterr().out
    assert len(list((tmp_path / "seen").glob("*.labels.png"))) == 5
    assert main(["benchmark", weights, "--runs", "1", "--warmup", "0", "--size", "64", "64"]) == 0
    capsys.readouterr()
    for refused in ([*evaluate, "--metric", "voc"], [*evaluate, "--results", "x.json"], ["analyze", weights]):
        assert main(refused) == 2
        message = capsys.readouterr().err.strip()
        assert message.count("\n") == 0, message
        assert "segment" in message


@pytest.mark.slow
def test_arms_are_compared_by_miou(data: Path, teacher: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(tree(data, {"max_steps": 1}, teacher=str(teacher), methods=["mimic"])))
    assert main(["compare", str(recipe), "none", "ima", "--seeds", "1", "--out", str(out)]) == 0
    assert json.loads((out / "comparison.json").read_text())["metric"] == "mIoU"
    assert "paired difference in mIoU" in (out / "table.md").read_text()


def test_data_of_the_other_task_is_refused_before_training(data: Path, teacher: Path, tmp_path: Path) -> None:
    detector = {"family": "fcos", "backbone": "mobilenetv3_small_050", "channels": 16}
    with pytest.raises(UserError, match="has label maps and no boxes: use pspnet or deeplabv3, not fcos"):
        train(parse_recipe(tree(data, student=detector)), tmp_path / "a")
    digits = {"format": "digits", "train_size": 4, "val_size": 2, "image_size": 64}
    with pytest.raises(UserError, match="has no label maps, and pspnet learns from them"):
        train(parse_recipe({**tree(data), "data": digits}), tmp_path / "b")
    with pytest.raises(UserError, match="has no label maps, and the model is for segmentation"):
        detdistill.evaluate(teacher, parse_recipe({**tree(data), "data": digits}), workers=0)


def test_the_doctor_refuses_what_training_would(data: Path) -> None:
    from detdistill.commands.check import check

    result = check(parse_recipe(tree(data, {"augment": {"crop": 0.5}})))
    assert any("crop goes by boxes" in problem for problem in result.problems)


def test_teachers_are_ranked_by_their_miou(data: Path, teacher: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    save_model(build_model(parse_recipe(tree(data)).student, CLASSES), alone)
    ranking = rank_teachers(
        parse_recipe(tree(data)), [teacher], student=alone, images=4, limit=4, rounds=1, device="cpu"
    )
    (score,) = ranking.scores
    measured = [detdistill.evaluate(model, data, limit=4).numbers()["mIoU"] for model in (teacher, alone)]
    assert (ranking.metric, score.what) == ("mIoU", "deeplabv3 mobilenetv3_small_050")
    assert [score.quality, ranking.student_quality] == measured
    assert score.gap == measured[0] - measured[1]
    assert list(score.cka_trained or {}) == [8]
    assert "by mIoU on 4 of 5 validation images" in ranking.recommendation


def test_objects_are_distilled_as_well(data: Path, teacher: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = build_model("pspnet", CLASSES, backbone="mobilenetv3_small_050", channels=8)
    training = {**TRAINING, "max_steps": 1}
    result = detdistill.distill(teacher, student, data, "mimic", training=training, out=tmp_path / "run")
    assert 0 <= result.metrics["mIoU"] <= 1


def test_classes_meet_by_name(data: Path) -> None:
    torch.manual_seed(0)
    torch.nn.init.normal_(
        (model := build_model("pspnet", CLASSES, backbone="mobilenetv3_small_050", channels=8)).head.cls.bias
    )
    other = build_model("pspnet", ["tree", "car", "road"], backbone="mobilenetv3_small_050", channels=8)
    other.load_state_dict(model.state_dict())  # what was sky is now a car, which the data do not know
    own, renamed = (detdistill.evaluate(m, data, workers=0, device="cpu") for m in (model, other))
    for evaluation in (own, renamed):
        assert isinstance(evaluation, Evaluation)
    given = {"road": "tree", "sky": None, "tree": "road"}  # the other's name for each of the first's
    columns = [CLASSES.index(name) if name else 3 for name in given.values()]
    assert torch.equal(renamed.confusion[:, columns], own.confusion[:, :3])


@pytest.mark.real
def test_camvid_is_evaluated_at_its_own_size(shared_data: Path) -> None:
    names = json.loads((shared_data / "camvid" / "classes.json").read_text())["classes"]
    torch.manual_seed(0)
    model = build_model("pspnet", names, backbone="mobilenetv3_small_050", channels=8)
    evaluation = detdistill.evaluate(model, shared_data / "camvid", workers=0, device="cpu", limit=3)
    assert isinstance(evaluation, SegmentationEvaluation)
    for record, label in zip(evaluation.split.records, evaluation.label_maps.values(), strict=True):
        assert label.shape == (record.height, record.width) == (270, 360)
    files = [shared_data / "camvid" / "labels" / "val" / f"{r.path.stem}.png" for r in evaluation.split.records]
    true = np.concatenate([np.asarray(Image.open(file)).ravel() for file in files])
    given = torch.cat([label.flatten() for label in evaluation.label_maps.values()]).numpy()
    labeled = true != 255
    expected = confusion_matrix(true[labeled], given[labeled], labels=range(len(names)))
    np.testing.assert_array_equal(evaluation.confusion[:, :-1].numpy(), expected)


WORKER = """
import sys
import torch
from torch import distributed
import detdistill
from detdistill.models import build_model, save_model

rank, port, data, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
model = build_model("pspnet", ["road", "sky", "tree"], backbone="mobilenetv3_small_050", channels=8)
model.load_state_dict(torch.load(f"{out}/model.pt"))
found = detdistill.evaluate(model, data, batch_size=1, workers=0, device="cpu")
torch.save((found.confusion, found.label_maps), f"{out}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_images(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("pspnet", CLASSES, backbone="mobilenetv3_small_050", channels=8)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(tmp_path / "worker.py")]
    rest = [str(port), str(data), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank), *rest]) for rank in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    alone = detdistill.evaluate(model, data, batch_size=1, workers=0, device="cpu")
    for rank in range(2):
        confusion, label_maps = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(confusion, alone.confusion)
        assert list(label_maps) == list(alone.label_maps)
        assert all(torch.equal(label_maps[i], alone.label_maps[i]) for i in label_maps)
