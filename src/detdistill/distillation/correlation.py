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
        # Centred before anything is squared: E[x²] - E[x]² would lose a small variance beside a large mean.
        s, t = (x - x.mean(dims, keepdim=True) for x in (student, teacher))
        ctx.save_for_backward(s, t)
        ctx.count = student.shape[-2] * student.shape[-1] * (1 if over == "instance" else student.shape[0])
        s_flat, t_flat = s.flatten(2), t.flatten(2)
        sums = [
            torch.linalg.vector_norm(s_flat, dim=-1).square(),
            torch.linalg.vector_norm(t_flat, dim=-1).square(),
            torch.linalg.vecdot(s_flat, t_flat),
        ]
        if over == "batch":
            sums = [x.sum(0, keepdim=True) for x in sums]
        var_s, var_t, covariance = (x / ctx.count for x in sums)
        ctx.mark_non_differentiable(var_t)
        return var_s, var_t, covariance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_var_s: Tensor, of_var_t: Tensor, of_covariance: Tensor
    ) -> tuple[Tensor, None, None]:
        s, t = ctx.saved_tensors
        gradient = s * (2 / ctx.count * of_var_s)[..., None, None]
        return gradient.addcmul_(t, (of_covariance / ctx.count)[..., None, None]), None, None
