"""COFD: maps before the ReLU with a margin ReLU and a partial distance (Heo et al., ICCV 2019, "overhaul").

For each level t = max(T, m) with a margin m < 0 for each channel, and with s = BN(conv1×1(S)),

    L = alpha · sum over levels l = 1…L, finest first, of 2^-(L-l) · sum of 1[s > t or t > 0] (s - t)² / N.

A negative answer of the teacher is only a ceiling: a student that is already below it learns nothing there.
m is the mean of what is negative, E[x | x < 0]: in closed form where a BatchNorm feeds the map
(``Detector.pyramid_norms``), else measured on the teacher's maps as training goes. Reduction: "sum/N", which
grows with the area of the maps.

Paper and published code agree on this; the weight is the code's: 1/10000 for ImageNet (the default), 1/1000
for CIFAR (preset "cifar"). The code taps the ends of the backbone's stages before their ReLU; here it is the
pyramid's levels, which no ReLU follows. Connectors stand on every level, as published, even between equal
numbers of channels.

Of segmenters the code taps six maps of DeepLabV3+ with weight 1e-5 and dividers 8, 4, 2, 1 (the backbone's
stages), 1 (after ASPP) and 16 (before the classifier); here there is the last of them alone, with 1e-5 / 16
(preset "segmentation"). Ours is taken behind its ReLU, where no answer is negative and the margin is 0.

Shape legend: N images, C channels, H W rows and columns, L levels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from detdistill.distillation.adapters import LevelAligner
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.recipe.methods import COFDOptions

MOMENTUM = 0.1  # of the measured margin, as of a BatchNorm's statistics
RARELY_NEGATIVE = 0.001  # a channel negative less often than this gets three standard deviations as its margin


class COFDLoss(nn.Module):
    """alpha · sum over N, C, H, W of 1[s > t or t > 0] (s - t)² / N, with t = max(teacher, margin).

    Reduction: "sum/N".

    Args:
        alpha: factor on the loss.
    """

    def __init__(self, *, alpha: float = 1e-4) -> None:
        super().__init__()
        self.alpha = alpha

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor, margin_C: Tensor) -> Tensor:
        """Both maps (N, C, H, W), the margins (C,) not above 0; the teacher is detached. Returns a scalar."""
        target = teacher_NCHW.detach().maximum(margin_C[:, None, None].to(teacher_NCHW.dtype))
        counts = (student_NCHW > target) | (target > 0)
        difference = torch.where(counts, student_NCHW - target, 0)
        return self.alpha * difference.square().sum() / student_NCHW.shape[0]


class Connector(nn.Module):
    """1×1 convolution without bias and BatchNorm: the student's map in the teacher's channels."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm2d(teacher_channels)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW, norm = self.conv(x_NCHW), self.norm
        if x_NCHW.shape[0] * x_NCHW.shape[2] * x_NCHW.shape[3] > 1:
            return norm(x_NCHW)
        # one image whose map is one cell has no variance: a BatchNorm in training refuses it
        return F.batch_norm(x_NCHW, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class Margin(nn.Module):
    """E[x | x < 0] of each channel of the teacher's map: known from a BatchNorm, or measured while training.

    A measured margin is the first batch's, and from then on a running mean; a channel without negative values
    keeps what it has, at first 0.
    """

    margin: Tensor
    seen: Tensor

    def __init__(self, channels: int, norm: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        self.known = norm is not None
        margin = torch.zeros(channels) if norm is None else batch_norm_margin(norm.weight, norm.bias)
        self.register_buffer("margin", margin)
        self.register_buffer("seen", torch.zeros(channels, dtype=torch.bool))

    @torch.no_grad()
    def forward(self, teacher_NCHW: Tensor) -> Tensor:
        """The margins (C,), in training with this batch counted in."""
        if self.training and not self.known:
            negative = teacher_NCHW.to(self.margin.dtype).clamp(max=0)
            sums_2C = torch.stack([negative.sum((0, 2, 3)), (negative < 0).sum((0, 2, 3)).to(negative.dtype)])
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(sums_2C)
            total, count = sums_2C
            mean = total / count.clamp(min=1)
            step = torch.where(self.seen, MOMENTUM, 1.0) * (count > 0)
            self.margin.lerp_(mean, step)
            self.seen.logical_or_(count > 0)
        return self.margin


def batch_norm_margin(weight_C: Tensor, bias_C: Tensor) -> Tensor:
    """E[x | x < 0] of x ~ N(bias, weight²), a BatchNorm's output; -3·|weight| where hardly any x is."""
    mean, std = bias_C.detach().double(), weight_C.detach().double().abs().clamp(min=1e-12)
    density = torch.exp(-((mean / std) ** 2) / 2) / math.sqrt(2 * math.pi)
    negative = torch.special.ndtr(-mean / std)
    usual = mean - std * density / negative.clamp(min=RARELY_NEGATIVE)
    return torch.where(negative > RARELY_NEGATIVE, usual, -3 * std).to(weight_C.dtype)


class COFD(Method):
    """Sum of :class:`COFDLoss` over the matched levels, each level counting twice the next finer one."""

    def __init__(self, context: PairContext, options: COFDOptions) -> None:
        super().__init__()
        self.align = LevelAligner(context.matching, options.adapt, adapter=Connector)
        norms = context.teacher.pyramid_norms
        self.margins = nn.ModuleDict(
            {
                str(level.student_stride): Margin(level.teacher_channels, norms.get(level.teacher_stride))
                for level in context.matching.levels
            }
        )
        self.loss = COFDLoss(alpha=options.alpha)

    def forward(self, step_outputs: StepOutputs) -> Tensor:
        total = torch.zeros((), device=step_outputs.student_batch.images_N3HW.device)
        for level, student, teacher in self.align(step_outputs):
            margin_C = self.margins[str(level.student_stride)](teacher)
            total = total / 2 + self.loss(student, teacher, margin_C)
        return total
