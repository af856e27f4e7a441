"""One seed from several numbers: all that is random here is a function of such a seed, without other state."""

from __future__ import annotations

import numpy as np


def mix_seed(*numbers: int) -> int:
    """A 63-bit seed that is unrelated for neighboring numbers; the same on every machine and Python.

    Args:
        numbers: not negative: seed, epoch, step, process, … Zeros at the end add nothing.
    """
    high, low = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return int(high) << 31 | int(low) >> 1
