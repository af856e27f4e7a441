"""A part of train as val, for datasets that have none: ``data.val: 20%``."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

from detdistill.config import UserError
from detdistill.data.records import Record, Split


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
    exact; val has at least one. What was wrong with the annotations is told of train.
    """
    val = [record for record in train.records if _draw(record) < share]
    if not val and len(train.records) > 1:
        val = [min(train.records, key=_draw)]
    held = {id(record) for record in val}
    rest = [record for record in train.records if id(record) not in held]
    return {"train": replace(train, records=rest), "val": replace(train, name="val", records=val, findings=[])}


def _draw(record: Record) -> float:
    """A number in [0, 1) that is the name's own."""
    name = record.path.stem.partition(".rf.")[0]
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
