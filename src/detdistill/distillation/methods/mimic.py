"""Plain feature imitation: the paper's Eq. 1, the baseline that every feature method must beat.

FitNets (Romero et al., ICLR 2015) with a mean squared error on every pyramid level.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.adapters import LevelAligner
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.recipe.methods import MimicOptions


class MimicLoss(nn.Module):
    """mean over N, C, H, W of (student - teacher)² (paper Eq. 1 with D_f the squared error).

    Reduction: "mean". Computed in float32 whatever the autocast.

    Args:
        alpha: factor on the loss.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        """Both (N, C, H, W); the teacher is detached. Returns a scalar."""
        return self.alpha * F.mse_loss(student_NCHW, teacher_NCHW.detach())


class Mimic(Method):
    """Sum of :class:`MimicLoss` over the matched levels."""

    def __init__(self, context: PairContext, options: MimicOptions) -> None:
        super().__init__()
        self.align = LevelAligner(context.matching, options.adapt)
        self.loss = MimicLoss(alpha=options.alpha)

    def forward(self, step: StepOutputs) -> Tensor:
        terms = [self.loss(s, t) for _, s, t in self.align(step)]
        return torch.stack(terms).sum()
