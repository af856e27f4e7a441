"""FGD: focal and global distillation, by boxes, attention and context (Yang et al., CVPR 2022).

Objects and background apart, each pixel and channel by the teacher's attention; the student's attention; and
the maps after a block of global context::

    A_s(F) = H·W · softmax over pixels of mean_c |F| / τ    A_c(F) = C · softmax over channels of mean_p |F| / τ
    M_f    = max over the boxes on a cell of 1 / (h w)      M_b    = 1 / (cells without a box) on those cells
    L      = 1/N · ( α Σ M_f A_s(T) A_c(T) (S - T)² + β Σ M_b A_s(T) A_c(T) (S - T)²
                     + γ (|A_s(T) - A_s(S)|₁ + |A_c(T) - A_c(S)|₁) + λ Σ (R_S(S) - R_T(T))² )
    R(F)   = F + W₂ ReLU(LN(W₁ Σ_p softmax_p(W_k F) F_p))   R_S and R_T have weights of their own, all trained

S is the student's map after a 1×1 convolution where channels differ.
Shape legend: N images, C channels, H W rows and columns, P = H·W pixels, K objects of an image.
Reduction: "sum/N" for each level; the levels are summed.

We follow the published code where the paper's settings differ (γ for one-stage detectors is 1e-3 in the paper,
and τ 0.5 everywhere), but not its masks: h and w are of the cells that the box touches (the code's reach one
cell further), and boxes are mapped by the padded size, which the map covers (the code's by the unpadded one).
W_k has no bias: a softmax does not see it. Their runs clip gradients at a norm of 35, and may start from the
teacher's neck and head ("inheriting"): here `inherit: true` in the recipe, of no method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from detdistill.distillation.adapters import LevelAligner, one_over
from detdistill.distillation.correlation import channel_parts
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.distillation.regions import boxes_in_cells, touched_cells
from detdistill.models.base import Batch
from detdistill.recipe.methods import FGDOptions


class FGDLoss(nn.Module):
    """L of the module's equation, for one level.

    Args:
        foreground_weight, background_weight: α and β, of the features on and off the objects.
        attention_weight: γ, of the attention maps.
        relation_weight: λ, of the maps with their global context; 0: no context blocks are made.
        tau: temperature of the attention.
    """

    def __init__(
        self,
        *,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        relation_weight: float = 5e-6,
        tau: float = 0.5,
    ) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau must be positive, got {tau}")
        self.foreground_weight, self.background_weight = foreground_weight, background_weight
        self.attention_weight, self.relation_weight = attention_weight, relation_weight
        self.tau = tau

    @in_full_precision
    def forward(
        self,
        student_NCHW: Tensor,
        teacher_NCHW: Tensor,
        foreground_NHW: Tensor,
        background_NHW: Tensor,
        student_context: GlobalContext | None = None,
        teacher_context: GlobalContext | None = None,
        unit: bool = False,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_NCHW, teacher_NCHW: maps of one shape; the teacher is detached.
            foreground_NHW, background_NHW: M_f and M_b.
            student_context, teacher_context: the blocks of R_S and R_T; None: R(F) = F for both.
            unit: both maps are first divided by the root mean square of the teacher's. Applied to sums, it
                costs no further maps.
        """
        s_NCP, t_NCP = student_NCHW.flatten(2), teacher_NCHW.detach().flatten(2)
        n, channels, pixels = s_NCP.shape
        contexts = (student_context, teacher_context)
        keys = [s_NCP.new_zeros(channels) if context is None else context.key_C for context in contexts]
        size_NP, size_NC, score_NP, norm = _teacher_sums(t_NCP, keys[1].detach())
        factor = one_over(norm / t_NCP.numel() ** 0.5) if unit else torch.ones_like(norm)
        pixels_t_NP, channels_t_NC = self._attention(factor * size_NP, factor * size_NC)

        focus_NHW = self.foreground_weight * foreground_NHW + self.background_weight * background_NHW
        focus_NP = focus_NHW.flatten(1).to(s_NCP.dtype) * pixels_t_NP
        pool_t_NP = (factor * score_NP).softmax(dim=1)
        sums = _MapSums.apply(s_NCP, t_NCP, focus_NP, pool_t_NP, *(factor * key_C for key_C in keys))
        size_NP, size_NC, difference_NC, pooled_s_NC, pooled_t_NC = (factor * of for of in sums[:5])
        squares_NC, focal_NC = (factor**2 * of for of in sums[5:])

        focal = (focal_NC * channels_t_NC).sum()
        pixels_s_NP, channels_s_NC = self._attention(size_NP, size_NC)
        attention = (pixels_t_NP - pixels_s_NP).abs().sum() + (channels_t_NC - channels_s_NC).abs().sum()
        relation = squares_NC.sum()
        if student_context and teacher_context:
            shift_NC = student_context(pooled_s_NC) - teacher_context(pooled_t_NC)
            # Σ (difference + shift)², multiplied out
            relation = relation + (shift_NC * (2 * difference_NC + pixels * shift_NC)).sum()
        return (focal + self.attention_weight * attention + self.relation_weight * relation) / n

    def _attention(self, size_NP: Tensor, size_NC: Tensor) -> tuple[Tensor, Tensor]:
        """A_s (N, P) and A_c (N, C) from Σ_c |F| and Σ_p |F|."""
        pixels, channels = size_NP.shape[1], size_NC.shape[1]
        pixels_NP = pixels * (size_NP / (channels * self.tau)).softmax(dim=1)
        return pixels_NP, channels * (size_NC / (pixels * self.tau)).softmax(dim=1)


