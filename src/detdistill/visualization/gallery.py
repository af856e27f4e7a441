"""Grids of drawings: ground truth and what models find, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from detdistill.data.loading import DetectionDataset
from detdistill.data.masks import decode_mask
from detdistill.data.records import Split
from detdistill.evaluation.detector import DetectionEvaluation
from detdistill.evaluation.difference import CHANGES, ImageDifference
from detdistill.evaluation.measure import Evaluation
from detdistill.evaluation.segmentation import SegmentationEvaluation
from detdistill.visualization.drawing import class_color, draw_detections
from detdistill.visualization.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 480  # pixels of a gallery's pictures: smaller images are enlarged, so that a label can be read
SAMPLES = 8


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


def _class_legend(figure: Figure, classes: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=class_color(label), label=name) for label, name in enumerate(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(6, len(patches)), frameon=False)


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
