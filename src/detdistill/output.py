"""Where a user wants results: paths that are checked before the work begins."""

from __future__ import annotations

import json
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


_OF_INPUTS = {"annotations", "images", "categories", "classes", "arms", "format"}
"""Keys of JSON files that commands read: annotations, class names, comparisons, facts of exported files."""


def output_json(path: Any, what: str, kind: type[dict[Any, Any]] | type[list[Any]]) -> Path:
    """As :func:`output_file`, of a JSON file that replaces nothing but an earlier one of its kind.

    Args:
        kind: what the file will hold: an object of numbers, or a list of rows.

    Raises:
        UserError: it does not end in .json, or is another file, such as a data set's annotations.
    """
    path = output_file(path, what)
    if path.exists() and not path.is_file():  # /dev/stdout
        return path
    if path.suffix.lower() != ".json":
        raise UserError(f"{path}: give {what} a name that ends in .json")
    if path.exists() and path.stat().st_size:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, kind) or (isinstance(content, dict) and _OF_INPUTS & content.keys()):
            raise UserError(
                f"{path}: exists, and is no earlier output of {what}: give another name, or delete it"
            )
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
