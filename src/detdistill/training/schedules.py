"""The learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from detdistill.recipe import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, total: int) -> float:
    """What the base rate is multiplied by at ``step`` (0-based) of ``total``.

    The paper trains 24 epochs with the rate divided by 10 after 16 and 22 ("2x"): the default milestones.
    "poly" is semantic segmentation's, (1 - step / total)^0.9 (DeepLab, Chen et al. 2017).
    """
    warmup = min(config.warmup, total // 10)
    factor = 1.0
    if step < warmup:
        factor = config.warmup_factor + (1 - config.warmup_factor) * step / warmup
    if config.name == "step":
        return factor * config.gamma ** sum(step >= milestone * total for milestone in config.milestones)
    if config.name == "constant" or step < warmup:
        return factor
    progress = (step - warmup) / max(1, total - warmup)
    if config.name == "poly":
        fallen = (1 - progress) ** config.power
    else:
        fallen = (1 + math.cos(math.pi * progress)) / 2
    return config.final_factor + (1 - config.final_factor) * fallen
