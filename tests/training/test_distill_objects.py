"""``distill`` and ``evaluate`` with detectors that are Python objects: ours, and wrapped ones of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import detdistill
from detdistill.errors import UserError
from detdistill.models import build_model
from detdistill.recipe import DataConfig

from ..models.foreign_models import YoloLike, yolo_decode, yolo_losses

DIGITS = tuple(str(digit) for digit in range(10))
DATA = {"format": "digits", "train_size": 16, "val_size": 4, "image_size": 64}
BUDGET = {
    "max_steps": 4, "batch_size": 4, "workers": 0, "evaluate_every": 0, "device": "cpu", "ema": 0.9,
    "checkpoint_every": 2,
}  # fmt: skip
PLAIN = detdistill.Preprocess(mean=(0, 0, 0), std=(1, 1, 1))
LEVELS = {8: "model.5", 16: "model.6", 32: "model.7"}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def teacher(seed=0, channels=16):
    torch.manual_seed(seed)
    model = build_model(
        "fcos", DIGITS, backbone="mobilenetv3_small_050", channels=channels, strides=(8, 16, 32), head_depth=1
    )
    model.preprocessor = PLAIN
    return model


def student(seed=1, width=4, losses=None):
    torch.manual_seed(seed)
    model = YoloLike(width, num_classes=10)
    return detdistill.wrap(model, LEVELS, PLAIN, DIGITS, losses=losses or yolo_losses, decode=yolo_decode)


def distill(teacher, student, out, **options):
    return detdistill.distill(teacher, student, DATA, "ima", training=BUDGET, out=out, **options)


def test_a_student_that_gives_no_detections_is_refused_before_training(tmp_path):
    torch.manual_seed(1)
    mute = detdistill.wrap(YoloLike(4, num_classes=10), LEVELS, PLAIN, DIGITS, losses=yolo_losses)
    with pytest.raises(UserError, match=r"gives no detections.*decode="):
        distill(teacher(), mute, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_of_objects_leaves_what_any_run_leaves(tmp_path):
    ours, theirs = teacher(), student()
    names = list(theirs.model.state_dict())
    result = distill(ours, theirs, tmp_path / "run")
    assert result.status == "finished"
    assert {"AP", "AP50"} <= set(result.metrics)
    recipe = yaml.safe_load((result.run / "recipe.yaml").read_text())
    assert list(recipe["student"]) == list(recipe["teacher"]) == ["python"]
    assert recipe["student"]["python"].startswith("YoloLike, ")
    saved = load_file(result.student)
    assert sorted(saved) == sorted(names)
    fresh = student(seed=5)
    fresh.exported.load_state_dict(saved)
    again = detdistill.evaluate(fresh, DataConfig(**DATA), batch_size=4, workers=0, device="cpu")
    assert again.coco.as_dict()["AP"] == pytest.approx(result.metrics["AP"], abs=1e-6)
    for use in (detdistill.load_model, lambda run: detdistill.evaluate(run, DataConfig(**DATA))):
        with pytest.raises(UserError, match=r"weights of a Python object \(YoloLike, .*load_state_dict"):
            use(result.run)
    with pytest.raises(UserError, match="a Python object, which no recipe can build"):
        detdistill.train(result.run / "recipe.yaml", out=tmp_path / "other")


def test_the_student_object_ends_with_the_weights_that_were_measured(tmp_path):
    """The averaged ones; also when the run had ended before."""
    for seed in (1, 9):
        theirs = student(seed=seed)
        result = distill(teacher(), theirs, tmp_path / "run")
        held = theirs.exported.state_dict()
        assert all(torch.equal(held[name], value) for name, value in load_file(result.student).items())


def test_early_stopping_restores_the_best_weights_of_an_object(tmp_path):
    hopeless = {**BUDGET, "evaluate_every": 1, "patience": 1, "optimizer": {"lr": 1e-12}, "max_steps": 60}
    theirs = student()
    result = detdistill.distill(teacher(), theirs, DATA, "ima", training=hopeless, out=tmp_path / "run")
    assert result.status == "stopped early"
    held, best = theirs.exported.state_dict(), load_file(result.run / "best.safetensors")
    assert all(torch.equal(held[name], value) for name, value in best.items())


def test_a_run_goes_on_only_with_the_same_objects(tmp_path):
    result = distill(teacher(), student(), tmp_path / "run")
    before = result.student.stat().st_mtime_ns
    assert distill(teacher(), student(seed=9), tmp_path / "run").metrics == pytest.approx(
        result.metrics, nan_ok=True
    )
    assert result.student.stat().st_mtime_ns == before
    for others in ((teacher(seed=3), student()), (teacher(), student(width=6)), (teacher(), student_section())):
        with pytest.raises(UserError, match=r"another recipe \((student|teacher)"):
            distill(*others, tmp_path / "run")


def student_section():
    return {"family": "fcos", "backbone": "mobilenetv3_small_050", "channels": 8, "strides": [8, 16, 32]}


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path):
    whole = load_file(distill(teacher(), student(), tmp_path / "whole").student)
    steps = []

    def cut_off(model, output, batch):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return yolo_losses(model, output, batch)

    broken = student(losses=cut_off)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher(), broken, tmp_path / "cut")
    resumed = load_file(distill(teacher(), student(seed=7), tmp_path / "cut").student)
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())


def test_a_wrapped_teacher_for_a_section(tmp_path):
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model = detection.FasterRCNN(backbone, len(DIGITS) + 1, min_size=64, max_size=64)
    wrapped = detdistill.wrap(model, None, PLAIN, DIGITS)
    result = distill(wrapped, student_section(), tmp_path / "run")
    assert detdistill.load_model(result.student).pyramid_channels == {8: 8, 16: 8, 32: 8}


def test_a_section_inherits_from_an_object(tmp_path):
    still = {**BUDGET, "max_steps": 1, "ema": None, "optimizer": {"lr": 1e-30}}
    section = {**student_section(), "channels": 16, "head_depth": 1}
    ours, out = teacher(), tmp_path / "run"
    result = detdistill.distill(ours, section, DATA, [], inherit=True, training=still, out=out)
    saved = load_file(result.student)
    for name, value in ours.state_dict().items():
        if not name.startswith("backbone."):
            torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-20)
    with pytest.raises(UserError, match="YoloLike does not say which part of it is the backbone"):
        distill(ours, student(), tmp_path / "other", inherit=True)


def test_weights_that_cannot_be_used_are_refused(tmp_path):
    with torch.no_grad():
        next(iter((nan := student()).model.parameters())).fill_(torch.nan)
        next(iter((bad := teacher()).parameters())).fill_(torch.inf)
        (odd := teacher()).backbone.body.bn1.running_var.fill_(torch.nan)
    for use, message in (
        (
            lambda: distill(teacher(), nan, tmp_path),
            "the weights of the student contain NaN or infinite .*model.0",
        ),
        (lambda: distill(bad, student(), tmp_path), "the weights of the teacher contain NaN"),
        (lambda: detdistill.evaluate(nan, DataConfig(**DATA)), "the weights of this YoloLike contain NaN"),
        (lambda: detdistill.evaluate(odd, DataConfig(**DATA)), "this FCOS contain NaN .*bn1.running_var"),
        (
            lambda: distill(teacher(), student().half(), tmp_path),
            r"the student are float16: call its float\(\)",
        ),
        (lambda: detdistill.evaluate(teacher().half(), DataConfig(**DATA)), "this FCOS are float16"),
    ):
        with pytest.raises(UserError, match=message) as error:
            use()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_data_may_be_a_section():
    assert detdistill.evaluate(teacher(), DATA, workers=0, device="cpu").seconds > 0


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: detdistill.evaluate(teacher(), None), "data is None: give a dataset's folder"),
        (lambda: detdistill.evaluate(teacher(), {"root": "x", "formt": "coco"}), "did you mean 'format'"),
        (lambda: detdistill.evaluate(None, DATA), "None is no model: give a run folder or a weights file"),
        (lambda: detdistill.load_model(None), "None is no model: give a run folder"),
        (lambda: detdistill.load_model(""), "'' is no model"),
        (lambda: distill(teacher(), student(), ""), "out is '': give a path"),
        (lambda: distill(teacher(), student(), None), "out is None: give a path"),
        (lambda: distill(teacher(), student(), "/proc/x"), r"/proc/x/checkpoints: cannot be made \("),
        (lambda: detdistill.export(teacher(), "", size=(64, 64)), "out is '': give a path"),
    ],
)
def test_arguments_of_another_kind_are_one_line(use, message):
    with pytest.raises(UserError, match=message) as error:
        use()
    assert "\n" not in str(error.value)


def test_what_is_refused(tmp_path):
    model = YoloLike()
    for use in (
        lambda: distill(model, student(), tmp_path),
        lambda: distill(teacher(), model, tmp_path),
        lambda: detdistill.evaluate(model, DataConfig(**DATA)),
    ):
        with pytest.raises(UserError, match=r"a YoloLike is no detector yet: give detdistill.wrap"):
            use()
    other = detdistill.wrap(model, LEVELS, PLAIN, ("a", "b"), losses=yolo_losses)
    with pytest.raises(UserError, match="the student's classes are a, b and the data's 0, 1, 2"):
        distill(teacher(), other, tmp_path / "classes")
