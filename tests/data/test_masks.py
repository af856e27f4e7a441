"""Masks against pycocotools."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as oracle

from detdistill.data.masks import decode_mask, encode_mask, usable_segmentation

_BITMAPS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


@settings(deadline=None, max_examples=40)
@given(_BITMAPS)
def test_run_lengths_are_those_of_pycocotools(bitmap):
    height, width = bitmap.shape
    ours = encode_mask(bitmap)
    compressed = oracle.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    assert oracle.frPyObjects(ours, height, width)["counts"] == compressed["counts"]
    assert usable_segmentation(ours, height, width) is ours
    for segmentation in (ours, compressed, {**compressed, "counts": compressed["counts"].decode()}):
        np.testing.assert_array_equal(decode_mask(segmentation, height, width), bitmap)


_POLYGON = st.lists(st.floats(0, 40, width=32), min_size=6, max_size=12).filter(lambda p: len(p) % 2 == 0)


@settings(deadline=None)
@given(st.lists(_POLYGON, min_size=1, max_size=3))
def test_polygons_are_filled_as_pycocotools_fills_them(polygons):
    expected = oracle.decode(oracle.merge(oracle.frPyObjects(polygons, 40, 40))).astype(bool)
    np.testing.assert_array_equal(decode_mask(polygons, 40, 40), expected)


def test_unusable_segmentations_are_told():
    square = [0, 0, 5, 0, 5, 5]
    assert usable_segmentation([square, [1, 2, 3, 4]], 8, 8) == [square]
    for bad in (None, [], [[]], [[1, 2, 3, 4, 5]], [[1, 2, 3, "x", 5, 6]], [[1, 2, 3, float("nan"), 5, 6]]):
        assert usable_segmentation(bad, 8, 8) is None
    for counts, size in (([64], [4, 16]), ([60], [8, 8]), ([-4, 68], [8, 8]), (None, [8, 8]), ("", [8, 8])):
        assert usable_segmentation({"counts": counts, "size": size}, 8, 8) is None
