"""COCO segmentations (polygons, run lengths) to bitmaps and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from hotcoco import mask as hotmask
from numpy.typing import NDArray

_FARTHEST = 1e9  # pixels; a coordinate beyond it is not one


def decode_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """A COCO segmentation as a (height, width) bitmap.

    Args:
        segmentation: polygons ``[[x1, y1, x2, y2, …], …]`` in pixels (the object is their union), or run
            lengths ``{"size": [height, width], "counts": …}`` with counts as a list or compressed.
    """
    return np.asarray(hotmask.decode(_compressed(segmentation, height, width))).astype(bool)


def _compressed(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str | bytes):
        counts = segmentation["counts"]
        return {**segmentation, "counts": counts.encode() if isinstance(counts, str) else counts}
    rle = hotmask.frPyObjects(segmentation, height, width)
    return hotmask.merge(rle) if isinstance(rle, list) else rle


def extent_of(segmentation: Any, height: int, width: int) -> tuple[float, float, float, float]:
    """The box around a segmentation that can be decoded, xyxy in pixels; polygons are not clipped."""
    if isinstance(segmentation, list):
        xs = [x for polygon in segmentation for x in polygon[::2]]
        ys = [y for polygon in segmentation for y in polygon[1::2]]
        return min(xs), min(ys), max(xs), max(ys)
    x, y, w, h = map(float, hotmask.toBbox(_compressed(segmentation, height, width)))
    return x, y, x + w, y + h


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
    """What :func:`decode_mask` can decode of a segmentation; None where nothing is left.

    Polygons that are not at least three corners of numbers are left out. Run lengths must have the size of
    the image and cover it.
    """
    if isinstance(segmentation, dict):
        return segmentation if _is_run_lengths(segmentation, height, width) else None
    if not isinstance(segmentation, list):
        return None
    polygons = [polygon for polygon in segmentation if _is_polygon(polygon)]
    return polygons or None


def _is_run_lengths(rle: dict[Any, Any], height: int, width: int) -> bool:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        return False
    if isinstance(counts, str | bytes):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not all(type(number) is int for number in (*size, *counts)):
        return False
    return min(counts, default=-1) >= 0 and sum(counts) == height * width


def _decompressed(text: str | bytes) -> list[int] | None:
    """The runs of COCO's compressed counts; None where the text is cut short or has other characters.

    Each character holds 6 bits from "0": five of a number, lowest first, and whether more follow. From the
    fourth number on it is the difference to the last but one (``rleFrString`` of pycocotools' maskApi.c).
    """
    runs: list[int] = []
    value = shift = 0
    for code in text.encode("utf-8", "replace") if isinstance(text, str) else text:
        bits = code - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs if shift == 0 else None


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    return all(type(value) in (int, float) and abs(value) <= _FARTHEST for value in polygon)
