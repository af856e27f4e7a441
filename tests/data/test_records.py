"""The columns of a split against plain lists of records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detdistill.data.fingerprint import fingerprint
from detdistill.data.packed import Packed
from detdistill.data.records import Record, Records, Split

_IDS = st.one_of(st.integers(-(10**30), 10**30), st.text(st.characters(), max_size=5))
_SQUARE = [[0, 0, 4.25, 0, 4.25, 4]]
_FINGERPRINT = "11155420d825c12ebbe826e53548a39a7ec7547fca095aa4c83d8ffed6c5a5e6"  # by commit 964fcf6


@st.composite
def _lists(draw):
    """Some records, all with masks or none."""
    with_masks = draw(st.booleans())
    records = []
    for image_id in draw(st.lists(_IDS, max_size=6)):
        count = draw(st.integers(0, 3))
        values = np.arange(count, dtype=np.float32) + len(records)
        records.append(
            Record(
                image_id=image_id,
                path=Path(f"{len(records)}.jpg"),
                height=48,
                width=64 + count,
                boxes_K4=np.stack([values, values, values + 1, values + 2], axis=1),
                labels_K=np.arange(count) % 2,
                ignore_K=np.arange(count) % 2 == 1,
                areas_K=values,
                masks=[_SQUARE, None, {"size": [1, 2], "counts": "02"}][:count] if with_masks else None,
            )
        )
    return records


def _same(record: Record, other: Record) -> bool:
    arrays = ("boxes_K4", "labels_K", "ignore_K", "areas_K")
    plain = ("image_id", "path", "height", "width")
    masks = [None if one.masks is None else list(one.masks) for one in (record, other)]
    return (
        all(np.array_equal(getattr(record, name), getattr(other, name)) for name in arrays)
        and all(getattr(record, name) == getattr(other, name) for name in plain)
        and masks[0] == masks[1]
    )


@given(_lists(), st.data())
def test_columns_are_the_list_that_was_packed(records, data):
    packed = Records.pack(records)
    assert len(packed) == len(records)
    assert all(map(_same, packed, records))
    places = data.draw(st.lists(st.integers(0, len(records) - 1), max_size=8)) if records else []
    assert all(map(_same, packed.take(places), [records[i] for i in places]))
    assert all(map(_same, packed[1::2], records[1::2]))
    kept = [np.flatnonzero(record.labels_K == 0) for record in records]
    for record, place in zip(packed.keep(packed.labels_M == 0), kept, strict=True):
        assert record.areas_K.tolist() == [0.0 + v for v in record.boxes_K4[:, 0]]
        assert len(record.labels_K) == len(place)


def test_places_beyond_the_end_are_refused_and_those_from_the_end_are_not():
    record = Record(
        3, Path("a"), 1, 2, np.zeros((0, 4), np.float32), *(np.zeros(0, t) for t in (int, bool, np.float32))
    )
    packed = Records.pack([record])
    assert packed[-1].image_id == 3
    with pytest.raises(IndexError):
        packed[1]


@given(st.lists(st.binary(max_size=5)), st.data())
def test_packed_strings(strings, data):
    packed = Packed.pack(strings)
    assert list(packed) == strings
    places = data.draw(st.lists(st.integers(0, len(strings) - 1))) if strings else []
    assert list(packed.take(np.array(places, np.int64))) == [strings[i] for i in places]


def test_a_small_part_does_not_hold_the_whole():
    packed = Packed.pack([b"x" * 1000] * 100)
    assert len(packed.take(np.array([3])).blob) == 1000
    assert packed.take(np.arange(80)).blob is packed.blob


def test_the_fingerprint_is_that_of_older_versions(tmp_path):
    """A run that was started before records were columns must know its data again."""
    boxes = np.array([[1, 2, 3, 4.5]], np.float32)
    record = Record(7, Path("a.jpg"), 48, 64, boxes, np.array([1]), np.array([True]), np.array([5], np.float32))
    split = Split("train", [record], ("cat", "dog"), (1, 2), tmp_path)
    assert fingerprint({"train": split}) == _FINGERPRINT
