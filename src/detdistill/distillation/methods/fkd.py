"""FKD: attention-guided and non-local features (Zhang & Ma, ICLR 2021), also known as FBKD.

Where either model looks, features count more; what each pixel sees of the others is imitated too::

    A_s(F) = H·W · softmax over pixels of mean_c |F| / τ
    A_c(F) = C · softmax over channels of mean_p |F| / τ
    M      = (A_s(S) + A_s(T)) / 2, and with channel_mask that times (A_c(S) + A_c(T)) / 2; without gradient
    L      = a · ‖(φ(S) - T) √M‖ + b · ‖linear(mean_p S) - mean_p T‖ + b · ‖conv3×3(mean_c S) - mean_c T‖
           + c · ‖ψ(R_S(S)) - R_T(T)‖
    R(F)   = F + W · V Kᵀ Q / keys       one for the student and one for the teacher, both trained

A norm is that of the whole batch's tensor, neither squared nor averaged: "norm", which grows with √(N·H·W), is
what the published weights are for. reduction "mean" takes mean squares instead; its weights are those of the
preset "mean". The levels are summed. Shape legend: N images, C channels, H W rows and columns, P pixels.

The official repository holds no code; the two variants in circulation are the presets. Of two-stage detectors
the mask is of pixels only, and τ 0.5. Of one-stage detectors channels are masked too, τ is 0.1, and weights are
six times as large. Where the student has other channels than the teacher, A_c(S) is that of φ(S).

Keys are pooled by a maximum over windows of 8, 4, 2, 2 and 2 cells from the finest level; what is left at the
border is dropped, as in circulating code, which fails on maps smaller than a window: here the window is then
the map. In that code non-local blocks end in a BatchNorm that starts at 0; ours have none (it would mix
images), and start as any convolution does, so that all of their parts learn from the first step. Copies of the
authors' code distill all five levels of a two-stage detector, as here; MMRazor's configuration the four finest
(`finest: 4`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.adapters import LevelAligner, conv1x1
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.recipe.methods import FKDOptions

REDUCTIONS = (4, 4)  # channels over a non-local block's own, from the finest level; 2 on the others
POOLS = (8, 4)  # side over which it pools its keys; 2 on the others


class FKDLoss(nn.Module):
    """L of the module's equation, for one level.

    Args:
        feature_weight: a, of the masked features.
        pooled_weight: b, of the channels' and the pixels' means.
        relation_weight: c, of the non-local maps; 0: no such blocks are made.
        tau: temperature of the attention.
        channel_mask: attention weighs channels too.
        reduction: "paper", a norm, or "mean", a mean square.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(
        self,
        *,
        feature_weight: float = 4.2e-4,
        pooled_weight: float = 2.4e-2,
        relation_weight: float = 4.2e-4,
        tau: float = 0.1,
        channel_mask: bool = True,
        reduction: Literal["paper", "mean"] = "paper",
    ) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau must be positive, got {tau}")
        self.feature_weight, self.pooled_weight = feature_weight, pooled_weight
        self.relation_weight, self.tau = relation_weight, tau
        self.channel_mask, self.reduction = channel_mask, reduction

    @in_full_precision
    def forward(
        self,
        student_NCHW: Tensor,
        teacher_NCHW: Tensor,
        *,
        adapted_NCHW: Tensor,
        channels_NC: Tensor,
        pixels_N1HW: Tensor,
        student_relation_NCHW: Tensor | None = None,
        teacher_relation_NCHW: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_NCHW: S, perhaps with other channels; for the mask.
            teacher_NCHW: T, detached.
            adapted_NCHW: φ(S).
            channels_NC, pixels_N1HW: linear(mean_p S) and conv3×3(mean_c S).
            student_relation_NCHW, teacher_relation_NCHW: ψ(R_S(S)) and R_T(T); not detached, R_T learns too.
        """
        t = teacher_NCHW.detach()
        difference = (adapted_NCHW - t) * self._mask(student_NCHW, adapted_NCHW, t).sqrt()
        pooled = self._size(channels_NC - t.mean(dim=(2, 3)))
        pooled = pooled + self._size(pixels_N1HW - t.mean(dim=1, keepdim=True))
        loss = self.feature_weight * self._size(difference) + self.pooled_weight * pooled
        if student_relation_NCHW is None or teacher_relation_NCHW is None:
            return loss
        return loss + self.relation_weight * self._size(student_relation_NCHW - teacher_relation_NCHW)

    @torch.no_grad()
    def _mask(self, student: Tensor, adapted: Tensor, teacher: Tensor) -> Tensor:
        mask = (self._pixels(student) + self._pixels(teacher)) / 2
        if not self.channel_mask:
            return mask
        same = student.shape[1] == teacher.shape[1]
        return mask * (self._channels(student if same else adapted) + self._channels(teacher)) / 2

    def _pixels(self, x: Tensor) -> Tensor:
        """A_s, (N, 1, H, W)."""
        looked_NP = x.abs().mean(dim=1).flatten(1)
        attention_NP = looked_NP.shape[1] * (looked_NP / self.tau).softmax(dim=1)
        return attention_NP.view(len(x), 1, *x.shape[2:])

    def _channels(self, x: Tensor) -> Tensor:
        """A_c, (N, C, 1, 1)."""
        attention_NC = x.shape[1] * (x.abs().mean(dim=(2, 3)) / self.tau).softmax(dim=1)
        return attention_NC[:, :, None, None]

    def _size(self, difference: Tensor) -> Tensor:
        # the norm's gradient is 0 at 0, not infinite
        return difference.square().mean() if self.reduction == "mean" else torch.linalg.vector_norm(difference)


class NonLocal(nn.Module):
    """R: each pixel gets a sum over all others, weighted by dot products (Wang et al., CVPR 2018)."""

    def __init__(self, channels: int, reduction: int, pool: int) -> None:
        super().__init__()
        middle = max(1, channels // reduction)
        self.pool = pool
        self.query, self.key, self.value = (nn.Conv2d(channels, middle, 1) for _ in range(3))
        self.out = nn.Conv2d(middle, channels, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        query_NDP = self.query(x_NCHW).flatten(2)
        window = [min(self.pool, side) for side in x_NCHW.shape[2:]]
        key_NDK, value_NDK = (
            F.max_pool2d(layer(x_NCHW), window).flatten(2) for layer in (self.key, self.value)
        )
        # Without a softmax (V Kᵀ) Q is V (Kᵀ Q): a D×D table in place of one of keys by pixels
        table_NDD = value_NDK @ (key_NDK / key_NDK.shape[2]).transpose(1, 2)
        return x_NCHW + self.out((table_NDD @ query_NDP).unflatten(2, x_NCHW.shape[2:]))


class LevelParts(nn.Module):
    """What FKD learns on one level beside φ."""

    def __init__(self, student_channels: int, teacher_channels: int, position: int, relations: bool) -> None:
        super().__init__()
        self.channels = nn.Linear(student_channels, teacher_channels)
        self.pixels = nn.Conv2d(1, 1, kernel_size=3, padding=1)
        if relations:
            reduction = REDUCTIONS[position] if position < len(REDUCTIONS) else 2
            pool = POOLS[position] if position < len(POOLS) else 2
            self.student_relation = NonLocal(student_channels, reduction, pool)
            self.teacher_relation = NonLocal(teacher_channels, reduction, pool)
            self.relation_adapter = conv1x1(student_channels, teacher_channels)

    # A product of three maps: half precision has no room for it.
    @in_full_precision
    def of_student(self, x_NCHW: Tensor) -> Tensor:
        """ψ(R_S(S))."""
        return self.relation_adapter(self.student_relation(x_NCHW))

    @in_full_precision
    def of_teacher(self, x_NCHW: Tensor) -> Tensor:
        """R_T(T)."""
        return self.teacher_relation(x_NCHW)


class FKD(Method):
    """Sum of :class:`FKDLoss` over the matched levels."""

    def __init__(self, context: PairContext, options: FKDOptions) -> None:
        super().__init__()
        self.align = LevelAligner(context.matching, options.adapt)
        self.parts = nn.ModuleDict({
            str(level.student_stride): LevelParts(
                level.student_channels, level.teacher_channels, position, relations=options.relation_weight != 0
            )
            for position, level in enumerate(context.matching.levels)
        })  # fmt: skip
        self.loss = FKDLoss(
            feature_weight=options.feature_weight,
            pooled_weight=options.pooled_weight,
            relation_weight=options.relation_weight,
            tau=options.tau,
            channel_mask=options.channel_mask,
            reduction=options.reduction,
        )

    def forward(self, step: StepOutputs) -> Tensor:
        terms = []
        for level, adapted, teacher in self.align(step):
            parts = self.parts[str(level.student_stride)]
            assert isinstance(parts, LevelParts)
            student = step.alignment(step.student[level.student_stride], teacher)
            relations = {}
            if self.loss.relation_weight:
                relations = {
                    "student_relation_NCHW": parts.of_student(student),
                    "teacher_relation_NCHW": parts.of_teacher(teacher),
                }
            terms.append(
                self.loss(
                    student,
                    teacher,
                    adapted_NCHW=adapted,
                    channels_NC=parts.channels(student.mean(dim=(2, 3))),
                    pixels_N1HW=parts.pixels(student.mean(dim=1, keepdim=True)),
                    **relations,
                )
            )
        return torch.stack(terms).sum()
