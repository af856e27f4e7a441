"""Variances and covariances of two maps in few passes over memory.

A squared distance between standardised maps is 1 + γ² - 2γr of their correlation r: losses that say so need
three numbers of a channel and no standardised map. Autograd would keep a map for each operation; here the
gradient, an affine function of both maps, is written in one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PART = 2**19  # numbers of a map, taken at a time on a CPU


def covariances(
    student_NCHW: Tensor, teacher_NCHW: Tensor, over: Literal["instance", "batch"] = "instance"
) -> tuple[Tensor, Tensor, Tensor]:
    """Biased variances of student and teacher and their covariance, for each channel.

    Args:
        student_NCHW, teacher_NCHW: of one shape; gradient goes to the student alone.
        over: H·W of each image ("instance": three tensors (N, C)) or N·H·W ("batch": three tensors (1, C)).
    """
    result: tuple[Tensor, Tensor, Tensor] = _Covariances.apply(student_NCHW, teacher_NCHW.detach(), over)
    return result


class _Covariances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, over: str) -> tuple[Tensor, Tensor, Tensor]:
        dims = (2, 3) if over == "instance" else (0, 2, 3)
        n, channels, height, width = student.shape
        ctx.count = height * width * (1 if over == "instance" else n)
        sums, means = student.new_empty(3, n, channels), []
        for part in channel_parts(student):
            # Centred before anything is squared: E[x²] - E[x]² would lose a small variance beside a large mean.
            here = student[:, part], teacher[:, part]
            means.append([x.mean(dims, keepdim=True) for x in here])
            s, t = ((x - mean).flatten(2) for x, mean in zip(here, means[-1], strict=True))
            sums[0, :, part] = torch.linalg.vector_norm(s, dim=-1).square_()
            sums[1, :, part] = torch.linalg.vector_norm(t, dim=-1).square_()
            sums[2, :, part] = torch.linalg.vecdot(s, t)
        mean_s, mean_t = (torch.cat(parts, dim=1) for parts in zip(*means, strict=True))
        ctx.save_for_backward(student, teacher, mean_s, mean_t)
        var_s, var_t, covariance = (sums if over == "instance" else sums.sum(1, keepdim=True)) / ctx.count
        ctx.mark_non_differentiable(var_t)
        return var_s, var_t, covariance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_var_s: Tensor, of_var_t: Tensor, of_covariance: Tensor
    ) -> tuple[Tensor, None, None]:
        student, teacher, mean_s, mean_t = ctx.saved_tensors
        by_s, by_t = ((g / ctx.count)[..., None, None] for g in (2 * of_var_s, of_covariance))
        shift = -(by_s * mean_s + by_t * mean_t)
        gradient = torch.empty_like(student)
        for part in channel_parts(student):
            here = torch.mul(student[:, part], by_s[:, part], out=gradient[:, part])
            here.add_(teacher[:, part] * by_t[:, part]).add_(shift[:, part])  # addcmul is slower here
        return gradient, None, None


def channel_parts(x: Tensor) -> list[slice]:
    """All channels (dimension 1), a few at a time: a CPU then finds in its cache what it has just written."""
    channels = x.shape[1]
    step = channels if x.device.type != "cpu" else max(1, PART * channels // max(1, x.numel()))
    return [slice(start, start + step) for start in range(0, channels, step)]
