"""The one way to measure any model: by its task."""

from __future__ import annotations

from typing import Any

import torch

from detdistill.data.records import Split
from detdistill.evaluation.detector import DetectionEvaluation, evaluate_detector
from detdistill.evaluation.measure import Evaluation, Precision, Progress
from detdistill.evaluation.segmentation import SegmentationEvaluation, evaluate_segmenter
from detdistill.models.base import Detector, Model, Segmenter


def evaluate_model(
    model: Model,
    split: Split,
    *,
    batch_size: int = 16,
    workers: int = 0,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    limit: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """:func:`evaluate_detector` or :func:`evaluate_segmenter`; both take the same.

    Raises:
        UserError: an empty split, one for another task, or no class in common.
    """
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "precision": precision,
        "limit": limit,
        "progress": progress,
    }
    if isinstance(model, Segmenter):
        return evaluate_segmenter(model, split, **how)
    assert isinstance(model, Detector)
    return evaluate_detector(model, split, **how)


def main_number(model: Model) -> str:
    """The name of the number by which models of its task are compared: "AP" or "mIoU"."""
    return SegmentationEvaluation.main if isinstance(model, Segmenter) else DetectionEvaluation.main
