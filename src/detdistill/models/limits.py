"""What no machine can serve, refused before it is tried: lower bounds of the memory that a recipe needs."""

from __future__ import annotations

import os

import psutil
import torch

from detdistill.config import ModelConfig, Recipe, UserError

_FLOAT = 4  # bytes


def require_memory_for_model(config: ModelConfig) -> None:
    """Refuse widths of which the head's convolutions alone would not fit.

    Raises:
        UserError: with what they would need.
    """
    convolutions = 2 * (config.head_depth if config.head_depth is not None else 2) + 3
    _require(
        _FLOAT * 9 * config.channels**2 * convolutions,
        f"{config.family} with {config.channels:,} channels",
        "lower channels",
    )


def require_memory_for_training(recipe: Recipe) -> None:
    """Refuse inputs of which one forward's images alone would not fit.

    Raises:
        UserError: with what they would need.
    """
    training, size = recipe.training, recipe.student.size
    images = -(-training.batch_size // training.accumulate // int(os.environ.get("WORLD_SIZE", "1")))
    for what, sides in (("", size), (" by training.augment.crop_size", training.augment.crop_size)):
        if sides is not None:
            _require(
                _FLOAT * 3 * images * sides[0] * sides[1],
                f"{images} images at once of {sides[0]:,}×{sides[1]:,}{what}",
                "lower the size or training.batch_size",
            )


def _require(needed: int, what: str, fix: str) -> None:
    there = psutil.virtual_memory().total
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        there = max(there, *(torch.cuda.get_device_properties(i).total_memory for i in devices))
    if needed > there:
        raise UserError(
            f"{what} needs more than {needed / 2**30:,.0f} GiB of memory, and there are {there / 2**30:.0f}: "
            f"{fix}"
        )
