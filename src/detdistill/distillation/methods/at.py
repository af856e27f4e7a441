"""AT: where the activation energy lies, channels left out (Zagoruyko & Komodakis, ICLR 2017).

For each level, A(F) = a / ‖a‖₂ over the cells of an image, with a = mean over C of F² ∈ R^{H·W}, and
L = alpha · mean over N, H·W of (A(S) - A(T))². Reduction: "mean"; levels are summed.

The published code averages over the cells, where the paper's Eq. 2 takes a norm; this follows the code. The
vectors have unit length, so that the mean is about 2/(H·W): that is why weights are in the thousands. No
publication gives a weight for detectors; 10000 is that of segmentation (CIRKD's scripts).

Shape legend: N images, C channels (C_s ≠ C_t is fine: nothing is adapted), H W rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.recipe.methods import ATOptions

EPS = 1e-12  # of the norm: a map of zeros attends nowhere


class ATLoss(nn.Module):
    """alpha · mean over N, H·W of (A(S) - A(T))², A the map of mean squares with unit length.

    Reduction: "mean".

    Args:
        alpha: factor on the loss.
    """

    def __init__(self, *, alpha: float = 10000.0) -> None:
        super().__init__()
        self.alpha = alpha

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        """(N, C_s, H, W) and (N, C_t, H, W); the teacher is detached. Returns a scalar."""
        return self.alpha * F.mse_loss(attention(student_NCHW), attention(teacher_NCHW.detach()))


def attention(map_NCHW: Tensor) -> Tensor:
    """(N, H·W): each cell's mean square over the channels, every image of length 1."""
    return F.normalize(map_NCHW.square().mean(dim=1).flatten(1), dim=1, eps=EPS)


class AT(Method):
    """Sum of :class:`ATLoss` over the matched levels; there is nothing to learn beside the student."""

    def __init__(self, context: PairContext, options: ATOptions) -> None:
        super().__init__()
        self.levels = context.matching.levels
        self.loss = ATLoss(alpha=options.alpha)

    def forward(self, step: StepOutputs) -> Tensor:
        terms = []
        for level in self.levels:
            teacher = step.teacher[level.teacher_stride]
            terms.append(self.loss(step.alignment(step.student[level.student_stride], teacher), teacher))
        return torch.stack(terms).sum()
