"""One mark for what annotations say, by which a run knows its data again wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from detdistill.data.records import Split


def fingerprint(splits: Mapping[str, Split]) -> str:
    """SHA-256 of classes, image ids, sizes, boxes and labels, in their order; not of paths, pixels or masks."""
    state = hashlib.sha256()
    for name, split in splits.items():
        state.update(repr((name, split.classes)).encode())
        records = split.records
        sizes = zip(records.heights_N.tolist(), records.widths_N.tolist(), strict=True)
        firsts = records.firsts.tolist()
        for i, (height, width) in enumerate(sizes):
            state.update(repr((records.image_id(i), height, width)).encode("utf-8", "surrogatepass"))
            for array in (records.boxes_M4, records.labels_M, records.ignore_M):
                state.update(array[firsts[i] : firsts[i + 1]].tobytes())
    return state.hexdigest()
