"""Filters of maps by frequency (the paper's Eq. 2-3).

Shape legend: N images, C channels, H W rows and columns.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def hermitian(random: Tensor) -> Tensor:
    """Give frequencies k and -k one random number, so that a mask cut from it is conjugate-symmetric.

    Each frequency keeps a uniform number: of a pair, the one that comes first in memory is copied.
    """
    height, width = random.shape[-2:]
    mirrored = random.flip(-2, -1).roll((1, 1), (-2, -1))
    index = torch.arange(height * width, device=random.device).view(height, width)
    return torch.where(index <= index.flip(-2, -1).roll((1, 1), (-2, -1)), random, mirrored)


class SpectralFilter(torch.autograd.Function):
    """The real part of F⁻¹(M ⊙ F(x)), for x (N, C, H, W) and a mask M that broadcasts to it.

    Taking the real part of a real map's filtering is the same as filtering with the mean of M(k) and M(-k):
    half of the spectrum is enough, and the filter is its own adjoint, so that the gradient costs what the value
    does (autograd's own goes through the whole complex spectrum).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor) -> Tensor:
        half = x.shape[-1] // 2 + 1
        both = (keep.float() + keep.flip(-2, -1).roll((1, 1), (-2, -1)))[..., :half] / 2
        ctx.save_for_backward(both)
        return _filter_half(x, both)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        return _filter_half(gradient, both), None


def _filter_half(x: Tensor, both: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x)
    torch.view_as_real(spectrum).mul_(both[..., None])  # a product with a complex mask would take twice as long
    return torch.fft.irfft2(spectrum, s=x.shape[-2:])


@lru_cache(maxsize=64)
def dct_basis(size: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II as a (size, size) matrix: rows are frequencies."""
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * torch.outer(k, k + 0.5)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.to(device, torch.float32)
