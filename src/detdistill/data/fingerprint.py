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
        for record in split.records:
            state.update(repr((record.image_id, record.height, record.width)).encode())
            for array in (record.boxes_K4, record.labels_K, record.ignore_K):
                state.update(array.tobytes())
    return state.hexdigest()
