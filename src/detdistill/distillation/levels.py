"""Which student level meets which teacher level: decided once, before training.

Input sizes may differ. What two levels have in common is then not their stride but the part of the image that a
cell covers: a teacher of stride 16 at 640 pixels sees as much of it in a cell as a student of stride 8 at 320.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from detdistill.errors import UserError
from detdistill.models.base import Preprocess

HALF_AN_OCTAVE = 0.5 + 1e-6  # of strides, in powers of 2: two levels that near are the same level
PHOTOGRAPH = (3, 4)  # rows and columns: the shape for which input sizes are compared, where they depend on it


@dataclass(frozen=True, slots=True)
class LevelMatch:
    """One student level and the teacher level that it learns from.

    Attributes:
        teacher_scale: the student's pixels over the teacher's, for the same part of an image.
    """

    student_stride: int
    teacher_stride: int
    student_channels: int
    teacher_channels: int
    teacher_scale: float = 1.0

    @property
    def effective_stride(self) -> float:
        """The teacher's stride in pixels of the student's input."""
        return self.teacher_stride * self.teacher_scale

    @property
    def resized(self) -> bool:
        return not math.isclose(self.student_stride, self.effective_stride, rel_tol=1e-3)


@dataclass(frozen=True, slots=True)
class Matching:
    """All matched levels, finest first, and the strides of the levels that are left out."""

    levels: tuple[LevelMatch, ...]
    student_only: tuple[int, ...]
    teacher_only: tuple[int, ...]

    def only(self, strides: Sequence[int]) -> Matching:
        """The matches of these student strides.

        Raises:
            UserError: a stride that is not matched.
        """
        matched = [level.student_stride for level in self.levels]
        missing = [stride for stride in strides if stride not in matched]
        if missing or not strides:
            raise UserError(f"strides {list(strides)}: the student's matched strides are {matched}")
        levels = tuple(level for level in self.levels if level.student_stride in strides)
        return Matching(levels, self.student_only, self.teacher_only)

    def rows(self) -> list[tuple[str, str, str]]:
        """The table to print: (student level, teacher level, what lies between)."""
        rows = []
        for level in self.levels:
            between = []
            if level.student_channels != level.teacher_channels:
                between.append(f"1×1 adapter {level.student_channels}→{level.teacher_channels}")
            if level.resized:
                between.append("resized to the teacher's")
            effective = (
                "" if level.teacher_scale == 1 else f" ({level.effective_stride:.3g} of the student's pixels)"
            )
            rows.append((
                f"stride {level.student_stride}, {level.student_channels} channels",
                f"stride {level.teacher_stride}{effective}, {level.teacher_channels} channels",
                ", ".join(between) or "as it is",
            ))  # fmt: skip
        rows += [(f"stride {stride}", "–", "not distilled") for stride in self.student_only]
        rows += [("–", f"stride {stride}", "not used") for stride in self.teacher_only]
        return rows


def match_levels(student: Mapping[int, int], teacher: Mapping[int, int], scale: float = 1.0) -> Matching:
    """Pair the levels of two pyramids, each given as ``{stride: channels}``.

    The teacher's strides count in the student's pixels. Levels within half an octave of each other meet: for
    equal inputs those of equal stride. Only where there are none does each student level meet the teacher level
    of the nearest stride, at most a factor of 4 away, and is resized to it.

    Args:
        student, teacher: the pyramids.
        scale: from :func:`input_scale`.

    Raises:
        UserError: no two levels are that near.
    """

    def apart(s: int, t: int) -> float:
        return abs(math.log2(t * scale / s))

    nearest = [(s, min(sorted(teacher), key=lambda t: apart(s, t))) for s in sorted(student)]
    pairs = [(s, t) for s, t in nearest if apart(s, t) <= HALF_AN_OCTAVE]
    pairs = pairs or [(s, t) for s, t in nearest if apart(s, t) <= 2]
    if not pairs:
        theirs = [float(f"{t * scale:.3g}") for t in sorted(teacher)] if scale != 1 else sorted(teacher)
        where = " (in the student's pixels)" if scale != 1 else ""
        raise UserError(
            f"the student's strides {sorted(student)} and the teacher's {theirs}{where} are more than a "
            "factor of 4 apart: choose a student with a level nearer to one of the teacher's"
        )
    return Matching(
        levels=tuple(LevelMatch(s, t, student[s], teacher[t], scale) for s, t in pairs),
        student_only=tuple(sorted(student.keys() - {s for s, _ in pairs})),
        teacher_only=tuple(sorted(teacher.keys() - {t for _, t in pairs})),
    )


# --- inputs of unequal size ------------------------------------------------------------------------------


def input_scale(student: Preprocess, teacher: Preprocess) -> float:
    """The student's pixels over the teacher's, for the same part of an image; 1 for equal input sizes.

    Where it depends on the image's shape (one input keeps the ratio of its sides, the other does not) it is
    that of a photograph, 4:3. It chooses levels alone: what lies where is taken from each image's own sizes.

    Raises:
        UserError: one of the two takes images as they come.
    """
    if (student.size, student.keep_ratio) == (teacher.size, teacher.keep_ratio) or student.size is teacher.size:
        return 1.0
    if student.size is None or teacher.size is None:
        without, given = ("student", "teacher") if student.size is None else ("teacher", "student")
        raise UserError(
            f"the {without} takes images as they come, the {given} brings them to a size of its own, and "
            f"levels cannot be matched: give the {without} a `size`, or the {given} none"
        )
    return _side(student) / _side(teacher)


def same_grid(student: Preprocess, teacher: Preprocess) -> bool:
    """Whether maps of equal stride always have the same cells."""
    return all(getattr(student, what) == getattr(teacher, what) for what in ("size", "keep_ratio", "divisor"))


def describe_input(preprocess: Preprocess) -> str:
    """The size of the input in a few words."""
    if preprocess.size is None:
        return f"images as they come, padded to multiples of {preprocess.divisor}"
    a, b = preprocess.size
    how = f"short × long side {a} × {b}" if preprocess.keep_ratio else f"{a} × {b}, stretched"
    return f"{how}, padded to multiples of {preprocess.divisor}"


def _side(preprocess: Preprocess) -> float:
    """The geometric mean of the sides of a photograph in network input."""
    if not preprocess.keep_ratio:
        return math.sqrt(math.prod(preprocess.stretched()))
    return preprocess.scale(*PHOTOGRAPH) * math.sqrt(math.prod(PHOTOGRAPH))
