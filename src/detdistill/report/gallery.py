"""Detections and label maps drawn on their images, alone and side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import font_manager
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from detdistill.data.loading import DetectionDataset
from detdistill.data.masks import decode_mask
from detdistill.data.records import UNLABELLED, Split
from detdistill.evaluation.detector import DetectionEvaluation
from detdistill.evaluation.difference import CHANGES, ImageDifference
from detdistill.evaluation.measure import Evaluation
from detdistill.evaluation.segmentation import SegmentationEvaluation
from detdistill.report.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 480  # pixels of a gallery's pictures: smaller images are enlarged, so that a label can be read
SAMPLES = 8
CROWD = 30  # boxes from which their words would hide the image


def draw_detections(
    image_3HW: Tensor,
    detections: Mapping[str, Tensor],
    classes: Sequence[str],
    threshold: float = 0.3,
    shortest: int = 0,
) -> Tensor:
    """Draw masks, where there are any, and boxes with class and score, or a label map.

    A class keeps its colour. Among many boxes class and score are left out.
    Boxes that are empty or not finite are left out.

    Args:
        image_3HW: uint8.
        detections: ``boxes`` (K, 4) xyxy in pixels, ``labels`` (K,), and ``scores`` (K,) of what was found;
            perhaps ``masks`` (K, H, W) or (K, 1, H, W), bool or probabilities. Or ``semantic`` (H, W) alone.
        classes: names by label.
        threshold: least score that is drawn.
        shortest: images whose short side has fewer pixels are enlarged by a whole factor.

    Returns:
        (3, H', W') uint8 on the CPU.
    """
    image = image_3HW.cpu()
    factor = max(1, -(-shortest // min(image.shape[-2:])))
    if factor > 1:
        image = F.interpolate(image[None], scale_factor=factor, mode="nearest")[0]
    if "semantic" in detections:
        labels_HW = detections["semantic"].cpu().repeat_interleave(factor, dim=0)
        return _painted(image, labels_HW.repeat_interleave(factor, dim=1))
    scores = detections.get("scores")
    boxes = detections["boxes"].cpu()
    keep = boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if scores is not None:
        keep &= scores.cpu() >= threshold
    boxes, labels = boxes[keep] * factor, detections["labels"].cpu()[keep].tolist()
    if not labels:
        return image
    names = [classes[label] for label in labels]
    colors = [_color(label) for label in labels]
    if "masks" in detections:
        masks_KHW = _pixels(detections["masks"].cpu()[keep], *image_3HW.shape[-2:])
        masks_KHW = masks_KHW.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
        image = draw_segmentation_masks(image, masks_KHW, alpha=0.4, colors=colors)
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores.cpu()[keep].tolist(), strict=True)]
    size = max(12, min(image.shape[-2:]) // 40)
    return draw_bounding_boxes(
        image,
        boxes,
        labels=names if len(names) < CROWD else None,
        colors=colors,
        label_colors=["white"] * len(labels) if len(names) < CROWD else None,
        fill_labels=len(names) < CROWD,
        width=max(2, size // 7),
        font=font_manager.findfont("DejaVu Sans"),
        font_size=size,
    )


def save_gallery(
    rows: Sequence[Mapping[str, tuple[Tensor, Mapping[str, Tensor]]]],
    classes: Sequence[str],
    out: Path | str,
    threshold: float = 0.3,
) -> None:
    """Write a grid of pictures: a row for each image, a titled column for each detector.

    Args:
        rows: for each image, column title to (image (3, H, W) uint8, what to draw on it); equal titles.
        classes: names by label.
        out: a PNG file; its folder is made.
        threshold: least score that is drawn.
    """
    from matplotlib.figure import Figure

    titles = list(rows[0])
    # Cells as wide as a drawing, and as high as the highest of them would be.
    height = max(image.shape[-2] / image.shape[-1] for row in rows for image, _ in row.values())
    size = (CELL / 100 * len(titles), CELL / 100 * min(height, 2.0) * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for i, row in enumerate(rows):
        for ax, title in zip(axes[i], titles, strict=True):
            image, detections = row[title]
            drawn = draw_detections(image, detections, classes, threshold, shortest=CELL)
            ax.imshow(drawn.permute(1, 2, 0).numpy())
            ax.set_axis_off()
            if i == 0:
                ax.set_title(title)
    if any("semantic" in detections for row in rows for _, detections in row.values()):
        _class_legend(figure, classes)
    save_figure(figure, out, dpi=100)


def _painted(image_3HW: Tensor, labels_HW: Tensor) -> Tensor:
    """The image with each pixel half in the colour of its class; ignored ones as they are."""
    palette_L3 = torch.tensor([_color(label) for label in range(UNLABELLED + 1)])
    labels_HW = labels_HW.long()
    mixed_3HW = (image_3HW.int() + palette_L3[labels_HW].permute(2, 0, 1)) // 2
    return torch.where(labels_HW == UNLABELLED, image_3HW, mixed_3HW.to(torch.uint8))


def _class_legend(figure: Figure, classes: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=class_color(label), label=name) for label, name in enumerate(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(6, len(patches)), frameon=False)


def class_color(label: int) -> str:
    """The class's colour in pictures, as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*_color(label))


