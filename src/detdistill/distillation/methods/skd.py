"""SKD: structural similarity (SSIM) of feature maps (de Rijk et al., NeurIPS 2022).

L = alpha · mean over N, C, H, W of (1 - SSIM(x, y)) / 2, where x and y are the student's and the teacher's map
of a level, each brought to [0, 1] by the minimum and maximum of the whole tensor, and in each channel

    SSIM = (2 μ_x μ_y + C₁)(2 σ_xy + C₂) / ((μ_x² + μ_y² + C₁)(σ_x² + σ_y² + C₂)),  C₁ = 0.01², C₂ = 0.03²,

with means, variances and covariance under a Gaussian window of 11×11 cells and standard deviation 1.5.
Reduction: "mean"; levels are summed.

There is no official code. The paper is said to use the SSIM of the library kornia, which mirrors the map at its
border so that every cell counts; this does the same. On a map of fewer than 11 rows or columns the window
shrinks to the largest odd size that fits, so that small levels work too. The paper's weight is 2 or 4 depending
on the detector, we do not know which; the default is 4.

Shape legend: N images, C channels, H W rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detdistill.distillation.adapters import LevelAligner
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.recipe.methods import SKDOptions

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
EPS = 1e-6  # added to the range: a constant map becomes 0
PART = 2**23  # values of a level that are compared at once: two images at stride 8 of 800×1088 and 256 channels


class SKDLoss(nn.Module):
    """alpha · mean over N, C, H, W of (1 - SSIM) / 2 of the maps brought to [0, 1].

    Reduction: "mean".

    Args:
        alpha: factor on the loss, the paper's λ.
    """

    def __init__(self, *, alpha: float = 4.0) -> None:
        super().__init__()
        self.alpha = alpha

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        """Both (N, C, H, W); the teacher is detached. Returns a scalar."""
        x, y = unit_range(student_NCHW), unit_range(teacher_NCHW.detach())
        return self.alpha * (1 - _MeanSSIM.apply(x, y)) / 2


def unit_range(x: Tensor) -> Tensor:
    """(x - min) / (max - min) of the whole tensor."""
    low, high = x.amin(), x.amax()
    return (x - low) / (high - low + EPS)


def ssim(x_NCHW: Tensor, y_NCHW: Tensor) -> Tensor:
    """Structural similarity at every cell of every channel, (N, C, H, W), for values in [0, 1]."""
    mean_x, mean_y = blur(x_NCHW), blur(y_NCHW)
    mean_squares, mean_product = mean_x.square() + mean_y.square(), mean_x * mean_y
    variances = blur(x_NCHW.square() + y_NCHW.square()) - mean_squares  # only their sum is asked for
    covariance = blur(x_NCHW * y_NCHW) - mean_product
    return (2 * mean_product + C1) * (2 * covariance + C2) / ((mean_squares + C1) * (variances + C2))


class _MeanSSIM(torch.autograd.Function):
    """The mean of :func:`ssim`, its gradient to x taken at once and a few images at a time.

    A graph over the whole batch would hold a dozen maps for every map.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        images = max(1, PART // x[0].numel())
        parts, gradients = [], []
        for x_part, y_part in zip(x.split(images), y.split(images), strict=True):
            with torch.enable_grad():
                x_part = x_part.detach().requires_grad_()
                part = ssim(x_part, y_part).sum() / x.numel()
            gradients.append(torch.autograd.grad(part, x_part)[0])
            parts.append(part.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(parts).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_mean, None


def blur(x_NCHW: Tensor) -> Tensor:
    """The mean under the window at every cell, rows and columns one after the other."""
    channels, height, width = x_NCHW.shape[1:]
    column, row = (_window(side, x_NCHW) for side in (height, width))
    pad_y, pad_x = len(column) // 2, len(row) // 2
    padded = F.pad(x_NCHW.contiguous(), (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    # Channel by channel: contiguous float32 maps then run in full precision on CUDA, where other convolutions
    # round to TF32, and the variances above are small differences.
    padded = F.conv2d(padded, column.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(padded, row.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)


def _window(side: int, like: Tensor) -> Tensor:
    """A Gaussian of sum 1 over 11 cells, or over the largest odd number of cells that fits the side."""
    size = min(WINDOW, side - 1 + side % 2)
    distance = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    return torch.softmax(-distance.square() / (2 * SIGMA**2), dim=0)


class SKD(Method):
    """Sum of :class:`SKDLoss` over the matched levels."""

    def __init__(self, context: PairContext, options: SKDOptions) -> None:
        super().__init__()
        self.align = LevelAligner(context.matching, options.adapt)
        self.loss = SKDLoss(alpha=options.alpha)

    def forward(self, step: StepOutputs) -> Tensor:
        terms = [self.loss(s, t) for _, s, t in self.align(step)]
        return torch.stack(terms).sum()
