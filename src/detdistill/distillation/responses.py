"""What methods on head outputs share: which pairs of heads can be compared, and how.

Shape legend: N images, P anchors of all levels (finest level first, rows, columns, anchors), Q classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detdistill.config import UserError
from detdistill.distillation.signals import Setting
from detdistill.models.base import DenseRaw
from detdistill.models.faster_rcnn import FasterRCNN
from detdistill.models.heads import flatten_maps
from detdistill.models.one_stage import OneStage

INSTEAD = "use a method on features, such as ima, pkd or mgd"


def require_alike_heads(setting: Setting, name: str) -> None:
    """Refuse a pair whose predictions do not stand for the same things, one by one.

    Raises:
        UserError: another family, other classes, other levels or anchors.
    """
    student, teacher = setting.student, setting.teacher
    if type(student) is not type(teacher):
        kinds = f"{type(student).__name__} and {type(teacher).__name__}"
        raise UserError(f"{name} compares predictions, and those of {kinds} differ in kind: {INSTEAD}")
    require_same_classes(setting, name)
    if list(student.pyramid_channels) != list(teacher.pyramid_channels):
        strides = list(teacher.pyramid_channels)
        raise UserError(
            f"{name} compares predictions level by level: give the student the teacher's strides {strides}, or "
            f"{INSTEAD}"
        )
    assert isinstance(student, OneStage | FasterRCNN)
    assert isinstance(teacher, OneStage | FasterRCNN)
    a, b = student.anchor_generator, teacher.anchor_generator
    if (a.sizes, a.aspect_ratios) != (b.sizes, b.aspect_ratios):
        raise UserError(
            f"{name} compares predictions anchor by anchor: give both the same anchor_scale, or {INSTEAD}"
        )


def require_same_classes(setting: Setting, name: str) -> None:
    """Raises:
    UserError: the classes, or their order, differ.
    """
    if setting.student.classes != setting.teacher.classes:
        ours, theirs = (", ".join(model.classes) for model in (setting.student, setting.teacher))
        raise UserError(
            f"{name} compares class scores, but the student's classes are {ours:.60} and the teacher's "
            f"{theirs:.60}: {INSTEAD}"
        )


def class_logits(raw: DenseRaw, num_classes: int) -> Tensor:
    """(N, P, Q) float32."""
    return torch.cat(flatten_maps(raw.cls.values(), num_classes), dim=1)


def box_outputs(raw: DenseRaw) -> Tensor:
    """(N, P, 4) float32, in the head's own encoding."""
    return torch.cat(flatten_maps(raw.box.values(), 4), dim=1)