class GlobalContext(nn.Module):
    """R(F) - F: what a block of global context (GcBlock, Cao et al. 2019) adds to all pixels of a map.

    It starts at 0, as there. The loss pools the map by ``key_C`` (W_k) for it, beside all else that it sums.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = max(1, channels // 2)
        self.key_C = nn.Parameter(torch.randn(channels) * (2 / channels) ** 0.5)  # He et al.'s, as in the code
        self.transform = nn.Sequential(
            nn.Linear(channels, middle), nn.LayerNorm(middle), nn.ReLU(), nn.Linear(middle, channels)
        )
        for parameter in self.transform[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, pooled_NC: Tensor) -> Tensor:
        """From the map's pixels, pooled, (N, C) to the same."""
        return self.transform(pooled_NC)


class FGD(Method):
    """Sum of :class:`FGDLoss` over the matched levels."""

    requires = frozenset({"labels"})

    def __init__(self, pair_context: PairContext, options: FGDOptions) -> None:
        super().__init__()
        self.align = LevelAligner(pair_context.matching, options.adapt)
        self.unit = options.unit
        self.loss = FGDLoss(
            foreground_weight=options.foreground_weight,
            background_weight=options.background_weight,
            attention_weight=options.attention_weight,
            relation_weight=options.relation_weight,
            tau=options.tau,
        )
        self.student_context, self.teacher_context = nn.ModuleDict(), nn.ModuleDict()
        if options.relation_weight:
            for level in pair_context.matching.levels:
                self.student_context[str(level.student_stride)] = GlobalContext(level.teacher_channels)
                self.teacher_context[str(level.student_stride)] = GlobalContext(level.teacher_channels)

    def forward(self, step: StepOutputs) -> Tensor:
        terms = []
        for level, s, t in self.align(step):
            key = str(level.student_stride)
            context: list[Any] = [None, None]
            if self.loss.relation_weight:
                context = [self.student_context[key], self.teacher_context[key]]
            terms.append(self.loss(s, t, *focal_masks(step.teacher_batch, t), *context, self.unit))
        return torch.stack(terms).sum()


