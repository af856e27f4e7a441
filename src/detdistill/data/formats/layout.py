"""Find the files of a data set by name: in any letter case, in any Unicode form, moved from another machine."""

from __future__ import annotations

import os
from collections import defaultdict
from functools import cached_property
from pathlib import Path, PurePosixPath

from detdistill.data.cleaning import FileIndex, name_key
from detdistill.data.images import files_below, is_image

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}
"""The names that folders and lists of a part have; the first that is there is taken."""


def is_file(path: Path) -> bool:
    """Whether there is such a file; not, where no file can have this name (pathlib raises an OSError then)."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """As :func:`is_file`, of folders."""
    return os.path.isdir(path)  # noqa: PTH112


def find_entry(folder: Path, *parts: str) -> Path | None:
    """A file or folder below ``folder``, of exactly these names or else in another letter case."""
    here = folder
    for part in parts:
        if not os.path.lexists(here / part):
            match = _spelled_otherwise(here, part)
            if match is None:
                return None
            part = match
        here = here / part
    return here


def _spelled_otherwise(folder: Path, part: str) -> str | None:
    """The first entry, by name, that differs from a name in letter case or Unicode form alone."""
    key = name_key(part)
    # Most of a hundred thousand names are out by their length, which letter case does not change in ASCII.
    same = (name for name in _listed(folder) if len(name) == len(key) or not name.isascii())
    return min((name for name in same if name_key(name) == key), default=None)


def find_folder(folder: Path, *parts: str) -> Path | None:
    """As :func:`find_entry`, of folders only."""
    found = find_entry(folder, *parts)
    return found if found is not None and is_folder(found) else None


def entry_names(folder: Path, suffix: str = "") -> list[str]:
    """What a folder holds, sorted; nothing where there is no such folder.

    Args:
        suffix: only names that end with it, in any case.
    """
    names = _listed(folder)
    return sorted(name for name in names if name.lower().endswith(suffix) and not name.startswith("._"))


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names, a hundred thousand of them
    except OSError:
        return []


def describe_folder(folder: Path, most: int = 10) -> str:
    """What a folder holds, for a message."""
    if not folder.is_dir():
        return "no such folder"
    names = [f"{name}/" if (folder / name).is_dir() else name for name in entry_names(folder)[: most + 1]]
    more = len(entry_names(folder)) - most
    return (", ".join(names[:most]) or "nothing") + (f" and {more} more" if more > 0 else "")


def labels_folder(images: Path) -> Path:
    """The folder of the labels of a folder of images: the last ``images`` of its path becomes ``labels``.

    Letter case does not count. Where the path has no such part it is the folder of the images itself.
    """
    parts = images.parts
    place = next((i for i in reversed(range(len(parts))) if name_key(parts[i]) == "images"), None)
    if place is None:
        return images
    parent, rest = Path(*parts[:place]), parts[place + 1 :]
    return find_entry(parent, "labels", *rest) or (find_entry(parent, "labels") or parent / "labels").joinpath(
        *rest
    )


class ListedImages:
    """Where the images of a list are, also where it names the folders of another machine.

    Args:
        root: the folder of the data set.
        files: the files that there are.
    """

    def __init__(self, root: Path, files: FileIndex) -> None:
        self.root = root
        self._files = files

    def find(self, entry: str, base: Path) -> Path | None:
        """The file that a line of a list means; None where there is none, or several could be meant.

        The path starts from ``base`` (the list's folder) or from the root. Of a path whose folders are not
        there the leading ones are dropped, at last all of them.
        """
        given = PurePosixPath(entry.replace("\\", "/"))
        for start in range(len(given.parts)):
            tail = Path(*given.parts[start:])
            for folder in dict.fromkeys((base, self.root)):
                found = self._files.find(str(folder / tail))
                if found is not None:
                    return Path(found)
            if len(tail.parts) > 1 and any(is_folder(folder / tail.parent) for folder in (base, self.root)):
                return None  # its folder is here, without the file
        return self._by_name(given)

    def _by_name(self, given: PurePosixPath) -> Path | None:
        """The one image of that name; of several, the one whose folders have the most in common."""
        candidates = self._images.get(name_key(given.name), [])
        shared = [_shared_tail(path, given) for path in candidates]
        best = [path for path, count in zip(candidates, shared, strict=True) if count == max(shared)]
        return best[0] if len(best) == 1 else None

    @cached_property
    def _images(self) -> dict[str, list[Path]]:
        images = defaultdict(list)
        for path in files_below(self.root):
            if is_image(path):
                images[name_key(path.name)].append(path)
        return images


def _shared_tail(path: Path, given: PurePosixPath) -> int:
    pairs = zip(reversed(path.parts), reversed(given.parts), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if name_key(a) != name_key(b)), len(given.parts))
