"""FRS: features and scores where the teacher sees something (Du et al., "Feature Richness", NeurIPS 2021).

Where the teacher is sure of any class, its features and scores count more, object or not::

    m_ij   = max over anchors and classes of sigmoid(teacher's logits at ij)
    L_feat = feature_weight · Σ m (φ(S) - T)² / Σ m
    L_cls  = cls_weight · Σ m BCE(student's logits, sigmoid(teacher's logits)) / Σ m

The logits are those on the pyramid: of a two-stage detector, its proposals network's objectness.

Shape legend: N images, C channels, H W rows and columns, A anchors a cell, Q classes.
Reduction: "sum/mask", over the batch, for each level; the levels are summed. Neither C nor A·Q is divided by.

Weights, reduction and φ, a 3×3 convolution on each level, are the published code's. Its BCE takes
probabilities, ours logits: the same number without the overflow. It warms up over 500 steps: give `warmup`.
BCE with soft targets is not 0 for an equal student: what is left is the teacher's entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.adapters import LevelAligner, conv3x3
from detdistill.distillation.method import Method, PairContext, Requirement, StepOutputs
from detdistill.distillation.outputs import INSTEAD, SharedClasses, require_alike_heads
from detdistill.distillation.precision import in_full_precision
from detdistill.errors import UserError
from detdistill.models.base import dense
from detdistill.models.families.faster_rcnn import FasterRCNN
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.heads import avg_factor
from detdistill.recipe.methods import FRSOptions


class FRSLoss(nn.Module):
    """The features' term of one level, and in :meth:`scores` the class scores' term.

    Args:
        feature_weight, cls_weight: factors on the terms; 0 leaves the term out.
    """

    def __init__(self, *, feature_weight: float = 0.005, cls_weight: float = 0.02) -> None:
        super().__init__()
        self.feature_weight, self.cls_weight = feature_weight, cls_weight

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor, richness_NHW: Tensor) -> Tensor:
        """Maps (N, C, H, W), the teacher is detached; m from :func:`richness`. Returns a scalar."""
        squares_NHW = (student_NCHW - teacher_NCHW.detach()).square().sum(dim=1)
        return self.feature_weight * _weighted(squares_NHW, richness_NHW)

    @in_full_precision
    def scores(self, student_NAQHW: Tensor, teacher_NAQHW: Tensor, richness_NHW: Tensor) -> Tensor:
        """Class logits (N, A·Q, H, W), the teacher is detached. Returns a scalar."""
        bce = F.binary_cross_entropy_with_logits(
            student_NAQHW, teacher_NAQHW.detach().sigmoid(), reduction="none"
        )
        return self.cls_weight * _weighted(bce.sum(dim=1), richness_NHW)


class FRS(Method):
    """Sum of :class:`FRSLoss` over the matched levels."""

    requires: frozenset[Requirement] = frozenset({"outputs"})

    def __init__(self, context: PairContext, options: FRSOptions) -> None:
        super().__init__()
        if not isinstance(context.teacher, OneStage | FasterRCNN):
            raise UserError(
                f"frs weighs cells by the teacher's scores, and a {type(context.teacher).__name__} gives none "
                f"cell by cell: {INSTEAD}"
            )
        self.classes = None  # of objectness there is but one
        instead = "use `cls_weight: 0` for the features alone"
        if options.cls_weight:
            require_alike_heads(context, "frs", instead)
        if isinstance(context.teacher, OneStage) and (options.cls_weight or context.classes.pairs):
            self.classes = SharedClasses(context, "frs", instead=instead)
        self.align = LevelAligner(context.matching, options.adapt, conv3x3)
        self.loss = FRSLoss(feature_weight=options.feature_weight, cls_weight=options.cls_weight)

    def forward(self, step: StepOutputs) -> Tensor:
        assert step.student_outputs is not None
        assert step.teacher_outputs is not None
        teacher_cls = dense(step.teacher_outputs).cls
        student_cls = dense(step.student_outputs).cls if self.loss.cls_weight else {}
        terms = []
        for level, s, t in self.align(step):
            logits = teacher_cls[level.teacher_stride]
            if self.classes is not None:
                logits = self.classes.teacher(logits, dim=1)
            m_NHW = richness(logits)
            terms.append(self.loss(s, t, m_NHW))
            if self.loss.cls_weight:
                ours = student_cls[level.student_stride]
                if self.classes is not None:
                    ours = self.classes.student(ours, dim=1)
                terms.append(self.loss.scores(ours, logits, m_NHW))
        return torch.stack(terms).sum()


def richness(logits_NAQHW: Tensor) -> Tensor:
    """(N, H, W) float32 or float64: the highest score of each cell (m in the module's equation)."""
    highest_NHW = logits_NAQHW.detach().amax(dim=1)
    return highest_NHW.to(torch.promote_types(highest_NHW.dtype, torch.float32)).sigmoid()


def _weighted(values_NHW: Tensor, weights_NHW: Tensor) -> Tensor:
    return (values_NHW * weights_NHW).sum() / avg_factor(weights_NHW.sum(), least=1e-12)
