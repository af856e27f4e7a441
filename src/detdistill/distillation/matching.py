"""Which student level meets which teacher level, and through what: decided once, before training.

Input sizes may differ. What two levels have in common is then not their stride but the part of the image that a
cell covers: a teacher of stride 16 at 640 pixels sees as much of it in a cell as a student of stride 8 at 320.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.errors import UserError
from detdistill.models.base import Batch, Preprocess
from detdistill.recipe.methods import Adapt

if TYPE_CHECKING:
    from detdistill.distillation.signals import Signals


HALF_AN_OCTAVE = 0.5 + 1e-6  # of strides, in powers of 2: two levels that near are the same level
TINY = 1e-6  # a map whose values are no larger has no size to speak of
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


class Overlay:
    """Lays the student's maps over the teacher's: cell over cell that sees the same part of the image.

    Both maps cover their padded inputs from the top left corner. Where each image has the same share of both,
    plain resizing does it, and nothing at all where the maps are of one size. Else, since paddings and rounded
    sizes differ from image to image, each has a scale of its own: with w the image's width in network input, W
    that of the padded input and u in [0, 1] across the teacher's map, the student's map is read at
    u · (w_s / W_s) / (w_t / W_t), and so for rows. Beyond its border, where the teacher sees padding, its last
    cell counts on.

    Args:
        student, teacher: the inputs of one step.
    """

    def __init__(self, student: Batch, teacher: Batch) -> None:
        self._ratios_N2 = None
        if student is teacher:
            return
        (height, width), (height_t, width_t) = student.padded_size, teacher.padded_size
        sizes = list(zip(student.sizes, teacher.sizes, strict=True))
        if any(h * height_t != h_t * height or w * width_t != w_t * width for (h, w), (h_t, w_t) in sizes):
            ratios = [
                (h * height_t / (h_t * height), w * width_t / (w_t * width)) for (h, w), (h_t, w_t) in sizes
            ]
            self._ratios_N2 = _to_device(torch.tensor(ratios), student.images_N3HW.device)

    def __call__(self, student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        """The student's map (N, C, ., .) on the cells of the teacher's (N, ., H, W)."""
        if self._ratios_N2 is None:
            return resize_like(student_NCHW, teacher_NCHW)
        return read_at(student_NCHW, teacher_NCHW.shape[-2:], self._ratios_N2)


def read_at(x_NCHW: Tensor, size: Sequence[int], ratios_N2: Tensor) -> Tensor:
    """(N, C, *size), bilinear: a cell centred at u of the new map's side is read at ratio · u of x's."""
    # By hand: affine_grid multiplies matrices, which an autocast rounds to a thirty-second of a cell.
    dtype = torch.promote_types(x_NCHW.dtype, torch.float32)
    y_NH, x_NW = (
        2 * ratios_N2[:, i, None].to(dtype) * _centres(side, ratios_N2.device, dtype) - 1
        for i, side in enumerate(size)
    )
    grid_NHW2 = torch.stack(torch.broadcast_tensors(x_NW[:, None, :], y_NH[:, :, None]), dim=-1)
    with torch.autocast(x_NCHW.device.type, enabled=False):
        found = F.grid_sample(
            x_NCHW.to(dtype), grid_NHW2, mode="bilinear", padding_mode="border", align_corners=False
        )
    return found.to(x_NCHW.dtype)


def _centres(cells: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(cells,) where the cells' centres are, in [0, 1]."""
    return (torch.arange(cells, device=device, dtype=dtype) + 0.5) / cells


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copied from pinned memory, for which the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


# --- classes ---------------------------------------------------------------------------------------------


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


# --- adapters --------------------------------------------------------------------------------------------


def conv1x1(student_channels: int, teacher_channels: int) -> nn.Module:
    """f_align of the paper's Eq. 1."""
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=1)


def conv3x3(student_channels: int, teacher_channels: int) -> nn.Module:
    return nn.Conv2d(student_channels, teacher_channels, kernel_size=3, padding=1)


class LevelAligner(nn.Module):
    """Brings each matched student level to its teacher level's channels and cells.

    Args:
        matching: from :func:`match_levels`.
        adapt: "auto" puts an adapter where channels differ, "always" everywhere, "never" refuses unequal
            channels.
        adapter: makes one from (student channels, teacher channels).
        unit: divide both maps of a level by the root mean square of the teacher's, in each batch (of each
            process). Published weights of methods that compare raw maps suppose maps of about that size; a
            teacher's may be ten times as large, and squares a hundred times.
    """

    def __init__(
        self,
        matching: Matching,
        adapt: Adapt = "auto",
        adapter: Callable[[int, int], nn.Module] = conv1x1,
        *,
        unit: bool = False,
    ) -> None:
        super().__init__()
        self.levels = matching.levels
        self.unit = unit
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

    def forward(self, signals: Signals) -> Iterator[tuple[LevelMatch, Tensor, Tensor]]:
        """For each matched level (level, student (N, C_t, H_t, W_t), teacher (N, C_t, H_t, W_t))."""
        for level in self.levels:
            s_NCHW = signals.student[level.student_stride]
            t_NCHW = signals.teacher[level.teacher_stride]
            if str(level.student_stride) in self.adapters:
                s_NCHW = self.adapters[str(level.student_stride)](s_NCHW)
            s_NCHW = signals.overlay(s_NCHW, t_NCHW)
            if self.unit:
                factor = unit_factor(t_NCHW)
                s_NCHW, t_NCHW = s_NCHW * factor.to(s_NCHW.dtype), t_NCHW * factor.to(t_NCHW.dtype)
            yield level, s_NCHW, t_NCHW


def unit_factor(teacher_NCHW: Tensor) -> Tensor:
    """1 over the root mean square of a map; 1 for one that is all but 0."""
    # The norm reads the map once and writes none.
    return one_over(torch.linalg.vector_norm(teacher_NCHW, dtype=torch.float32) / teacher_NCHW.numel() ** 0.5)


def one_over(size: Tensor) -> Tensor:
    """1 over a root mean square; 1 where that is all but 0."""
    return torch.where(size > TINY, 1 / size, 1.0)


def resize_like(x_NCHW: Tensor, like_NCHW: Tensor) -> Tensor:
    """Bilinear, where heights and widths differ."""
    if x_NCHW.shape[-2:] == like_NCHW.shape[-2:]:
        return x_NCHW
    return F.interpolate(x_NCHW, size=like_NCHW.shape[-2:], mode="bilinear", align_corners=False)
