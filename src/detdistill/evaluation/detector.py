"""Evaluate a detector on a split: the one way in which teacher, baseline and student are measured."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from detdistill.config import UserError
from detdistill.data.loading import DetectionDataset, make_loader
from detdistill.data.masks import encode_masks
from detdistill.data.records import Split
from detdistill.evaluation.coco import CocoResult, coco_ap
from detdistill.models.base import Detections, Detector, eval_mode


@dataclass(frozen=True)
class Evaluation:
    """What a detector found on a split, and how good that is.

    Attributes:
        coco: the 12 COCO numbers and AP by class.
        detections: one for each of ``split.records``, in that order, on the CPU; labels are indices into
            ``split.classes``. Their masks are in ``masks``.
        split: what was evaluated (fewer records than were given, where ``limit`` was).
        seconds: wall clock of loading, preprocessing and detecting, without the AP.
        images_per_second: over all processes.
        coco_masks: the 12 numbers of the overlap of masks, where both the detector and the split have masks.
        masks: then, for each of ``detections``, its masks as COCO run lengths.
    """

    coco: CocoResult
    detections: list[Detections]
    split: Split
    seconds: float
    images_per_second: float
    coco_masks: CocoResult | None = None
    masks: list[list[dict[str, Any]]] | None = None

    def numbers(self) -> dict[str, float]:
        """The 12 COCO numbers by name and, where there are masks, those of the masks as ``mask_AP``, …"""
        masks = {} if self.coco_masks is None else self.coco_masks.as_dict()
        return {**self.coco.as_dict(), **{f"mask_{name}": value for name, value in masks.items()}}


def evaluate_detector(
    model: Detector,
    split: Split,
    *,
    batch_size: int = 16,
    workers: int = 0,
    device: torch.device | str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Detect on every image, without augmentation, and compute COCO AP, of boxes and of masks.

    The model's own ``preprocess`` decides its input. Every module gets back the mode (train or eval) that it
    had. Under ``torch.distributed`` the images are shared out over the ranks, every rank must call this, and
    every rank returns the same AP and detections.

    Args:
        model: classes are matched with those of the split by name.
        batch_size: images in a batch, on each process.
        workers: loading processes.
        device: where the model is moved to; by default it stays where it is.
        precision: ``bf16`` runs under autocast.
        limit: evaluate only so many images, evenly spread over the split.
        progress: called after each batch with (images done, images in all), of this process.

    Raises:
        UserError: an empty split, or no class in common.
    """
    if not split.records:
        raise UserError(f"{split.source}: split {split.name!r} has no images to evaluate on; check its file")
    if limit is not None and limit < len(split):
        if limit < 1:
            raise UserError(f"limit is {limit}; evaluate at least 1 image")
        split = replace(split, records=[split.records[i * len(split) // limit] for i in range(limit)])
    with_masks = model.needs_masks and split.has_masks
    label_map = _match_classes(model.classes, split)
    model = model if device is None else model.to(device)
    rank, ranks = _rank()

    start = time.perf_counter()
    shard = replace(split, records=split.records[rank::ranks])
    found = _detect(model, shard, batch_size, workers, precision, with_masks, progress)
    found = _gather([_relabel(detection, label_map) for detection in found])
    seconds = time.perf_counter() - start
    coco_masks = coco_ap(split, found, "segm") if with_masks else None
    masks = [one.pop("masks") for one in found] if with_masks else None
    speed = len(split) / seconds
    return Evaluation(coco_ap(split, found), found, split, seconds, speed, coco_masks, masks)


def _detect(
    model: Detector,
    split: Split,
    batch_size: int,
    workers: int,
    precision: str,
    with_masks: bool,
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Detections of every image; masks as run lengths, a thousandth of their pixels' memory, or left out."""
    found: list[Detections] = []
    masks: list[list[dict[str, Any]]] = []
    device = next(model.parameters(), torch.empty(0)).device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    if not split.records:  # more processes than images
        return found
    with eval_mode(model), torch.inference_mode(), autocast:
        for images, _ in make_loader(DetectionDataset(split, None), batch_size, workers):
            batch = model.preprocess([image.to(device, non_blocking=True) for image in images])
            detections = model.decode(model.predict(model.pyramid(batch), batch), batch)
            for one in detections:
                if with_masks:
                    masks.append(encode_masks((one["masks"].squeeze(1) > 0.5).cpu().numpy()))
                found.append({name: value.cpu() for name, value in one.items() if name != "masks"})
            if progress is not None:
                progress(len(found), len(split))
    # Copies made outside inference mode can be used anywhere, in autograd too.
    copies: list[dict[str, Any]] = [{name: value.clone() for name, value in one.items()} for one in found]
    return [{**one, "masks": own} for one, own in zip(copies, masks, strict=True)] if with_masks else copies


def _match_classes(classes: Sequence[str], split: Split) -> Tensor | None:
    """The split's label of each class of the model (-1: not in the split), or None where all are equal."""
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
        warnings.warn(f"the model does not know {_some(missing)}; their AP is 0", stacklevel=3)
    return torch.tensor(label_map)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)} classes)" if len(names) > 3 else "")


def _relabel(detections: dict[str, Any], label_map: Tensor | None) -> dict[str, Any]:
    if label_map is None:
        return detections
    labels = label_map[detections["labels"]]
    kept = labels >= 0
    return {
        name: value[kept] if isinstance(value, Tensor) else list(compress(value, kept.tolist()))
        for name, value in {**detections, "labels": labels}.items()
    }


def _rank() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _gather(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every rank's detections in the order of the split, of which rank r took images r, r + ranks, …"""
    _, ranks = _rank()
    if ranks == 1:
        return found
    shards: list[list[dict[str, Any]]] = [[] for _ in range(ranks)]
    distributed.all_gather_object(shards, found)
    total = sum(len(shard) for shard in shards)
    return [shards[i % ranks][i // ranks] for i in range(total)]
