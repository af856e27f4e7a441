"""Which classes student and teacher share, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClassMatch:
    """Which classes two detectors share, by name; their order does not matter.

    Attributes:
        pairs: (student's label, teacher's label) of each shared class, in the student's order.
        missing: the student's classes that the teacher does not know.
        extra: the teacher's classes that the student does not know.
    """

    pairs: tuple[tuple[int, int], ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both have the same classes in the same order."""
        return not (self.missing or self.extra) and all(ours == theirs for ours, theirs in self.pairs)

    def lines(self) -> list[str]:
        """What to print: how many are shared, and which are not."""
        count = len(self.pairs) + len(self.missing)
        lines = [f"the teacher knows {len(self.pairs)} of the student's {count} classes"]
        if self.missing:
            lines.append(f"not known to the teacher: {', '.join(self.missing)}")
        if self.extra:
            lines.append(f"known to the teacher alone, not used: {', '.join(self.extra)}")
        return lines


def match_classes(student: Sequence[str], teacher: Sequence[str]) -> ClassMatch:
    """The classes of two detectors that bear the same name."""
    label_of = {name: label for label, name in enumerate(teacher)}
    return ClassMatch(
        pairs=tuple((label, label_of[name]) for label, name in enumerate(student) if name in label_of),
        missing=tuple(name for name in student if name not in label_of),
        extra=tuple(name for name in teacher if name not in student),
    )
