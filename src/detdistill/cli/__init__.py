"""The command line. Each command parses, calls one function of the packages before it, and prints.

Exit codes: 0 done; 2 an error that the user can fix, in one line; 1 a bug, with its traceback; 75 preempted
and saved, start again; 130 interrupted.

Verbs import what they need when they run, torch after the recipe is read, so that ``--help`` and mistakes are
answered at once.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import typer

from detdistill.cli import training  # isort: skip - the commands are listed in this order
from detdistill.cli import comparing, using  # isort: skip
from detdistill.cli.app import BUG, INTERRUPTED, USER_ERROR, app
from detdistill.text import printable

__all__ = ["app", "comparing", "main", "training", "using"]

ISSUES = (
    "This is a bug in detdistill: please report it, with the lines above and what `detdistill --version` says."
)
_UsageError: Any = typer.BadParameter.__base__  # click's own, wherever this release of typer keeps it

_NO_BUG = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see the head of this file)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - for the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another code page shows escapes
            stream.reconfigure(errors="backslashreplace")
    command = typer.main.get_command(app)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _require_working_folder()
            arguments = [_expanded(each) for each in (sys.argv[1:] if arguments is None else arguments)]
            code = command.main(arguments, prog_name="detdistill", standalone_mode=False)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            code = _explain(error)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return int(code or 0)


def _require_working_folder() -> None:
    """Raises:
    UserError: it was deleted, so that no relative path means anything.
    """
    try:
        os.getcwd()  # noqa: PTH109 - the cheapest way to ask
    except FileNotFoundError:
        from detdistill.errors import UserError

        raise UserError("the working folder was deleted: change to another one (cd)") from None


def _expanded(argument: str) -> str:
    """``--out=~/x`` with the home folder, which no shell puts there.

    Raises:
        UserError: it is empty, as that of an unset variable.
    """
    option, _, value = argument.partition("=")
    if not argument or (option.startswith("--") and argument == f"{option}="):
        from detdistill.errors import UserError

        raise UserError(f"{argument or 'an argument'} is empty: give a value, or leave it out")
    if option.startswith("--") and value.startswith("~"):
        return f"{option}={os.path.expanduser(value)}"  # noqa: PTH111 - a value may be no path
    return argument


def _explain(error: Exception) -> int:
    """Say on stderr what went wrong; returns the exit code."""
    message = _message_for_user(error)
    if message is not None:
        print(f"error: {printable(message, sys.stderr)}", file=sys.stderr)
        return USER_ERROR
    traceback.print_exception(error)
    print(ISSUES, file=sys.stderr)
    return BUG


def _message_for_user(error: Exception) -> str | None:
    """One line for what the user can fix, None for a bug."""
    from pydantic import ValidationError

    from detdistill.errors import UserError

    if isinstance(error, UserError):
        return str(error).removeprefix("error: ")
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "detdistill"
        return f"{' '.join(error.format_message().split())} (see `{path} --help`)"
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    if isinstance(error, OSError) and (error.filename or error.errno in _NO_BUG):
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk of an output file is full: free some space, and run the command again"
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of pathlib, Python < 3.13
        return " ".join(str(error).split())
    if isinstance(error, UnicodeEncodeError):  # half of a character, as JSON and YAML can write it
        return f"{str(error.object)[:80]!r} is no valid text; write it anew"
    full = "can't allocate memory" in str(error) or "not enough memory" in str(error)  # torch, on a CPU
    if full or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "the memory is full: lower the batch size or the input size, or raise training.accumulate"
    return None


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """This package's warnings in one line, others as Python prints them."""
    ours = Path(filename).is_relative_to(Path(__file__).parent.parent)
    text = (
        f"warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    )
    stream = file or sys.stderr
    print(printable(text, stream), end="", file=stream)
