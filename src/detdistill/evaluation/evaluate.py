"""Evaluate a saved model on a dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from detdistill.data.loading import usable_splits
from detdistill.data.records import Split
from detdistill.errors import UserError, require_count
from detdistill.evaluation.measure import Evaluation
from detdistill.evaluation.model import evaluate_model
from detdistill.models.base import Detector, Model
from detdistill.models.checkpoints.io import load_model
from detdistill.models.checkpoints.weights import require_usable_weights
from detdistill.recipe import DataConfig, Recipe, load_recipe, parse_recipe

Data = Recipe | DataConfig | Mapping[str, Any] | str | Path


def evaluate(
    model: Model | str | Path,
    data: Data,
    *,
    split: str = "val",
    batch_size: int = 8,
    workers: int = 2,
    device: str = "auto",
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """How good a model is on a split of a dataset.

    Of a detector: what it finds, and its COCO numbers, of boxes and of masks. Of a segmenter: which classes it
    confuses, and its mIoU.

    Args:
        model: a detector or segmenter, a run folder, or a file that detdistill saved.
        data: a dataset's folder, a recipe (object or file) whose data section is taken, such a section, or
            ``digits``.
        split: ``val``, ``train``, or another that the dataset has.
        batch_size: images in a batch.
        workers: processes that read images.
        device: ``auto`` (an accelerator where there is one), ``cpu``, ``cuda:1``, …
        limit: evaluate only so many images, evenly spread over the split.
        progress: called after each batch with (images done, images in all).

    Raises:
        UserError: no such model, data, split or device; the annotations have errors; no class in common.
    """
    require_count("batch_size", batch_size, 1)
    require_count("workers", workers, 0)
    loaded = as_model(model)
    return evaluate_model(
        loaded,
        open_split(data, split, with_masks=loaded.needs_masks),
        batch_size=batch_size,
        workers=workers,
        device=choose_device(device),
        limit=limit,
        progress=progress,
    )


def as_detector(model: Model | str | Path, command: str) -> Detector:
    """As :func:`as_model`, for what makes sense of detections alone.

    Raises:
        UserError: it is a segmenter; the message says what the command is for.
    """
    loaded = as_model(model)
    if not isinstance(loaded, Detector):
        raise UserError(f"{command} is for detectors, and this is for {loaded.task}: take a detector")
    return loaded


def as_model(model: Model | str | Path) -> Model:
    """A model as it is, or loaded from a run folder or file.

    Raises:
        UserError: it is no model, or its weights are not finite.
    """
    if isinstance(model, Model):
        require_usable_weights(model, f"this {type(model.exported).__name__}")
        return model
    if isinstance(model, torch.nn.Module):
        raise UserError(f"a {type(model).__name__} is no detector yet: give detdistill.wrap(model, ...)")
    return load_model(model)


def open_split(data: Data, name: str, with_masks: bool = False) -> Split:
    """One part of a dataset, perhaps with its masks; see :func:`evaluate` for the ways to name it.

    Raises:
        UserError: there is no such part, or its annotations have errors.
    """
    return usable_splits(_data_config(data), [name], with_masks)[name]


def _data_config(data: Data) -> DataConfig:
    if isinstance(data, DataConfig):
        return data
    if isinstance(data, Recipe):
        return data.data
    if isinstance(data, Mapping):
        return parse_recipe({"data": data, "student": {}}, source="the data").data
    if not isinstance(data, str | os.PathLike) or not str(data):
        raise UserError(f"data is {data!r}: give a dataset's folder, a recipe, a data section, or 'digits'")
    path = Path(data)
    if path.suffix in (".yaml", ".yml"):
        return load_recipe(path).data
    if (path / "recipe.yaml").is_file():  # a run folder
        return load_recipe(path / "recipe.yaml").data
    return parse_recipe({"data": str(data), "student": {}}).data


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is an accelerator where there is one.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises one or another
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here ({reason}); try 'auto' or 'cpu'") from None
