"""Losses run in float32 under autocast: variances, norms and softmaxes over a map round badly otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
Self = TypeVar("Self")


def in_full_precision(
    forward: Callable[Concatenate[Self, Tensor, P], Tensor],
) -> Callable[Concatenate[Self, Tensor, P], Tensor]:
    """Decorates a loss's ``forward``: autocast is off within, and half-precision tensors come in as float32.

    Tensors in lists are lifted too; float32 and float64 stay as they are.
    """

    @wraps(forward)
    def lifted(self: Self, first: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            rest: Any = [_lift(value) for value in args]
            named: Any = {name: _lift(value) for name, value in kwargs.items()}
            return forward(self, _lift(first), *rest, **named)

    return lifted


def _lift(value: Any) -> Any:
    if isinstance(value, list):
        return [_lift(item) for item in value]
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
