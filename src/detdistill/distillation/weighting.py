"""How much a distillation term counts at a moment of the run."""

from __future__ import annotations

from dataclasses import dataclass


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
