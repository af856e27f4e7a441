"""What a run resumes from: a file that is whole or is refused, and the one before it.

A checkpoint is torch's zip file, which carries a CRC-32 of each tensor's bytes. It is written next to the last
one, forced to disk, read back against these sums, and only then takes the last one's place, which stays as
``previous.pt``.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from detdistill.errors import UserError

PREVIOUS = "previous.pt"


def save_checkpoint(file: Path, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint; whatever happens, the file or its ``previous.pt`` is a whole one.

    Raises:
        UserError: it cannot be written, or what was written cannot be read.
    """
    temporary = file.with_suffix(".tmp")
    try:
        with temporary.open("wb") as opened:
            torch.save(dict(state), opened)
            opened.flush()
            os.fsync(opened.fileno())
        if (damage := _damage(temporary)) is not None:
            raise OSError(f"what was written cannot be read: {damage}")
    except (OSError, RuntimeError) as error:  # torch reports a full disk by the latter
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(file.parent).free / 2**20
        raise UserError(
            f"{file}: cannot be written, with {free:.0f} MiB free there "
            f"({str(error).splitlines()[0]}): free some space, and the same command resumes from the last one"
        ) from error
    with suppress(FileNotFoundError):
        file.replace(file.with_name(PREVIOUS))
    temporary.replace(file)
    _sync_folder(file.parent)


def load_checkpoint(file: Path) -> dict[str, Any] | None:
    """The checkpoint; the previous one where the file is gone; None where there is neither.

    Raises:
        UserError: the file is damaged; the message says how to go on.
    """
    previous = file.with_name(PREVIOUS)
    found = next((path for path in (file, previous) if path.exists()), None)
    if found is None:
        return None
    damage = _damage(found)
    if damage is None:
        try:
            state = torch.load(found, map_location="cpu", weights_only=True)
            if isinstance(state, dict) and {"step", "pair", "optimizer"} <= state.keys():
                return state
            damage = "it is no checkpoint of detdistill"
        except Exception as error:
            damage = (str(error).splitlines() or [type(error).__name__])[0][:200]
    spare = found == file and previous.exists() and _damage(previous) is None
    way_on = f"delete it to resume from {previous}, or " if spare else "no other checkpoint is left: "
    raise UserError(f"{found}: damaged ({damage}); {way_on}start the run anew with --fresh")


def _damage(file: Path) -> str | None:
    """What is wrong with a checkpoint's bytes; None of a whole one."""
    if not file.is_file():
        return "it is a folder, a pipe or a device"
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except Exception as error:  # zipfile and zlib have many ways to say it
        return str(error) or type(error).__name__
    return None if broken is None else f"the checksum of {broken} does not fit"


def _sync_folder(folder: Path) -> None:
    """Force the renaming to disk; a file system that cannot is left alone."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
