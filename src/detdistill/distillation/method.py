"""What a distillation method may compare, and the little that it must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from detdistill.distillation.alignment import Overlay
from detdistill.distillation.classes import ClassMatch, match_classes
from detdistill.distillation.levels import Matching
from detdistill.models.base import Batch, Model, Pyramid, Raw

Need = Literal["student_raw", "raw", "hidden", "labels"]


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

    A child's constructor takes a :class:`Setting` and the method's options, a
    :class:`~detdistill.recipe.methods.MethodOptions`. The loss is a module of its own.

    Attributes:
        needs: "raw": both heads' outputs (else the teacher's head never runs); "student_raw": the student's
            alone; "hidden": both towers' maps in the raw outputs, for one-stage pairs; "labels": the batches'
            targets, so that images without labels (``data.unlabelled``) cannot teach by it.
    """

    needs: frozenset[Need] = frozenset()

    @abstractmethod
    def forward(self, signals: Signals) -> Tensor:
        """The unweighted loss, a scalar."""
