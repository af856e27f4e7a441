"""How alike the features of two models are: linear CKA.

Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, §3. Of centered features
X (P, C) and Y (P, D) of the same P cells

    CKA(X, Y) = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖)        (Frobenius norms)

which is 1 for features that differ by a rotation and one scale, and near 0 for unrelated ones. Written with the
covariances of channels it needs no P × P kernel, and the cells may come a part at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from detdistill.distillation.alignment import Alignment
from detdistill.distillation.levels import Matching
from detdistill.models.base import Model


class LinearCKA:
    """Linear CKA of features that come a part at a time; sums in float64, centered before they are squared.

    Parts are merged by Chan, Golub and LeVeque's update of means and scatter (1979): the result does not depend
    on how the cells were cut. Memory: (C + D)² numbers. Few cells raise it: of unrelated features it is about
    √(C·D) / P, no longer small where P is not many times the channels.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean_C = self.scatter_CC = torch.zeros(())  # of both features' channels, side by side
        self.channels = 0

    def update(self, x_PC: Tensor, y_PD: Tensor) -> None:
        """More cells; P may differ from part to part, C and D may not."""
        if x_PC.device.type == "mps":  # which has no float64
            x_PC, y_PD = x_PC.cpu(), y_PD.cpu()
        both_PC = torch.cat((x_PC.detach().double(), y_PD.detach().double()), dim=1)
        mean_C = both_PC.mean(0)
        centered_PC = both_PC - mean_C
        scatter_CC = centered_PC.T @ centered_PC
        if self.count:
            total = self.count + len(both_PC)
            step_C = mean_C - self.mean_C
            between_CC = torch.outer(step_C, step_C) * (self.count * len(both_PC) / total)
            scatter_CC += self.scatter_CC + between_CC
            mean_C = self.mean_C + step_C * (len(both_PC) / total)
        self.mean_C, self.scatter_CC = mean_C, scatter_CC
        self.count += len(both_PC)
        self.channels = x_PC.shape[1]

    def value(self) -> float:
        """In [0, 1]; NaN where one of the features is the same in all cells."""
        if not self.count:
            return math.nan
        c = self.channels
        own_x, own_y = self.scatter_CC[:c, :c].norm(), self.scatter_CC[c:, c:].norm()
        cross = self.scatter_CC[:c, c:].norm()
        return float(cross.square() / (own_x * own_y))


def linear_cka(x_PC: Tensor, y_PD: Tensor) -> float:
    """Linear CKA of two sets of features of the same P cells (or images)."""
    cka = LinearCKA()
    cka.update(x_PC, y_PD)
    return cka.value()


@torch.no_grad()
def feature_agreement(
    student: Model, teacher: Model, matching: Matching, batches: Iterable[Sequence[Tensor]]
) -> dict[int, float]:
    """Linear CKA of the matched levels of two pyramids, over the cells of all images, by the student's stride.

    Levels meet, and the student's maps lie over the teacher's, as in training, but without adapters, since CKA
    compares unequal numbers of channels. Cells that see padding alone are left out. Both models stay in the
    mode that they are in: in training mode BatchNorm takes a batch's own statistics, and moves its averages.

    Args:
        matching: of the two, from ``Pair(student, teacher, …).matching``.
        batches: of images, (3, H, W) each, on the models' device.
    """
    ckas = {level.student_stride: LinearCKA() for level in matching.levels}
    for images in batches:
        student_batch, teacher_batch = student.preprocess(images), teacher.preprocess(images)
        student_pyramid, teacher_pyramid = (
            student.forward_features(student_batch),
            teacher.forward_features_only(teacher_batch),
        )
        alignment = Alignment(student_batch, teacher_batch)
        for level in matching.levels:
            t_NCHW = teacher_pyramid[level.teacher_stride]
            s_NCHW = alignment(student_pyramid[level.student_stride], t_NCHW)
            for i, size in enumerate(teacher_batch.sizes):
                rows, columns = (
                    -(-cells * side // whole)
                    for cells, side, whole in zip(
                        t_NCHW.shape[2:], size, teacher_batch.padded_size, strict=True
                    )
                )
                s_PC, t_PD = (x[i, :, :rows, :columns].flatten(1).T for x in (s_NCHW, t_NCHW))
                ckas[level.student_stride].update(s_PC, t_PD)
    return {stride: cka.value() for stride, cka in ckas.items()}
