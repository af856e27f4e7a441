"""What brings the student's maps to the teacher's channels, cells and size of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from detdistill.distillation.levels import LevelMatch, Matching
from detdistill.distillation.method import StepOutputs
from detdistill.errors import UserError
from detdistill.recipe.methods import Adapt

TINY = 1e-6  # a map whose values are no larger has no size to speak of


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

    def forward(self, step: StepOutputs) -> Iterator[tuple[LevelMatch, Tensor, Tensor]]:
        """For each matched level (level, student (N, C_t, H_t, W_t), teacher (N, C_t, H_t, W_t))."""
        for level in self.levels:
            s_NCHW = step.student[level.student_stride]
            t_NCHW = step.teacher[level.teacher_stride]
            if str(level.student_stride) in self.adapters:
                s_NCHW = self.adapters[str(level.student_stride)](s_NCHW)
            s_NCHW = step.alignment(s_NCHW, t_NCHW)
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
