"""What a user can fix, and how a message names it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can fix; the message is one line that says what and how."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` where one of the known words is near, else what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
