"""A part of train as val, for datasets that have none: ``data.val: 20%``."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from detdistill.data.records import Split
from detdistill.errors import UserError


def share_of(val: str | None) -> float | None:
    """The share that ``20%`` asks for; None where ``data.val`` is the name of something.

    Raises:
        UserError: it leaves nothing to train on, or to evaluate on.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", val or "")
    if match is None:
        return None
    share = float(match[1]) / 100
    if not 0 < share < 1:
        raise UserError(f"data.val: {val} leaves nothing of one of the two parts; give a share such as 20%")
    return share


def hold_out(train: Split, share: float) -> dict[str, Split]:
    """Train and val, cut by the images' file names: an image stays where it is when others come.

    What Roboflow made of one photograph (``NAME.rf.HASH.jpg``) stays together. Of few images the share is not
    exact; each part has at least one. What was wrong with the annotations is told of train.
    """
    draws_N = np.array([_draw(Path(path).stem) for path in train.records.paths.texts()])
    held_N = draws_N < share
    if not held_N.any() and len(held_N) > 1:
        held_N[draws_N.argmin()] = True
    if held_N.all() and len(held_N) > 1:
        held_N[draws_N.argmax()] = False
    rest, val = (train.records.take(np.flatnonzero(part)) for part in (~held_N, held_N))
    return {"train": replace(train, records=rest), "val": replace(train, name="val", records=val, findings=[])}


def _draw(stem: str) -> float:
    """A number in [0, 1) that is the name's own."""
    name = stem.partition(".rf.")[0]
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
