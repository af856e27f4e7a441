"""What no machine can serve, refused before it is tried: lower bounds of the memory that a recipe needs."""

from __future__ import annotations

import os

import psutil
import torch

from detdistill.data.records import Split
from detdistill.errors import UserError
from detdistill.models.base import Model
from detdistill.recipe import ModelConfig, Recipe
from detdistill.recipe.models import NetworkConfig

_FLOAT = 4  # bytes


def require_memory_for_model(config: ModelConfig) -> None:
    """Refuse widths of which the head's convolutions alone would not fit.

    Raises:
        UserError: with what they would need.
    """
    if not isinstance(config, NetworkConfig):
        return
    depth = getattr(config, "head_depth", None)
    convolutions = 2 * (2 if depth is None else depth) + 3
    _require(
        _FLOAT * 9 * config.channels**2 * convolutions,
        f"{config.family} with {config.channels:,} channels",
        "lower channels",
    )


def require_memory_for_training(recipe: Recipe, student: Model | None, train: Split) -> None:
    """Refuse inputs of which one forward's images alone would not fit.

    Args:
        student: takes images of its own size, or as they come; None: of the recipe's size.
        train: the training images.

    Raises:
        UserError: with what they would need.
    """
    training, crop = recipe.training, recipe.training.augment.crop_size
    images = -(-training.batch_size // training.accumulate // int(os.environ.get("WORLD_SIZE", "1")))
    largest = int((train.records.heights_N * train.records.widths_N).argmax()) if len(train) else None
    size = recipe.student.size if student is None else student.preprocessor.size
    if size is None and largest is not None:
        size = crop or (int(train.records.heights_N[largest]), int(train.records.widths_N[largest]))
    factor = max(training.augment.multi_scale or (1.0,))
    zoomed = None if size is None else (round(size[0] * factor), round(size[1] * factor))
    for key, sides in (("multi_scale" * (factor != 1), zoomed), ("crop_size", crop)):
        if sides is not None:
            by = f" by training.augment.{key}" * bool(key)
            _require(
                _FLOAT * 3 * images * sides[0] * sides[1],
                f"{images} images at once of {sides[0]:,}×{sides[1]:,}{by}",
                f"lower {f'training.augment.{key}, ' * bool(key)}the size or training.batch_size",
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
