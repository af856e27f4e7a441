"""COCO segmentations (polygons, run lengths) to bitmaps and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from hotcoco import mask as hotmask
from numpy.typing import NDArray


def decode_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """A COCO segmentation as a (height, width) bitmap.

    Args:
        segmentation: polygons ``[[x1, y1, x2, y2, …], …]`` in pixels (the object is their union), or run
            lengths ``{"size": [height, width], "counts": …}`` with counts as a list or compressed.
    """
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str | bytes):
        counts = segmentation["counts"]
        rle = {**segmentation, "counts": counts.encode() if isinstance(counts, str) else counts}
    else:
        rle = hotmask.frPyObjects(segmentation, height, width)
        rle = hotmask.merge(rle) if isinstance(rle, list) else rle
    return np.asarray(hotmask.decode(rle)).astype(bool)


def encode_mask(mask_HW: NDArray[np.bool_]) -> dict[str, Any]:
    """A bitmap as COCO's uncompressed run lengths: down the columns, starting with the number of zeros."""
    pixels = mask_HW.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff(np.concatenate(([0], changes, [pixels.size]))).tolist()
    return {"size": list(mask_HW.shape), "counts": [0, *runs] if pixels.size and pixels[0] else runs}


def encode_masks(masks_KHW: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Bitmaps as COCO's compressed run lengths, as results files have them."""
    lengths: Any = hotmask.encode(np.asfortranarray(masks_KHW.transpose(1, 2, 0), dtype=np.uint8))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in lengths]


def usable_segmentation(segmentation: Any, height: int, width: int) -> Any | None:
    """The segmentation without polygons of fewer than three corners; None where nothing usable is left."""
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        fits = isinstance(size, list | tuple) and list(size) == [height, width]
        if isinstance(counts, list):
            whole = all(isinstance(run, int) and run >= 0 for run in counts)
            return segmentation if fits and whole and sum(counts) == height * width else None
        return segmentation if fits and isinstance(counts, str | bytes) and counts else None
    if not isinstance(segmentation, list):
        return None
    polygons = [polygon for polygon in segmentation if _is_polygon(polygon)]
    return polygons or None


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    try:
        return bool(np.isfinite(np.asarray(polygon, dtype=np.float64)).all())
    except (TypeError, ValueError):
        return False
