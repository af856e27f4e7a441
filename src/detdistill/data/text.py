"""The text files of a data set: labels, lists of images, class names. All are UTF-8."""

from __future__ import annotations

import codecs
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from detdistill.errors import UserError
from detdistill.text import is_text

_UTF_16_OR_32 = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",  # first: UTF-16's mark begins UTF-32's
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: the file is missing, cannot be read, or has another encoding; one line with the file.
    """
    return decode_text(read_file(path), path)


def read_file(path: Path) -> bytes:
    """The bytes of a regular file (reading a pipe would wait forever).

    Raises:
        UserError: the file is missing or cannot be read; one line with the file.
    """
    try:
        require_regular(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; restore it or correct its path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); correct its path or its permissions") from None


def require_regular(path: Path) -> None:
    """Refuse to open a folder, a pipe (which would wait forever) or a device.

    Raises:
        UserError: it is one of these.
        OSError: there is nothing at the path.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"{path}: is {what}, not a file; put the file in its place")


def decode_text(data: bytes, path: Path) -> str:
    """As :func:`read_text`, of bytes that were read before."""
    for mark, encoding in _UTF_16_OR_32.items():
        if data.startswith(mark):
            raise UserError(f"{path}: is {encoding}, not UTF-8; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x} in line {line}"
        raise UserError(f"{path}: is not UTF-8 ({byte}); save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: holds NUL bytes: a binary file, or UTF-16; save it as UTF-8 text")
    return text


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without surrounding space, blank ones left out.

    Raises:
        UserError: as :func:`read_text`.
    """
    return _lines(path, blank=False)


def _lines(path: Path, blank: bool) -> list[str]:
    """The lines without surrounding space; with ``blank`` also empty ones, but for those at the end."""
    text = read_text(path).rstrip().replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip() for line in text.split("\n") if line.strip() or (blank and text)]


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names of a file that has one on each line; a class's number is that of its line, from 0.

    Raises:
        UserError: as :func:`read_text`; or there is no name, or one occurs twice.
    """
    return distinct_names(_lines(path, blank=True), path)


def distinct_names(names: Iterable[str], source: Path) -> tuple[str, ...]:
    """Class names, each of them once: classes are matched by name everywhere.

    Raises:
        UserError: there is no name, an empty one, one that is no text, or one occurs twice.
    """
    names = tuple(names)
    if not names:
        raise UserError(f"{source}: names no class; list the class names in the order of their numbers")
    for number, name in enumerate(names):
        if not name.strip():
            raise UserError(f"{source}: class {number} has an empty name; give it one")
        if not is_text(name):
            raise UserError(f"{source}: class {number} has half a character in its name {name!r}; correct it")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        numbers = " and ".join(str(i) for i, other in enumerate(names) if other == name)
        raise UserError(f"{source}: classes {numbers} have the same name {name!r}; give each its own")
    return names
