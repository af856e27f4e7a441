"""What a distillation method may compare, and the little that it must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from detdistill.distillation.alignment import Alignment
from detdistill.distillation.classes import ClassMatch, match_classes
from detdistill.distillation.levels import Matching
from detdistill.models.base import Batch, HeadOutputs, Model, Pyramid

Requirement = Literal["student_outputs", "outputs", "tower_features", "labels"]


@dataclass(frozen=True, slots=True)
class PairContext:
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
class StepOutputs:
    """Both models' view of one batch.

    Attributes:
        student, teacher: feature maps by stride; the teacher's carry no gradient.
        student_batch, teacher_batch: the inputs, each padded and scaled as its model wants them. Their sizes
            may differ: boxes of one are not in the pixels of the other. Images without labels have no targets.
        alignment: resamples a map of the student at the cells of one of the teacher.
        student_outputs, teacher_outputs: head outputs; the teacher's are None unless a method needs "outputs",
            and the student's of images without labels unless it needs "outputs" or "student_outputs".
        student_model, teacher_model: the models; the teacher is frozen, but gradient may pass through it.
        generator: a method's only source of randomness, seeded by (seed, process, step). The global generator
            is left alone, so a student sees the same draws with and without distillation.
        progress: the share of training that is over, above 0 at the first step; None: its length is unknown.
    """

    student: Pyramid
    teacher: Pyramid
    student_batch: Batch
    teacher_batch: Batch
    alignment: Alignment
    student_outputs: HeadOutputs | None
    teacher_outputs: HeadOutputs | None
    student_model: Model
    teacher_model: Model
    generator: torch.Generator
    progress: float | None = None


class Method(nn.Module, ABC):
    """Applies a loss to student and teacher. Learnable parts are submodules: trained and saved, never exported.

    A child's constructor takes a :class:`PairContext` and the method's options, a
    :class:`~detdistill.recipe.methods.MethodOptions`. The loss is a module of its own.

    Attributes:
        requires: "outputs": both heads' outputs (else the teacher's head never runs); "student_outputs": the
            student's only; "tower_features": both towers' maps in the outputs, for one-stage pairs; "labels":
            the batches' targets, so that it cannot use images without labels (``data.unlabeled``).
    """

    requires: frozenset[Requirement] = frozenset()

    @abstractmethod
    def forward(self, step: StepOutputs) -> Tensor:
        """The unweighted loss, a scalar."""
