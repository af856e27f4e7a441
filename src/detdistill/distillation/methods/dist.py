"""DIST: relations between classes and between cells (Huang et al., NeurIPS 2022).

With scores y (sigmoid of the logits in one-stage detectors, softmax in two-stage ones) as a table of rows and
classes, and r Pearson's correlation::

    L = τ² · ( inter_weight · (1 - mean over rows of r(y_S, y_T) along the classes)
             + intra_weight · (1 - mean over classes of r(y_S, y_T) along the rows) )

Only relations count: a student may be less sure than its teacher throughout. The rows are the cells of a level,
over the batch, with K = A·Q columns of anchors and classes; or the regions that the student samples, with the
background among the Q + 1 classes, for which the teacher's second stage is run; or the pixels of segmenters,
with one softmax over the classes. (The published code adds 0.4 times the same for the auxiliary head, which a
teacher in evaluation mode does not run here.)

Shape legend: N images, H W rows and columns of a map, A anchors a cell, Q classes, K columns, R regions.
Reduction: "mean", between 0 and 2 for each term; the levels are summed.

We follow the published code: τ = 1, and an eps of 1e-8 beside the product of norms, for which (nearly) constant
rows give r = 0 and so a loss of 1, of equal models too: early in training scores are that even. A single class
without anchors has no relation between classes: that term is then a constant.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.outputs import (
    SEGMENTATION,
    SharedClasses,
    pixel_logits,
    region_responses,
    require_alike_heads,
    two_stage,
)
from detdistill.distillation.precision import in_full_precision
from detdistill.models.base import DenseOutputs
from detdistill.recipe.methods import DISTOptions

EPS = 1e-8


class DISTLoss(nn.Module):
    """L of the module's equation.

    Args:
        inter_weight, intra_weight: β and γ, factors on the relations between classes and between rows.
        temperature: τ, of the scores.
        scores: "sigmoid" for logits of classes on their own, "softmax" for those of one choice.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(
        self,
        *,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        temperature: float = 1.0,
        scores: Literal["sigmoid", "softmax"] = "sigmoid",
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.inter_weight, self.intra_weight = inter_weight, intra_weight
        self.temperature, self.scores = temperature, scores

    @in_full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Logits with their classes in dimension 1, (N, K, H, W) or (R, K); the teacher's are detached."""
        s, t = (
            x.sigmoid() if self.scores == "sigmoid" else x.softmax(dim=1)
            for x in (student / self.temperature, teacher.detach() / self.temperature)
        )
        rows = [dim for dim in range(s.ndim) if dim != 1]
        inter = 1 - correlation(s, t, [1]).mean()
        intra = 1 - correlation(s, t, rows).mean()
        return self.temperature**2 * (self.inter_weight * inter + self.intra_weight * intra)


class DIST(Method):
    """Sum of :class:`DISTLoss` over the matched levels' class logits; of two-stage pairs, on the regions'.

    One-stage detectors are of one family. Two-stage are Faster, Mask and Cascade R-CNN, also in inputs of
    unequal size; of a cascade its first head counts.
    """

    def __init__(self, context: PairContext, options: DISTOptions) -> None:
        super().__init__()
        self.segments = context.student.task == SEGMENTATION
        regions = two_stage(context)
        if self.segments:
            self.requires = frozenset({"outputs"})
        elif regions:
            self.requires = frozenset({"student_outputs"})
        else:
            require_alike_heads(context, "dist")
            self.requires = frozenset({"outputs"})
        self.classes = SharedClasses(context, "dist", background=regions)
        self.strides = [level.student_stride for level in context.matching.levels]
        self.loss = DISTLoss(
            inter_weight=options.inter_weight,
            intra_weight=options.intra_weight,
            temperature=options.temperature,
            scores=options.scores,
        )

    def forward(self, step: StepOutputs) -> Tensor:
        if self.segments:
            return self.loss(*pixel_logits(step, self.classes))
        student, teacher = step.student_outputs, step.teacher_outputs
        if not isinstance(student, DenseOutputs):
            found = region_responses(step, self.classes)
            return self.loss(found.student_logits_RQ, found.teacher_logits_RQ)
        assert isinstance(teacher, DenseOutputs)
        levels = [self.classes(student.cls[s], teacher.cls[s], dim=1) for s in self.strides]
        return torch.stack([self.loss(*logits) for logits in levels]).sum()


def correlation(a: Tensor, b: Tensor, dims: list[int]) -> Tensor:
    """Pearson's r along these dimensions, which disappear. Nothing is transposed, so that nothing is copied."""
    a, b = (x - x.mean(dim=dims, keepdim=True) for x in (a, b))
    sizes = [torch.linalg.vector_norm(x, dim=dims) for x in (a, b)]
    return (a * b).sum(dim=dims) / (sizes[0] * sizes[1] + EPS)
