"""Detections drawn on their images, alone and side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import font_manager
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes

from detdistill.data.loading import DetectionDataset
from detdistill.evaluation.detector import Evaluation
from detdistill.report.plots import COLORS

SHORTEST = 480  # pixels: smaller images are enlarged, so that a label can be read
SAMPLES = 8


def draw_detections(
    image_3HW: Tensor,
    detections: Mapping[str, Tensor],
    classes: Sequence[str],
    threshold: float = 0.3,
) -> Tensor:
    """Draw boxes with class and score; a class keeps its colour from image to image.

    Args:
        image_3HW: uint8.
        detections: ``boxes`` (K, 4) xyxy in pixels, ``labels`` (K,), and ``scores`` (K,) of what was found.
        classes: names by label.
        threshold: least score that is drawn.

    Returns:
        (3, H', W') uint8 on the CPU; enlarged by a whole factor where the short side is under 480 pixels.
    """
    image = image_3HW.cpu()
    factor = max(1, -(-SHORTEST // min(image.shape[-2:])))
    if factor > 1:
        image = F.interpolate(image[None], scale_factor=factor, mode="nearest")[0]
    scores = detections.get("scores")
    keep = (
        torch.ones(len(detections["boxes"]), dtype=torch.bool) if scores is None else scores.cpu() >= threshold
    )
    boxes, labels = detections["boxes"].cpu()[keep] * factor, detections["labels"].cpu()[keep].tolist()
    if not labels:
        return image
    names = [classes[label] for label in labels]
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores.cpu()[keep].tolist(), strict=True)]
    size = max(12, min(image.shape[-2:]) // 28)
    return draw_bounding_boxes(
        image,
        boxes,
        labels=names,
        colors=[COLORS[label % len(COLORS)] for label in labels],
        label_colors=["white"] * len(labels),
        fill_labels=True,
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
    figure = Figure(figsize=(3.2 * len(titles), 3.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for i, row in enumerate(rows):
        for ax, title in zip(axes[i], titles, strict=True):
            image, detections = row[title]
            ax.imshow(draw_detections(image, detections, classes, threshold).permute(1, 2, 0).numpy())
            ax.set_axis_off()
            if i == 0:
                ax.set_title(title)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def save_samples(evaluation: Evaluation, out: Path | str) -> None:
    """Write some images of an evaluation, evenly spread over its split: ground truth beside what was found."""
    split = evaluation.split
    images = DetectionDataset(split, None)
    chosen = sorted({i * len(split) // SAMPLES for i in range(SAMPLES)})
    rows = []
    for i in chosen:
        image, truth = images[i]
        rows.append({"ground truth": (image, truth), "found": (image, evaluation.detections[i])})
    save_gallery(rows, split.classes, out)
