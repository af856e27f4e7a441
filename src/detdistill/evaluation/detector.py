"""Evaluate a detector on a split: the one way in which teacher, baseline and student are measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, distributed

from detdistill.data.masks import encode_masks
from detdistill.data.records import Split
from detdistill.evaluation.coco import CocoResult, coco_ap
from detdistill.evaluation.measure import (
    Evaluation,
    Precision,
    Progress,
    chosen_images,
    look_at,
    match_classes,
    own_share,
    rank_of,
)
from detdistill.models.base import Detections, Detector, Target


@dataclass(frozen=True, kw_only=True)
class DetectionEvaluation(Evaluation):
    """What a detector found on a split, and how good that is.

    Attributes:
        coco: the 12 COCO numbers and AP by class.
        detections: one for each of ``split.records``, in that order, on the CPU; labels are indices into
            ``split.classes``. Their masks are in ``masks``.
        coco_masks: the 12 numbers of the overlap of masks, where both the detector and the split have masks.
        masks: then, for each of ``detections``, its masks as COCO run lengths.
    """

    main = "AP"
    headline = ("AP", "AP50", "mask_AP")
    coco: CocoResult
    detections: list[Detections]
    coco_masks: CocoResult | None = None
    masks: list[list[dict[str, Any]]] | None = None

    def numbers(self) -> dict[str, float]:
        """The 12 COCO numbers by name and, where there are masks, those of the masks as ``mask_AP``, …"""
        masks = {} if self.coco_masks is None else self.coco_masks.as_dict()
        return {**self.coco.as_dict(), **{f"mask_{name}": value for name, value in masks.items()}}

    @property
    def per_class(self) -> dict[str, float]:
        return self.coco.per_class


def evaluate_detector(
    model: Detector,
    split: Split,
    *,
    batch_size: int = 16,
    workers: int = 0,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    limit: int | None = None,
    progress: Progress | None = None,
) -> DetectionEvaluation:
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
    split = chosen_images(model, split, limit)
    with_masks = model.needs_masks and split.has_masks
    label_map = match_classes(model.classes, split, "AP")
    model = model if device is None else model.to(device)
    start = time.perf_counter()
    found = _detect(model, own_share(split), batch_size, workers, precision, with_masks, progress)
    found = _gather([_relabel(detection, label_map) for detection in found])
    seconds = time.perf_counter() - start
    coco_masks = coco_ap(split, found, "segm") if with_masks else None
    masks = [one.pop("masks") for one in found] if with_masks else None
    return DetectionEvaluation(
        coco=coco_ap(split, found),
        detections=found,
        split=split,
        seconds=seconds,
        images_per_second=len(split) / seconds,
        coco_masks=coco_masks,
        masks=masks,
    )


def _detect(
    model: Detector,
    split: Split,
    batch_size: int,
    workers: int,
    precision: Precision,
    with_masks: bool,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Detections of every image; masks as run lengths, a thousandth of their pixels' memory, or left out."""
    found: list[Detections] = []
    masks: list[list[dict[str, Any]]] = []

    def take(detections: list[Detections], targets: list[Target]) -> None:
        for one in detections:
            if with_masks:
                masks.append(encode_masks((one["masks"].squeeze(1) > 0.5).cpu().numpy()))
            found.append({name: value.cpu() for name, value in one.items() if name != "masks"})

    look_at(model, split, take, batch_size=batch_size, workers=workers, precision=precision, progress=progress)
    # Copies made outside inference mode can be used anywhere, in autograd too.
    copies: list[dict[str, Any]] = [{name: value.clone() for name, value in one.items()} for one in found]
    return [{**one, "masks": own} for one, own in zip(copies, masks, strict=True)] if with_masks else copies


def _relabel(detections: dict[str, Any], label_map: Tensor | None) -> dict[str, Any]:
    if label_map is None:
        return detections
    labels = label_map[detections["labels"]]
    kept = labels >= 0
    return {
        name: value[kept] if isinstance(value, Tensor) else list(compress(value, kept.tolist()))
        for name, value in {**detections, "labels": labels}.items()
    }


def _gather(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every rank's detections in the order of the split, of which rank r took images r, r + ranks, …"""
    _, ranks = rank_of()
    if ranks == 1:
        return found
    shards: list[list[dict[str, Any]]] = [[] for _ in range(ranks)]
    distributed.all_gather_object(shards, found)
    total = sum(len(shard) for shard in shards)
    return [shards[i % ranks][i // ranks] for i in range(total)]
