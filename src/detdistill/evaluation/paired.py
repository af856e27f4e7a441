"""Paired differences: what an arm of a comparison did to each seed's run, and what may be said of it.

Two runs of one seed share initialization, order of data and augmentation, so that their difference is what the
arm did. The interval is Student's t of those differences; a gain is claimed only where it leaves out 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Paired:
    """An arm against the baseline, seed by seed, in the unit of its numbers.

    Attributes:
        differences: by seed, of the seeds that both have.
        mean: of the differences.
        interval: (low, high) of the mean at LEVEL; None from fewer than two seeds.
    """

    differences: dict[int, float]
    mean: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``no measurable gain``, or that the seeds are too few to tell."""
        if self.interval is None:
            return "one seed: no verdict"
        low, high = self.interval
        if low > 0:
            return "better"
        if high < 0:
            return "worse"
        return "no measurable gain" if len(self.differences) > 2 else "two seeds cannot tell"

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:+.1f}"
        low, high = self.interval
        return f"{self.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """Compare two arms, each a number by seed; None where no seed is in both.

    NaN (nothing was measured) counts as absent. Equal differences in every seed give an interval of width 0.
    """
    differences = {
        seed: arm[seed] - baseline[seed]
        for seed in sorted(arm.keys() & baseline.keys())
        if math.isfinite(arm[seed]) and math.isfinite(baseline[seed])
    }
    if not differences:
        return None
    values = list(differences.values())
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Paired(differences, mean, None)
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, df=len(values) - 1)) * error
    return Paired(differences, mean, (mean - reach, mean + reach))
