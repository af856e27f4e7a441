"""Text of a user (names, paths) where it is shown: on a terminal, in a Markdown table, as a folder's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PureWindowsPath
from typing import IO

# Control characters except newline and tab, overrides of the writing direction, and lone surrogates, which
# stand for bytes of a file name that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 200  # bytes of a folder's name; file systems take 255


def printable(text: str, stream: IO[str] | None = None) -> str:
    """The text with what a terminal would obey or cannot show as escapes (``\\x1b``).

    Args:
        text: any text; newlines and tabs stay.
        stream: escape what its encoding lacks, too.
    """
    shown = _UNPRINTABLE.sub(_escape, text)
    encoding = getattr(stream, "encoding", None)
    return shown.encode(encoding, "backslashreplace").decode(encoding) if encoding else shown


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as os.fsdecode has it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON and YAML can hold halves of characters, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """Lines of a Markdown table, the first row being its head."""
    head, *body = ([_cell(cell) for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def require_folder_name(name: str, what: str) -> str:
    """The name, if it is that of a folder (perhaps in folders) below another one.

    Raises:
        ValueError: it is empty, absolute, too long, leads out of the folder, or has characters that cannot be
            printed.
    """
    parts = name.replace("\\", "/").split("/")
    if name != name.strip() or any(part.strip() in ("", ".", "..") for part in parts):
        problem = "does not name a folder below the run's"
    elif PureWindowsPath(name).drive or name.startswith("~"):
        problem = "is a path of its own"
    elif not name.isprintable():
        problem = "has characters that cannot be printed"
    elif any(len(part.encode()) > _LONGEST for part in parts):
        problem = f"is longer than {_LONGEST} bytes"
    else:
        return name
    raise ValueError(f"{what} {printable(name)[:60]!r} {problem}: use a plain name, as student-a")
