"""PKD: Pearson correlation of feature maps (Cao et al., NeurIPS 2022).

L = alpha · ½ · mean over N, C, H, W of (ŝ - t̂)², where every channel is standardized over the batch's N·H·W
values: x̂ = (x - mean) / (std + 1e-6), std with n - 1. But for the 1e-6 this is alpha · (1 - r), r the Pearson
correlation of a channel. Reduction: "mean"; levels are summed.

Paper and published code agree; the code's detection settings are the presets: the four finest levels, alpha 10
for one-stage and 6 for two-stage students. There P2-P5 and P3-P6 meet by index; here equal strides do.
Statistics are those of a process's own batch. A channel that is almost constant in the batch amplifies its
noise: that is the formula.

Shape legend: N images, C channels, H W rows and columns, n = N·H·W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detdistill.distillation.adapters import LevelAligner
from detdistill.distillation.correlation import covariances
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.recipe.methods import PKDOptions

EPS = 1e-6  # added to the std
NO_VARIANCE = 1e-30  # below this the square root is taken as constant: its slope at 0 is infinite


class PKDLoss(nn.Module):
    """alpha · ½ · mean over N, C, H, W of (ŝ - t̂)², each channel standardized over N·H·W.

    Reduction: "mean". Computed as ½ (var_s / d_s² + var_t / d_t²) - cov / (d_s·d_t) for each channel, with
    d = std + 1e-6: the same number without a standardized map.

    Args:
        alpha: factor on the loss.
    """

    def __init__(self, *, alpha: float = 10.0) -> None:
        super().__init__()
        self.alpha = alpha

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        """Both (N, C, H, W); the teacher is detached. Returns a scalar."""
        n = student_NCHW.shape[0] * student_NCHW.shape[2] * student_NCHW.shape[3]
        var_s, var_t, covariance = covariances(student_NCHW, teacher_NCHW, over="batch")
        unbiased = n / max(n - 1, 1)  # a single value has variance 0
        d_s, d_t = ((var * unbiased).clamp(min=NO_VARIANCE).sqrt() + EPS for var in (var_s, var_t))
        return self.alpha * ((var_s / d_s**2 + var_t / d_t**2) / 2 - covariance / (d_s * d_t)).mean()


class PKD(Method):
    """Sum of :class:`PKDLoss` over the matched levels."""

    def __init__(self, context: PairContext, options: PKDOptions) -> None:
        super().__init__()
        self.align = LevelAligner(context.matching, options.adapt)
        self.loss = PKDLoss(alpha=options.alpha)

    def forward(self, step: StepOutputs) -> Tensor:
        terms = [self.loss(s, t) for _, s, t in self.align(step)]
        return torch.stack(terms).sum()