def _pixels(masks: Tensor, height: int, width: int) -> Tensor:
    """(K, H, W) bool."""
    masks_KHW = masks.reshape(-1, height, width)
    return masks_KHW > 0.5 if masks_KHW.is_floating_point() else masks_KHW.bool()


def _color(label: int) -> tuple[int, int, int]:
    """A colour of the class's own, dark enough for white text: hues apart by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb((0.6 + label * 0.61803) % 1, 0.9, 0.7)
    return round(255 * red), round(255 * green), round(255 * blue)


def save_samples(evaluation: Evaluation, out: Path | str) -> None:
    """Write some images, those with objects first, evenly spread: ground truth beside what was found."""
    if isinstance(evaluation, SegmentationEvaluation):
        _save_label_maps(evaluation, out)
        return
    assert isinstance(evaluation, DetectionEvaluation)
    split = evaluation.split
    images = DetectionDataset(split, None, with_masks=evaluation.masks is not None)
    shown = [i for i, record in enumerate(split.records) if len(record.labels_K)] or list(range(len(split)))
    chosen = sorted({shown[i * len(shown) // SAMPLES] for i in range(SAMPLES)})
    rows = []
    for i in chosen:
        image, truth = images[i]
        found = evaluation.detections[i]
        if evaluation.masks is not None:
            found = {**found, "masks": _decoded(evaluation.masks[i], *image.shape[-2:])}
        rows.append({"ground truth": (image, truth), "found": (image, found)})
    save_gallery(rows, split.classes, out)


def _save_label_maps(evaluation: SegmentationEvaluation, out: Path | str) -> None:
    images = DetectionDataset(evaluation.split, None)
    rows = []
    for i, labels_HW in evaluation.label_maps.items():
        image, truth = images[i]
        rows.append({"ground truth": (image, truth), "found": (image, {"semantic": labels_HW})})
    save_gallery(rows, evaluation.split.classes, out)


def _decoded(lengths: Sequence[Mapping[str, Any]], height: int, width: int) -> Tensor:
    masks = [decode_mask(one, height, width) for one in lengths]
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.bool)


def save_differences(split: Split, differences: Sequence[ImageDifference], out: Path | str) -> None:
    """Write the first of the images that differ: on the left what is gone, on the right what is new.

    Args:
        split: the images.
        differences: of :func:`~detdistill.evaluation.difference.difference`, at least one.
        out: a PNG file; its folder is made.
    """
    images = DetectionDataset(split, None)
    sides = {"gone": ("lost", "gone false alarm"), "new": ("found", "new false alarm")}
    names = [f"{kind}: {name}" for kind in CHANGES for name in split.classes]
    rows = []
    for one in differences[:SAMPLES]:
        image, _ = images[one.index]
        row = {}
        for title, kinds in sides.items():
            shown = [change for change in one.changes if change.kind in kinds]
            labels = [CHANGES.index(change.kind) * len(split.classes) + change.label for change in shown]
            boxes = torch.tensor([change.box for change in shown]).reshape(-1, 4)
            row[title] = (image, {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)})
        rows.append(row)
    save_gallery(rows, names, out)
