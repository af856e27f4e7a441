"""Variances and covariances of two maps in few passes over memory.

A squared distance between standardized maps is 1 + γ² - 2γr of their correlation r: losses that say so need
three numbers of a channel and no standardized map. Autograd would keep a map for each operation; here the
gradient, an affine function of both maps, is written in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        ctx.count = math.prod(student.shape[dim] for dim in dims)
        parts = []
        for s, t, s_work, t_work in channel_parts(student, teacher, work=2):
            # Centered before anything is squared: E[x²] - E[x]² would lose a small variance next to a large
            # mean.
            means = [x.mean(dims, keepdim=True) for x in (s, t)]
            s, t = torch.sub(s, means[0], out=s_work), torch.sub(t, means[1], out=t_work)
            norms = [torch.linalg.vector_norm(x, dim=(2, 3)) for x in (s, t)]
            parts.append((*means, *norms, s.mul_(t).sum((2, 3))))
        mean_s, mean_t, norm_s, norm_t, products = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        sums = torch.stack([norm_s.square(), norm_t.square(), products])
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
        for s, t, factor_s, factor_t, constant, here, work in channel_parts(
            student, teacher, by_s, by_t, shift, gradient, work=1
        ):
            torch.mul(s, factor_s, out=here).add_(torch.mul(t, factor_t, out=work)).add_(constant)
        return gradient, None, None


def channel_parts(*maps: Tensor, work: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Views of some channels (dimension 1) of all maps, then of the next ones.

    As many as leave what is written in a CPU's cache until it is read again; elsewhere all at once.

    Args:
        maps: the first has the full shape; the others need the same channels only.
        work: after the views come so many tensors like the first one's to write to, the same ones each time:
            new memory for each part would cost a CPU as much as the sums themselves.
    """
    first = maps[0]
    parts = -(-first.numel() // PART) if first.device.type == "cpu" else 1
    width = max(1, first.shape[1] // max(1, parts))
    spare = [first.new_empty(len(first), width, *first.shape[2:]) for _ in range(work)]
    for views in zip(*(x.split(width, dim=1) for x in maps), strict=True):
        yield *views, *(x[:, : views[0].shape[1]] for x in spare)
