"""What methods on head outputs share: which pairs of heads can be compared, and how.

Shape legend: N images, P anchors of all levels (finest level first, rows, columns, anchors), Q classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from detdistill.config import UserError
from detdistill.distillation.signals import Setting, Signals
from detdistill.models.base import DenseRaw, TwoStageRaw
from detdistill.models.faster_rcnn import FasterRCNN
from detdistill.models.heads import flatten_maps
from detdistill.models.one_stage import OneStage

INSTEAD = "use a method on features, such as ima, pkd or mgd"


def require_alike_heads(setting: Setting, name: str, instead: str = INSTEAD) -> None:
    """Refuse a pair whose predictions do not stand for the same things, one by one, and say what to do instead.

    Raises:
        UserError: another family, other classes, other levels or anchors.
    """
    student, teacher = setting.student, setting.teacher
    if type(student) is not type(teacher):
        kinds = f"{type(student).__name__} and {type(teacher).__name__}"
        raise UserError(f"{name} compares predictions, and those of {kinds} differ in kind: {instead}")
    require_same_classes(setting, name, instead)
    if list(student.pyramid_channels) != list(teacher.pyramid_channels):
        strides = list(teacher.pyramid_channels)
        raise UserError(
            f"{name} compares predictions level by level: give the student the teacher's strides {strides}, or "
            f"{instead}"
        )
    assert isinstance(student, OneStage | FasterRCNN)
    assert isinstance(teacher, OneStage | FasterRCNN)
    a, b = student.anchor_generator, teacher.anchor_generator
    if (a.sizes, a.aspect_ratios) != (b.sizes, b.aspect_ratios):
        raise UserError(
            f"{name} compares predictions anchor by anchor: give both the same anchor_scale, or {instead}"
        )


def require_same_classes(setting: Setting, name: str, instead: str = INSTEAD) -> None:
    """Raises:
    UserError: the classes, or their order, differ.
    """
    if setting.student.classes != setting.teacher.classes:
        ours, theirs = (", ".join(model.classes) for model in (setting.student, setting.teacher))
        raise UserError(
            f"{name} compares class scores, but the student's classes are {ours:.60} and the teacher's "
            f"{theirs:.60}: {instead}"
        )


def class_logits(raw: DenseRaw, num_classes: int) -> Tensor:
    """(N, P, Q) float32."""
    return torch.cat(flatten_maps(raw.cls.values(), num_classes), dim=1)


def box_outputs(raw: DenseRaw) -> Tensor:
    """(N, P, 4) float32, in the head's own encoding."""
    return torch.cat(flatten_maps(raw.box.values(), 4), dim=1)


def tempered_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature² · KL(softmax(teacher / temperature) || softmax(student / temperature)), by rows.

    Summed over the last dimension: (...) for logits (..., B).
    """
    ours, theirs = ((logits / temperature).log_softmax(dim=-1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def on_levels(raw: DenseRaw, strides: Iterable[int]) -> DenseRaw:
    """Class and box outputs of these levels alone."""
    strides = list(strides)
    return DenseRaw(
        {stride: raw.cls[stride] for stride in strides}, {stride: raw.box[stride] for stride in strides}
    )


def region_responses(signals: Signals) -> tuple[TwoStageRaw, Tensor, Tensor]:
    """Both second stages on the student's regions: the student's outputs, the teacher's logits and box deltas.

    Regions are in network input, which has one scale for both models: they differ in padding at most.
    """
    raw, teacher = signals.student_raw, signals.teacher_model
    assert isinstance(raw, TwoStageRaw)
    assert isinstance(teacher, FasterRCNN)
    with torch.no_grad():
        logits_RQ, deltas_RQ4 = teacher.classify(signals.teacher, raw.proposals, signals.teacher_batch)
    return raw, logits_RQ, deltas_RQ4


@contextmanager
def own_draws(generator: torch.Generator) -> Iterator[None]:
    """For ground-truth losses, which sample anchors and regions from the global random state.

    Within it that state is what the generator's seed says; after it, it is as before.
    """
    devices = [generator.device] if generator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(generator.initial_seed())
        yield
