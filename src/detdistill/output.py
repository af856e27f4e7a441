"""Where a user wants results: paths that are checked before the work begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from detdistill.errors import UserError


def output_path(path: Any, what: str = "out") -> Path:
    """A path that a user gave, ``~`` being the home folder.

    Args:
        path: anything; what is no path is refused.
        what: how messages call it.

    Raises:
        UserError: it is empty or no path.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not text or not isinstance(text, str) or "\0" in text:
        raise UserError(f"{what} is {path!r}: give a path")
    return Path(text).expanduser()


def output_file(path: Any, what: str = "out") -> Path:
    """As :func:`output_path`, of a file that can be written; its folder is made.

    Raises:
        UserError: it cannot be written, or is a folder.
    """
    path = output_path(path, what)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give {what} a file's name")
    make_folder(path.parent, what)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written (permission denied); give another {what}")
    return path


def make_folder(path: Path, what: str = "out") -> None:
    """Make a folder, with those above it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); give another {what}") from None
