"""Inheriting: what of a teacher a student starts with, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import detdistill
from detdistill.distillation.inheriting import inherit
from detdistill.errors import UserError
from detdistill.models import build_model
from detdistill.models.base import Model

from ..models.foreign_models import YoloLike

CLASSES = ("cat", "dog", "pig")


def build(
    family: str = "retinanet", backbone: str = "mobilenetv3_small_050", seed: int = 0, **options: Any
) -> Model:
    torch.manual_seed(seed)
    classes = options.pop("classes", CLASSES)
    model = build_model(family, classes, **{"backbone": backbone, "channels": 16, **options})
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand(()))  # or the statistics of two new models would agree by chance
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def counts(told: str) -> tuple[int, int]:
    found = re.search(r"(\d+) of (\d+) tensors", told)
    assert found
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    "family", ["retinanet", "fcos", "gfl", "reppoints", "faster_rcnn", "cascade_mask_rcnn", "pspnet"]
)
def test_neck_and_head_are_the_teachers_and_the_backbone_is_not(family: str) -> None:
    student, teacher = build(family), build(family, seed=1)
    before, theirs = state(student), state(teacher)
    told = inherit(student, teacher)
    outside = [name for name in before if not name.startswith("backbone.")]
    assert counts(told) == (len(outside), len(outside))
    assert "not " not in told
    after = state(student)
    assert all(torch.equal(after[name], theirs[name]) for name in outside)
    changed = [name for name in outside if not torch.equal(before[name], theirs[name])]
    assert any(name.startswith("head.") or "roi" in name for name in changed)
    assert any(name.startswith("neck.") for name in changed)
    assert any("running_mean" in name for name in changed) == (family == "pspnet")  # buffers, too
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("backbone."))
    assert all(torch.equal(value, theirs[name]) for name, value in state(teacher).items())
    with torch.no_grad():
        next(student.get_submodule("head" if hasattr(student, "head") else "roi_head").parameters()).add_(1)
    assert all(torch.equal(value, theirs[name]) for name, value in state(teacher).items())  # a copy


def test_what_another_backbone_feeds_stays_the_students() -> None:
    student, teacher = build(), build(backbone="resnet18", seed=1)
    before = state(student)
    told = inherit(student, teacher)
    own = [f"neck.fpn.inner_blocks.{i}.0.weight" for i in range(3)]
    total = sum(not name.startswith("backbone.") for name in before)
    assert counts(told) == (total - 3, total)
    assert all(name in told for name in own)
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in own)


def test_class_rows_go_by_name() -> None:
    student = build(classes=("pig", "hen", "cat"))
    teacher = build(seed=1)
    before = state(student)
    told = inherit(student, teacher)
    assert "no rows of hen" in told
    ours, theirs, was = (
        rows["head.cls.weight"].unflatten(0, (-1, 3)) for rows in (state(student), state(teacher), before)
    )
    assert torch.equal(ours[:, 0], theirs[:, 2])
    assert torch.equal(ours[:, 2], theirs[:, 0])
    assert torch.equal(ours[:, 1], was[:, 1])


def faster(classes: int = 3, seed: int = 0) -> detection.FasterRCNN:
    torch.manual_seed(seed)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return detection.FasterRCNN(backbone, classes + 1, min_size=64, max_size=64)


def test_torchvisions_objects_inherit_from_each_other() -> None:
    objects = faster(), faster(seed=1)
    student, teacher = (detdistill.wrap(model, classes=CLASSES) for model in objects)
    before = state(student)
    told = inherit(student, teacher)
    body = "model.backbone.body."
    outside = [name for name in before if not name.startswith(body)]
    assert any(name.startswith("model.backbone.fpn.") for name in outside)
    assert counts(told) == (len(outside), len(outside))
    after, theirs = state(student), state(teacher)
    assert all(torch.equal(after[name], (theirs if name in outside else before)[name]) for name in before)
    other = detdistill.wrap(faster(), classes=("cat", "pig", "dog"))
    with pytest.raises(UserError, match="same classes in the same order"):
        inherit(other, teacher)


def test_queries_are_inherited() -> None:
    pytest.importorskip("transformers")
    options = {"channels": 32}
    student, teacher = (build("rtdetr_v2", seed=seed, **options) for seed in (0, 1))
    backbone = state(student.backbone)
    copied, total = counts(inherit(student, teacher))
    assert copied == total > 0
    assert all(torch.equal(value, backbone[name]) for name, value in state(student.backbone).items())


def wrapped() -> Model:
    plain = detdistill.Preprocess(mean=(0, 0, 0), std=(1, 1, 1))
    return detdistill.wrap(YoloLike(4, num_classes=3), {8: "model.5"}, plain, CLASSES)


def wrapped_faster() -> Model:
    return detdistill.wrap(faster(), classes=CLASSES)


@pytest.mark.parametrize(
    ("student", "teacher", "why"),
    [
        ({}, lambda: build(channels=24), "stride 8 and 16 channels, the teacher's stride 8 and 24: give"),
        ({"family": "pspnet"}, lambda: build("pspnet", channels=24), "and 16 channels, the teacher's"),
        ({"strides": (16, 32, 64)}, build, "stride 16 and 16 channels, the teacher's stride 8 and 16"),
        ({"family": "faster_rcnn", "channels": 256}, wrapped_faster, "no tensor of one name and shape outside"),
        ({}, wrapped, "YoloLike does not say which part of it is the backbone"),
    ],
)
def test_what_is_refused_leaves_the_student_as_it_is(student: Any, teacher: Any, why: str) -> None:
    model = build(**student)
    before = state(model)
    with pytest.raises(UserError, match=why) as refused:
        inherit(model, teacher())
    assert str(refused.value).startswith("inherit: ")
    assert "\n" not in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
