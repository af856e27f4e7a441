"""What can be wrong with the boxes of a split as a whole: annotated twice, or too small for a model's input.

Shape legend: N images, M objects of all images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from detdistill.data.records import Finding, Split

_TOO_SMALL = 0.02  # share of objects under half a stride that is worth a warning


def doubled_boxes(split: Split) -> list[Finding]:
    """A warning where an image has the same box twice with the same class."""
    records = split.records
    corners_M4 = np.ascontiguousarray(records.boxes_M4).view(np.uint32)
    order_M = np.lexsort((*corners_M4.T, records.labels_M, records.images_M))
    rows_M6 = np.column_stack([records.images_M, records.labels_M, corners_M4])[order_M]
    again_M = order_M[1:][(rows_M6[1:] == rows_M6[:-1]).all(axis=1)]
    if not len(again_M):
        return []
    images = np.unique(records.images_M[again_M])
    first = again_M[records.images_M[again_M] == images[0]][0]
    box = ", ".join(f"{value:g}" for value in records.boxes_M4[first])
    example = f"{split.classes[records.labels_M[first]]!r} ({box}) of image {records.image_id(int(images[0]))}"
    message = f"{len(again_M)} boxes on {len(images)} images are annotated twice, as {example}"
    return [Finding("warning", "doubled box", split.source, message, "delete the copies: a detector finds one")]


def small_objects(
    split: Split, scale_of: Callable[[int, int], tuple[float, float]], stride: int, size: tuple[int, int] | None
) -> list[Finding]:
    """A warning where objects are smaller than half the finest stride in a model's input.

    Such an object covers less than a quarter of one cell of the finest feature map.

    Args:
        scale_of: the factors by which an image of this (height, width) is resized.
        stride: of the model's finest feature map.
        size: the model's ``size``, (short, long); None where images are taken as they come.
    """
    records = split.records
    if not len(records.labels_M):
        return []
    sizes, which_N = np.unique(np.stack([records.heights_N, records.widths_N], 1), axis=0, return_inverse=True)
    factors = np.array([scale_of(int(height), int(width)) for height, width in sizes])
    area_N = factors.prod(axis=1)[which_N.ravel()]
    sides_M2 = records.boxes_M4[:, 2:] - records.boxes_M4[:, :2]
    sides_M = np.sqrt(sides_M2.prod(axis=1) * area_N[records.images_M])[~records.ignore_M]
    small_M = sides_M < stride / 2
    if not len(sides_M) or small_M.mean() < _TOO_SMALL:
        return []
    # The factor at which all have half a stride, but for fewer than are worth a warning.
    still = math.ceil(_TOO_SMALL * len(sides_M)) - 1
    factor = stride / 2 / float(np.partition(sides_M, still)[still])
    if size is None:
        shorts_N, longs_N = records.heights_N, records.widths_N
        size = (
            int(np.median(np.minimum(shorts_N, longs_N))),
            int(np.median(np.maximum(shorts_N, longs_N))),
        )
    short, long = (math.ceil(side * factor / 32) * 32 for side in size)
    message = (
        f"{small_M.mean():.0%} of the objects of {split.name} are smaller than half the finest stride "
        f"({stride} / 2) in the student's input: median side {np.median(sides_M[small_M]):.1f} px"
    )
    fix = f"set student.size to [{short}, {long}], or cut the images into tiles"
    return [Finding("warning", "small objects", split.source, message, fix)]
