"""What every evaluation has in common: its images, how they are looked at, and what its result says."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, distributed

from detdistill.data.loading import DetectionDataset, make_loader
from detdistill.data.records import Split
from detdistill.errors import UserError
from detdistill.models.base import Detections, Model, Target, eval_mode

Precision = Literal["fp32", "bf16"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """How good a model is on a split.

    Attributes:
        main: the one of its numbers by which runs are compared, and the best of a run is chosen.
        headline: those to tell a person at a glance, where there are any such.
        split: what was evaluated (fewer records than were given, where ``limit`` was).
        seconds: wall clock of loading, preprocessing and answering, without the numbers.
        images_per_second: over all processes.
    """

    main: ClassVar[str]
    headline: ClassVar[tuple[str, ...]]
    split: Split
    seconds: float
    images_per_second: float

    @abstractmethod
    def numbers(self) -> dict[str, float]:
        """All numbers by name, in [0, 1]; NaN where there is nothing to measure."""

    @property
    @abstractmethod
    def per_class(self) -> dict[str, float]:
        """The main number of each class."""

    def warnings(self) -> list[str]:
        """What must be known to read the numbers; a line each."""
        return []


def chosen_images(model: Model, split: Split, limit: int | None) -> Split:
    """The split, or so many of its images, evenly spread.

    Raises:
        UserError: there are none, or they are labeled for another task than the model's.
    """
    if not split.records:
        raise UserError(f"{split.source}: split {split.name!r} has no images to evaluate on; check its file")
    if split.has_label_maps != (model.task == "segmentation"):
        has = "label maps and no boxes" if split.has_label_maps else "no label maps"
        raise UserError(f"{split.source}: has {has}, and the model is for {model.task}: give it other data")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; evaluate at least 1 image")
    return split if limit is None else split.evenly(limit)


def own_share(split: Split) -> Split:
    """The images of this process: of R processes rank r takes images r, r + R, …"""
    rank, ranks = rank_of()
    return replace(split, records=split.records[rank::ranks])


def rank_of() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def look_at(
    model: Model,
    split: Split,
    take: Callable[[list[Detections], list[Target]], None],
    *,
    batch_size: int,
    workers: int,
    precision: Precision,
    progress: Progress | None,
) -> None:
    """Answer for each image without augmentation, in evaluation mode; each module's own mode comes back.

    Args:
        take: called for each batch with the answers, on the model's device, and the targets, on the CPU.
    """
    if not split.records:  # more processes than images
        return
    device = device_of(model)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    done = 0
    with eval_mode(model), torch.inference_mode(), autocast:
        for images, targets in make_loader(DetectionDataset(split, None), batch_size, workers):
            batch = model.preprocess([image.to(device, non_blocking=True) for image in images])
            take(model.predict(batch), targets)
            done += len(images)
            if progress is not None:
                progress(done, len(split))


def device_of(model: Model) -> torch.device:
    """Where the model is; the CPU, if it has no parameters."""
    return next(model.parameters(), torch.empty(0)).device


def match_classes(classes: Sequence[str], split: Split, number: str) -> Tensor | None:
    """The split's label of each class of the model (-1: not in the split), or None where all are equal.

    Args:
        number: what is 0 of classes that the model does not know.

    Raises:
        UserError: no class in common.
    """
    if tuple(classes) == tuple(split.classes):
        return None
    index = {name: label for label, name in enumerate(split.classes)}
    label_map = [index.get(name, -1) for name in classes]
    if max(label_map) < 0:
        raise UserError(
            f"the model knows {_some(classes)} and {split.source} labels {_some(split.classes)}: no class in "
            "common; evaluate on the data that the model was trained for"
        )
    missing = [name for name in split.classes if name not in classes]
    if missing:
        warnings.warn(f"the model does not know {_some(missing)}; their {number} is 0", stacklevel=3)
    return torch.tensor(label_map)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)} classes)" if len(names) > 3 else "")
