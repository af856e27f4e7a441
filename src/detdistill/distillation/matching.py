"""Which student level meets which teacher level, and through what: decided once, before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.config import UserError
from detdistill.models.base import Pyramid

Adapt = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True)
class LevelMatch:
    """One student level and the teacher level that it learns from."""

    student_stride: int
    teacher_stride: int
    student_channels: int
    teacher_channels: int

    @property
    def resized(self) -> bool:
        return self.student_stride != self.teacher_stride


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
            rows.append((
                f"stride {level.student_stride}, {level.student_channels} channels",
                f"stride {level.teacher_stride}, {level.teacher_channels} channels",
                ", ".join(between) or "as it is",
            ))  # fmt: skip
        rows += [(f"stride {stride}", "–", "not distilled") for stride in self.student_only]
        rows += [("–", f"stride {stride}", "not used") for stride in self.teacher_only]
        return rows


def match_levels(student: Mapping[int, int], teacher: Mapping[int, int]) -> Matching:
    """Pair the levels of two pyramids, each given as ``{stride: channels}``.

    Levels of equal stride meet. Only where the two pyramids share no stride does each student level meet
    the teacher level of the nearest stride, at most a factor of 4 away, and is resized to it.

    Raises:
        UserError: no two levels are that near.
    """
    common = sorted(student.keys() & teacher.keys())
    if common:
        pairs = [(stride, stride) for stride in common]
    else:
        nearest = [(s, min(teacher, key=lambda t: abs(math.log2(t / s)))) for s in sorted(student)]
        pairs = [(s, t) for s, t in nearest if abs(math.log2(t / s)) <= 2]
    if not pairs:
        raise UserError(
            f"the student's strides {sorted(student)} and the teacher's {sorted(teacher)} are more than a "
            "factor of 4 apart: choose a student with a level nearer to one of the teacher's"
        )
    return Matching(
        levels=tuple(LevelMatch(s, t, student[s], teacher[t]) for s, t in pairs),
        student_only=tuple(sorted(student.keys() - {s for s, _ in pairs})),
        teacher_only=tuple(sorted(teacher.keys() - {t for _, t in pairs})),
    )


def conv1x1(student_channels: int, teacher_channels: int) -> nn.Module:
    """f_align of the paper's Eq. 1."""
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)


def conv3x3(student_channels: int, teacher_channels: int) -> nn.Module:
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=3, padding=1)


class LevelAligner(nn.Module):
    """Brings each matched student level to its teacher level's channels and size.

    Args:
        matching: from :func:`match_levels`.
        adapt: "auto" puts an adapter where channels differ, "always" everywhere, "never" refuses unequal
            channels.
        adapter: makes one from (student channels, teacher channels).
    """

    def __init__(
        self,
        matching: Matching,
        adapt: Adapt = "auto",
        adapter: Callable[[int, int], nn.Module] = conv1x1,
    ) -> None:
        super().__init__()
        self.levels = matching.levels
        self.adapters = nn.ModuleDict()
        for level in matching.levels:
            differ = level.student_channels != level.teacher_channels
            if differ and adapt == "never":
                raise UserError(
                    f"stride {level.student_stride} has {level.student_channels} channels, the teacher's "
                    f"{level.teacher_channels}, and adapt is 'never': use adapt 'auto'"
                )
            if differ or adapt == "always":
                self.adapters[str(level.student_stride)] = adapter(
                    level.student_channels, level.teacher_channels
                )

    def forward(self, student: Pyramid, teacher: Pyramid) -> Iterator[tuple[LevelMatch, Tensor, Tensor]]:
        """For each matched level (level, student (N, C_t, H_t, W_t), teacher (N, C_t, H_t, W_t))."""
        for level in self.levels:
            s_NCHW = student[level.student_stride]
            t_NCHW = teacher[level.teacher_stride]
            if str(level.student_stride) in self.adapters:
                s_NCHW = self.adapters[str(level.student_stride)](s_NCHW)
            yield level, resize_like(s_NCHW, t_NCHW), t_NCHW


def resize_like(x_NCHW: Tensor, like_NCHW: Tensor) -> Tensor:
    """Bilinear, where heights and widths differ."""
    if x_NCHW.shape[-2:] == like_NCHW.shape[-2:]:
        return x_NCHW
    return F.interpolate(x_NCHW, size=like_NCHW.shape[-2:], mode="bilinear", align_corners=False)
