"""What a distillation method may compare, and the little that it must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from detdistill.distillation.matching import ClassMatch, Matching, Overlay, match_classes
from detdistill.models.base import Batch, Model, Pyramid, Raw, Task

Need = Literal["student_raw", "raw", "hidden", "labels"]

EVERY_TASK: frozenset[Task] = frozenset({"detection", "segmentation"})
"""The tasks of a method that compares maps, whatever is learnt from them."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The pair that a method is built for.

    Attributes:
        student, teacher: to read facts from (kind, classes, channels); a method must not keep them, or they
            would become part of it.
        matching: the levels that it may use.
    """

    student: Model
    teacher: Model
    matching: Matching

    @property
    def classes(self) -> ClassMatch:
        """The classes that both know, as pairs of labels, and those that only one of them knows."""
        return match_classes(self.student.classes, self.teacher.classes)


@dataclass(slots=True)
class Signals:
    """Both models' view of one batch.

    Attributes:
        student, teacher: feature maps by stride; the teacher's carry no gradient.
        student_batch, teacher_batch: the inputs, each padded and scaled as its model wants them. Their sizes
            may differ: boxes of one are not in the pixels of the other. Images without labels have no targets.
        overlay: lays a map of the student over one of the teacher.
        student_raw, teacher_raw: head outputs; the teacher's are None unless a method needs "raw", and the
            student's of images without labels unless it needs "raw" or "student_raw".
        student_model, teacher_model: the models; the teacher is frozen, but gradient may pass through it.
        generator: a method's only source of randomness, seeded by (seed, process, step). The global generator
            is left alone, so a student sees the same draws with and without distillation.
        progress: the share of training that is over, above 0 at the first step; None: its length is unknown.
    """

    student: Pyramid
    teacher: Pyramid
    student_batch: Batch
    teacher_batch: Batch
    overlay: Overlay
    student_raw: Raw | None
    teacher_raw: Raw | None
    student_model: Model
    teacher_model: Model
    generator: torch.Generator
    progress: float | None = None


class Method(nn.Module, ABC):
    """Binds a loss to a pair. Learnable parts are submodules: optimised and saved, never exported.

    A child's constructor takes a :class:`Setting`, the loss (a module of its own, whose constructor's arguments
    are options in recipes), and by keyword any options of the binding; all are typed, and checked by the types.

    Attributes:
        needs: "raw": both heads' outputs (else the teacher's head never runs); "student_raw": the student's
            alone; "hidden": both towers' maps in the raw outputs, for one-stage pairs; "labels": the batches'
            targets, so that images without labels (``data.unlabelled``) cannot teach by it.
        tasks: what it can be used for. A method that needs boxes, anchors or proposals is for detection alone;
            one that compares maps is for segmentation as well.
        presets: named sets of options. The one named after the student's family ("gfl"), else after its kind
            ("anchor", "anchor_free", "two_stage", "segmentation"), else "recommended", is what its name alone
            means.
    """

    needs: frozenset[Need] = frozenset()
    tasks: ClassVar[frozenset[Task]] = frozenset({"detection"})
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def forward(self, signals: Signals) -> Tensor:
        """The unweighted loss, a scalar."""