def focal_masks(batch: Batch, map_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """M_f and M_b of the module's equation, (N, H, W) float32 each."""
    height, width = map_NCHW.shape[-2:]
    foreground = []
    for boxes_K4 in boxes_in_cells(batch, map_NCHW):
        touched_KHW = touched_cells(boxes_K4, height, width).float()
        shares_KHW = touched_KHW / touched_KHW.sum(dim=(1, 2), keepdim=True)
        nothing_1HW = shares_KHW.new_zeros(1, height, width)  # where there are no boxes
        foreground.append(torch.cat([nothing_1HW, shares_KHW]).amax(dim=0))
    foreground_NHW = torch.stack(foreground)
    free_NHW = (foreground_NHW == 0).float()
    return foreground_NHW, free_NHW / free_NHW.sum(dim=(1, 2), keepdim=True).clamp(min=1)


# A map is read as seldom as can be, a few channels at a time, and gradients are written by hand: left to
# autograd, each use of a map makes a map of gradients, and FGD's many uses cost several times as much. Weighted
# sums are matrix products with the weights as a row; as a column they are ten times slower on a CPU.


def _teacher_sums(t_NCP: Tensor, key_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_c |t| (N, P), Σ_p |t| (N, C), Σ_c key_c t (N, P), and the norm of the map."""
    n, _, pixels = t_NCP.shape
    size_NP, score_NP = t_NCP.new_zeros(2, n, pixels)
    columns, norms = [], []
    for part_NCP, part_1C1, work_NCP in channel_parts(t_NCP, key_C[None, :, None], work=1):
        score_NP += _sum_channels(part_NCP, part_1C1[..., 0].expand(n, -1))
        torch.abs(part_NCP, out=work_NCP)
        size_NP += work_NCP.sum(dim=1)
        columns.append(work_NCP.sum(dim=2))
        norms.append(torch.linalg.vector_norm(work_NCP))
    return size_NP, torch.cat(columns, dim=1), score_NP, torch.linalg.vector_norm(torch.stack(norms))


class _MapSums(torch.autograd.Function):
    """Of a student's and a teacher's map (N, C, P), with d = s - t and weights of pixels (N, P):

    Σ_c |s| (N, P), and (N, C) each: Σ_p |s|, Σ_p d, s pooled by softmax_p(Σ_c key_c s), t pooled by what that
    is of its own key (``pool_t_NP``), Σ_p d², Σ_p weights · d². Differentiable by s and both keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        s_NCP: Tensor,
        t_NCP: Tensor,
        weights_NP: Tensor,
        pool_t_NP: Tensor,
        key_s_C: Tensor,
        key_t_C: Tensor,
    ) -> tuple[Tensor, ...]:
        n = len(s_NCP)
        size_NP, score_NP = torch.zeros_like(weights_NP), torch.zeros_like(weights_NP)
        rows_N2P = torch.stack([torch.ones_like(weights_NP), weights_NP], dim=1)
        columns = []
        for s, t, key_1C1, work in channel_parts(s_NCP, t_NCP, key_s_C[None, :, None], work=1):
            score_NP += _sum_channels(s, key_1C1[..., 0].expand(n, -1))
            torch.abs(s, out=work)
            size_NP += work.sum(dim=1)
            size_NC = work.sum(dim=2)
            difference_NC = torch.sub(s, t, out=work).sum(dim=2)
            squares_N2C = rows_N2P @ work.square_().transpose(1, 2)
            columns.append((size_NC, difference_NC, _sum_pixels(t, pool_t_NP), *squares_N2C.unbind(1)))
        size_NC, difference_NC, pooled_t_NC, squares_NC, weighted_NC = (
            torch.cat(parts, dim=1) for parts in zip(*columns, strict=True)
        )
        pool_s_NP = score_NP.softmax(dim=1)
        pooled_s_NC = _sum_pixels(s_NCP, pool_s_NP)
        ctx.save_for_backward(s_NCP, t_NCP, weights_NP, pool_s_NP, pool_t_NP, key_s_C)
        return size_NP, size_NC, difference_NC, pooled_s_NC, pooled_t_NC, squares_NC, weighted_NC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        s_NCP, t_NCP, weights_NP, pool_s_NP, pool_t_NP, key_s_C = ctx.saved_tensors
        by_size_NP, by_size_NC, by_difference_NC, by_pooled_s_NC, by_pooled_t_NC, *by_squares = gradients
        by_squares_NC, by_weighted_NC = by_squares
        by_score_s_NP = _by_score(s_NCP, pool_s_NP, by_pooled_s_NC)
        by_score_t_NP = _by_score(t_NCP, pool_t_NP, by_pooled_t_NC)
        # What does not depend on the map has rank 3.
        rows_N3P = torch.stack([torch.ones_like(pool_s_NP), pool_s_NP, by_score_s_NP], dim=1)
        columns_NC3 = torch.stack([by_difference_NC, by_pooled_s_NC, key_s_C.expand_as(by_pooled_s_NC)], dim=2)
        slopes = [x[..., None] for x in (2 * by_squares_NC, 2 * by_weighted_NC, by_size_NC)]
        gradient_NCP, by_keys = torch.empty_like(s_NCP), []
        for s, t, here, columns, squares, weighted, size, factor, sign in channel_parts(
            s_NCP, t_NCP, gradient_NCP, columns_NC3, *slopes, work=2
        ):
            by_keys.append([_sum_pixels(*x).sum(dim=0) for x in ((s, by_score_s_NP), (t, by_score_t_NP))])
            torch.sub(s, t, out=here).mul_(torch.mul(weighted, weights_NP[:, None], out=factor).add_(squares))
            here.addcmul_(torch.sgn(s, out=sign), torch.add(size, by_size_NP[:, None], out=factor))
            here.baddbmm_(columns, rows_N3P)
        return gradient_NCP, None, None, None, *(torch.cat(parts) for parts in zip(*by_keys, strict=True))


def _by_score(x_NCP: Tensor, pool_NP: Tensor, by_pooled_NC: Tensor) -> Tensor:
    """Gradient (N, P) by the scores of which ``pool_NP`` is the softmax, of x pooled by it."""
    by_pool_NP = _sum_channels(x_NCP, by_pooled_NC)
    return pool_NP * (by_pool_NP - (pool_NP * by_pool_NP).sum(dim=1, keepdim=True))


def _sum_pixels(x_NCP: Tensor, weights_NP: Tensor) -> Tensor:
    """(N, C)."""
    return (weights_NP[:, None] @ x_NCP.transpose(1, 2)).squeeze(1)


def _sum_channels(x_NCP: Tensor, weights_NC: Tensor) -> Tensor:
    """(N, P)."""
    return (weights_NC[:, None] @ x_NCP).squeeze(1)
