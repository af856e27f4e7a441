"""Detections as the metrics take them: arrays, finite, with labels that exist."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detdistill.data.records import Split


def finite_detections(split: Split, detections: Sequence[Mapping[str, Any]]) -> list[dict[str, NDArray[Any]]]:
    """Detections as arrays (boxes and scores in float64), without those whose box or score is not finite.

    Raises:
        ValueError: not one detections for each record, or labels outside the classes.
    """
    if len(detections) != len(split.records):
        raise ValueError(f"{len(detections)} detections for {len(split.records)} images; give one for each")
    usable, dropped = [], 0
    for record, detection in zip(split.records, detections, strict=True):
        arrays = {name: _array(detection[name]) for name in ("boxes", "labels", "scores")}
        arrays["boxes"] = arrays["boxes"].astype(np.float64).reshape(-1, 4)
        arrays["scores"] = arrays["scores"].astype(np.float64)
        if "masks" in detection:
            arrays["masks"] = _array(detection["masks"])
        labels = arrays["labels"]
        if labels.size and (labels.min() < 0 or labels.max() >= len(split.classes)):
            raise ValueError(
                f"image {record.image_id}: labels {labels.min()}…{labels.max()} for {len(split.classes)} "
                "classes; labels are indices into split.classes, from 0"
            )
        finite = np.isfinite(arrays["boxes"]).all(axis=1) & np.isfinite(arrays["scores"])
        dropped += int((~finite).sum())
        usable.append({name: array[finite] for name, array in arrays.items()})
    if dropped:
        warnings.warn(f"{dropped} detections with a box or score that is not finite were dropped", stacklevel=3)
    return usable


def _array(value: Any) -> NDArray[Any]:
    """Tensors of any device and type (bfloat16, too) to numpy."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)
