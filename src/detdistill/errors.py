"""What a user can fix, and how a message names it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can fix; the message is one line that says what and how."""


def require_count(name: str, value: object, least: int) -> None:
    """Raises:
    UserError: it is no whole number, or a smaller one.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} is {value!r}: give a whole number of at least {least}")


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` where one of the known words is near, else what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
