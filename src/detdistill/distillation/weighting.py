"""How much a distillation term counts at a moment of the run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from detdistill.models.base import Kind, Pyramid
from detdistill.recipe import MethodConfig

AUTO_EVERY = 50  # steps between measurements: each costs one more backward pass through the head
AUTO_STEP = 0.5  # of the way, in logarithms, to what the newest measurement asks for
RATIO, QUERIES_RATIO = 10.0, 0.3  # of the method's gradient to the task's, where a recipe gives none
FP16_SCALE = 4096.0  # lifts small gradients over the smallest half-precision number; cancels in the ratio


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that may rise at the start and fall at the end.

    Args:
        value: the full weight.
        warmup: fraction of the run over which it rises linearly from 0.
        decay_from: fraction of the run from which it falls linearly to 0; None: it stays.
    """

    value: float = 1.0
    warmup: float = 0.0
    decay_from: float | None = None

    def at(self, progress: float) -> float:
        """The weight when ``progress`` (0 to 1) of the run is done."""
        rise = min(1.0, progress / self.warmup) if self.warmup else 1.0
        fall = 1.0
        if self.decay_from is not None and progress > self.decay_from:
            fall = max(0.0, (1.0 - progress) / (1.0 - self.decay_from))
        return self.value * rise * fall


def build_weight(config: MethodConfig, kind: Kind | None) -> tuple[Weight, AutoWeight | None]:
    """The weight of a method over the run, and the factor of ``weight: auto``, for a student of this kind.

    Query-based students are trained by AdamW with a gradient norm clipped to 0.1. Both make the step
    independent of the gradient's scale, so a method whose gradient is many times the task's replaces the task
    instead of adding to it. Their default is therefore ``auto`` at the ratio 0.3; that of others is 1.
    """
    of_queries = kind == "queries"
    value = config.weight
    if value is None:
        value = "auto" if of_queries else 1.0
    if value != "auto":
        return Weight(value, config.warmup, config.decay_from), None
    ratio = config.ratio or (QUERIES_RATIO if of_queries else RATIO)
    return Weight(1.0, config.warmup, config.decay_from), AutoWeight(ratio)


class AutoWeight(nn.Module):
    """A factor that keeps a term's gradient at a chosen ratio to the task's, both at the student's pyramid.

    With g(L) = ‖∂L/∂pyramid‖₂ over all levels and images, the factor aims at ratio · g(task) / g(term). It is
    measured at the run's first step, before it is used, and then every AUTO_EVERY steps, each time going
    AUTO_STEP of the way in logarithms. A scale of the term, such as its loss weight, cancels exactly.

    The factor is in the pair's state dict, so that a resumed run goes on with it.
    """

    log_factor: Tensor
    measured: Tensor

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.register_buffer("log_factor", torch.zeros((), dtype=torch.float32))
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))

    @property
    def factor(self) -> Tensor:
        return self.log_factor.exp()

    @torch.no_grad()
    def update(self, task_norm: Tensor, term_norm: Tensor) -> None:
        """Take a measurement of both gradients' norms; one that is 0 or not finite is passed over.

        No host synchronization.
        """
        wanted = torch.log(self.ratio * task_norm / term_norm)
        usable = wanted.isfinite()
        step = torch.where(self.measured, AUTO_STEP, 1.0)
        self.log_factor.copy_(torch.where(usable, self.log_factor.lerp(wanted, step), self.log_factor))
        self.measured.logical_or_(usable)


def gradient_norm(loss: Tensor, pyramid: Pyramid) -> Tensor:
    """‖∂loss/∂pyramid‖₂, a float32 scalar; the mean square over the processes, where there are several.

    The graph is kept, and no parameter's ``.grad`` is touched.
    """
    maps = list(pyramid.values())
    scale = FP16_SCALE if any(x.dtype == torch.float16 for x in maps) else 1.0
    gradients = torch.autograd.grad(loss * scale, maps, retain_graph=True, allow_unused=True)
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    total = torch.stack(squares).sum() if squares else loss.new_zeros((), dtype=torch.float32)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        total = total / distributed.get_world_size()
    return total.sqrt() / scale
