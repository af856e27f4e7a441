"""Evaluate a segmenter on a split: mean intersection over union, and how many pixels are right.

All numbers come from one confusion matrix over all labeled pixels of all images; a pixel whose label is 255
counts nowhere. They are those of Cityscapes, Pascal VOC and ADE20K: IoU of a class = TP / (TP + FP + FN), and
mIoU its mean over the classes.

Shape legend: Q classes of the split, H W rows and columns.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from detdistill.data.records import Split
from detdistill.evaluation.measure import (
    Evaluation,
    Precision,
    Progress,
    chosen_images,
    device_of,
    look_at,
    match_classes,
    own_share,
    rank_of,
)
from detdistill.models.base import Detections, Segmenter, Target

SAMPLES = 8  # label maps that are kept, to be drawn


@dataclass(frozen=True, kw_only=True)
class SegmentationEvaluation(Evaluation):
    """What a segmenter made of a split, and how good that is.

    Attributes:
        confusion: (Q, Q + 1) int64 on the CPU: pixels by their true class and the class they were given; the
            last column are those that were given a class which the split does not have.
        label_maps: (H, W) uint8 of some images, evenly spread, by their place in ``split.records``; 255 where
            the split does not have the class.
        image_accuracies: (N,) of each record the share of its labeled pixels that got their class; NaN where
            none has a label.
    """

    main = "mIoU"
    headline = ("mIoU", "pixel_accuracy")
    confusion: Tensor
    label_maps: dict[int, Tensor]
    image_accuracies: Tensor

    def numbers(self) -> dict[str, float]:
        """``mIoU``; ``pixel_accuracy``, the share of pixels that are right; ``mean_accuracy``, by class first.

        Means are over the classes that have a pixel, in the truth or (mIoU) in the answers.
        """
        right_Q = self.confusion.diagonal().double()
        true_Q = self.confusion.sum(dim=1).double()
        return {
            "mIoU": _mean(_iou(self.confusion)),
            "pixel_accuracy": float(right_Q.sum() / true_Q.sum()),
            "mean_accuracy": _mean(right_Q / true_Q),
        }

    @property
    def per_class(self) -> dict[str, float]:
        """IoU by class; NaN where neither the truth nor the answers have a pixel of it."""
        return dict(zip(self.split.classes, _iou(self.confusion).tolist(), strict=True))

    def warnings(self) -> list[str]:
        """Classes of which the label maps have no pixel: the means say nothing about them."""
        true_Q = self.confusion.sum(dim=1).tolist()
        absent = [name for name, pixels in zip(self.split.classes, true_Q, strict=True) if pixels == 0]
        if not absent:
            return []
        return [f"warning: {self.split.name} has no pixel of {', '.join(absent)}: mIoU does not measure them"]


def _iou(confusion: Tensor) -> Tensor:
    right_Q = confusion.diagonal().double()
    return right_Q / (confusion.sum(dim=1) + confusion[:, :-1].sum(dim=0) - right_Q)


def _mean(values_Q: Tensor) -> float:
    return float(values_Q.nanmean()) if values_Q.isfinite().any() else math.nan


def evaluate_segmenter(
    model: Segmenter,
    split: Split,
    *,
    batch_size: int = 16,
    workers: int = 0,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    limit: int | None = None,
    progress: Progress | None = None,
    keep: int = SAMPLES,
) -> SegmentationEvaluation:
    """Give every pixel of every image a class, without augmentation, and compare with the label maps.

    At the labels' own size, whatever the model's input is. Under ``torch.distributed`` the images are shared
    out over the ranks, every rank must call this, and every rank returns the same numbers.

    Args:
        model: classes are matched with those of the split by name.
        batch_size, workers, device, precision, limit, progress: as of
            :func:`~detdistill.evaluation.detector.evaluate_detector`.
        keep: of so many images, evenly spread, the answer is kept.

    Raises:
        UserError: an empty split, or no class in common.
    """
    split = chosen_images(model, split, limit)
    label_map = match_classes(model.classes, split, "IoU")
    model = model if device is None else model.to(device)
    device, count = device_of(model), len(split.classes)
    total = torch.zeros(count, count + 1, dtype=torch.int64, device=device)
    drawn = {i * len(split) // keep for i in range(keep)}
    kept: dict[int, Tensor] = {}
    accuracies: dict[int, Tensor] = {}
    rank, ranks = rank_of()
    place = rank

    def take(answers: list[Detections], targets: list[Target]) -> None:
        nonlocal place
        for answer, target in zip(answers, targets, strict=True):
            given_HW = answer["semantic"]
            if label_map is not None:
                given_HW = label_map.to(given_HW.device)[given_HW]
            own = confusion_of(target["semantic"].to(device), given_HW, count)
            total.add_(own)
            accuracies[place] = own.diagonal().sum() / own.sum()
            if place in drawn:
                kept[place] = given_HW.to(torch.uint8).cpu()
            place += ranks

    start = time.perf_counter()
    look_at(
        model, own_share(split), take, batch_size=batch_size, workers=workers, precision=precision,
        progress=progress,
    )  # fmt: skip
    if ranks > 1:
        distributed.all_reduce(total)
        kept = _gathered(kept)
        accuracies = _gathered({place: value.cpu() for place, value in accuracies.items()})
    confusion = total.cpu()
    seconds = time.perf_counter() - start
    return SegmentationEvaluation(
        confusion=confusion,
        label_maps=dict(sorted(kept.items())),
        image_accuracies=torch.stack([accuracies[place] for place in range(len(split))]).cpu(),
        split=split,
        seconds=seconds,
        images_per_second=len(split) / seconds,
    )


def _gathered(of_places: dict[int, Tensor]) -> dict[int, Tensor]:
    """What all processes have found; each has other places."""
    shares: list[dict[int, Tensor]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(shares, of_places)
    return {place: value for share in shares for place, value in share.items()}


def confusion_of(true_HW: Tensor, given_HW: Tensor, classes: int) -> Tensor:
    """(Q, Q + 1) int64: pixels by true and by given class; any given class that is not in 0…Q-1 is the last.

    Pixels whose true class is not in 0…Q-1 (255 is ignored) do not count. The host does not wait.
    """
    true, given = (
        torch.where((labels >= 0) & (labels < classes), labels.long(), classes)
        for labels in (true_HW, given_HW)
    )
    pairs = torch.bincount((true * (classes + 1) + given).flatten(), minlength=(classes + 1) ** 2)
    return pairs.reshape(classes + 1, classes + 1)[:classes]
