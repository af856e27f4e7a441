"""What a distillation method may compare, and the little that it must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from detdistill.models.base import Batch, Pyramid, Raw

Need = Literal["pyramid", "raw"]


@dataclass(slots=True)
class Signals:
    """Both models' view of one batch.

    Attributes:
        student, teacher: feature maps by stride; the teacher's carry no gradient.
        student_batch, teacher_batch: the inputs, each padded and scaled as its model wants them.
        student_raw, teacher_raw: head outputs; the teacher's is None unless a method needs "raw".
        generator: a method's only source of randomness, seeded by (seed, process, step). The global generator
            is left alone, so a student sees the same draws with and without distillation.
    """

    student: Pyramid
    teacher: Pyramid
    student_batch: Batch
    teacher_batch: Batch
    student_raw: Raw
    teacher_raw: Raw | None
    generator: torch.Generator


class Method(nn.Module, ABC):
    """Binds a loss to a pair. Learnable parts are submodules: optimised and saved, never exported.

    Attributes:
        needs: "pyramid", or "pyramid" and "raw"; where no method needs "raw" the teacher's head never runs.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"pyramid"})

    @abstractmethod
    def forward(self, signals: Signals) -> Tensor:
        """The unweighted loss, a scalar."""
