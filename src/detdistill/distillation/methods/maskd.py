"""MasKD: masks of tokens that learned where the teacher's detections come from (Huang et al., ICLR 2023).

Stage 1, the teacher frozen: m tokens E per level cut its map T into soft regions, and learn what its detections
need, without overlapping::

    M_i = sigmoid(E_i · T)      p = softmax over tokens of linear(mean of T over pixels)
    L_1 = the teacher's ground-truth losses on Σ_i p_i M_i T in place of T
          + mean over pairs i ≠ j of the Dice coefficient 2 Σ M_i M_j / (Σ M_i² + Σ M_j²)

Stage 2, the tokens frozen, with S after a 1×1 convolution::

    L   = alpha · mean over images of Σ_i p_i · Σ_pixels M_i² mean_c (S - T)² / Σ_pixels M_i

Both happen in one run. Until `token_fraction` of training is over (where its length is unknown: always) the
tokens follow the gradient of L_1, which reaches nothing else, while the student already learns from the masks
as they are: they begin near 1/2 everywhere, plain imitation. After that L_1 is not computed, which saves a run
of the teacher's head, forward and backward, in each step. From `student_masks_from` on, M_i(T) is multiplied by
M_i(S), without gradient. What is reported is L, to which L_1 adds its gradient but not its value; the method's
weight scales both. Segmenters are compared by their class logits in place of maps, as published, with no
convolution between them; L_1 is then the cross-entropy of the masked logits.

Shape legend: N images, C channels, H W rows and columns, P pixels, T tokens.
Reduction: "sum/mask"; the levels are summed.

Paper and code: we follow the code, which squares masks (they multiply both maps) but divides by their plain
sum; the weights are for that. It first trains the tokens for 2000 steps with Adam at 0.01, in a program of its
own, where here they share the student's optimizer. Its detectors use the student's masks from a step on, of
175920: 5000 (FCOS, RepPoints, Faster R-CNN with a Cascade R-CNN as teacher), 7000 and 8500 (RetinaNet with a
ResNet-101 and an X101 as teacher), 7330 (Faster R-CNN). Its segmentation loss never uses them, nor does the
preset "segmentation"; its 0.4 times the same loss on the auxiliary head is left out, as a teacher in evaluation
mode has none here. The code's p has a 3×3 convolution before the mean, which but for the border is again a
linear map of the mean. Some of its configurations add an L1 term on box outputs: add `kd` with `cls_weight: 0`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from detdistill.distillation.adapters import LevelAligner
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.outputs import INSTEAD, SEGMENTATION, SharedClasses, own_draws, pixel_logits
from detdistill.distillation.precision import in_full_precision
from detdistill.errors import UserError
from detdistill.models.base import SegmentationOutputs
from detdistill.recipe.methods import MasKDOptions

LOGITS = "logits"  # the one key of segmenters' tokens
EPS = 1e-12  # beside sums over masks, which are some cells


class MasKDLoss(nn.Module):
    """L of the module's equation, for one level.

    Args:
        alpha: factor on the loss.
    """

    def __init__(self, *, alpha: float = 10.0) -> None:
        super().__init__()
        self.alpha = alpha

    @in_full_precision
    def forward(
        self, student_NCHW: Tensor, teacher_NCHW: Tensor, masks_NTHW: Tensor, shares_NT: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_NCHW, teacher_NCHW: maps of one shape; the teacher is detached.
            masks_NTHW: in (0, 1), detached.
            shares_NT: p, detached; None: every token counts the same.
        """
        # the masks are one for all channels: no tensor of N, T, C, H, W is needed
        squares_NP = (student_NCHW - teacher_NCHW.detach()).square().mean(dim=1).flatten(1)
        masks_NTP = masks_NTHW.detach().flatten(2).to(squares_NP.dtype)
        sums_NT = (masks_NTP.square() @ squares_NP[:, :, None]).squeeze(2)
        means_NT = sums_NT / (masks_NTP.sum(dim=2) + EPS)
        if shares_NT is None:
            return self.alpha * means_NT.mean()
        return self.alpha * (means_NT * shares_NT.detach()).sum(dim=1).mean()

    @in_full_precision
    def overlap(self, masks_NTHW: Tensor) -> Tensor:
        """Stage 1's Dice term, a scalar: the mean over images and pairs; 0 where there is one token."""
        masks_NTP = masks_NTHW.flatten(2)
        products_NTT = masks_NTP @ masks_NTP.transpose(1, 2)
        squares_NT = products_NTT.diagonal(dim1=1, dim2=2)
        dice_NTT = 2 * products_NTT / (squares_NT[:, :, None] + squares_NT[:, None] + EPS)
        images, tokens = masks_NTP.shape[:2]
        others_TT = 1 - torch.eye(tokens, device=masks_NTP.device, dtype=masks_NTP.dtype)
        return (dice_NTT * others_TT).sum() / (images * max(1, tokens * (tokens - 1)))


class ReceptiveTokens(nn.Module):
    """A level's tokens, and how much each counts."""

    def __init__(self, channels: int, tokens: int, weighted: bool) -> None:
        super().__init__()
        self.tokens_TC = nn.Parameter(0.01 * torch.randn(tokens, channels))
        self.share = nn.Linear(channels, tokens) if weighted else None
        if self.share is not None:  # at first all count the same
            nn.init.zeros_(self.share.weight)
            nn.init.zeros_(self.share.bias)

    def masks(self, x_NCHW: Tensor) -> Tensor:
        """M, (N, T, H, W)."""
        return (self.tokens_TC @ x_NCHW.flatten(2)).sigmoid().unflatten(2, x_NCHW.shape[2:])

    def shares(self, x_NCHW: Tensor) -> Tensor | None:
        """p, (N, T)."""
        return None if self.share is None else self.share(x_NCHW.mean(dim=(2, 3))).softmax(dim=1)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Of the teacher's map: the masked map, and the masks (N, T, H, W)."""
        masks_NTHW, shares_NT = self.masks(x_NCHW), self.shares(x_NCHW)
        weighted_NTHW = masks_NTHW if shares_NT is None else masks_NTHW * shares_NT[:, :, None, None]
        return x_NCHW * weighted_NTHW.sum(dim=1, keepdim=True), masks_NTHW


class MasKD(Method):
    """Sum of :class:`MasKDLoss` over the matched levels, and stage 1 beside it.

    The tokens in use are buffers, copied from those that learn for as long as these do: a decaying weight or an
    optimizer's momentum cannot move them later, and a resumed run goes on with the same.
    """

    requires = frozenset({"labels"})

    def __init__(self, context: PairContext, options: MasKDOptions) -> None:
        super().__init__()
        student, teacher = context.student, context.teacher
        if teacher.incomparable:
            raise UserError(
                f"maskd runs the teacher's head on masked maps, and that of a {type(teacher).__name__} runs "
                f"on its own alone: {INSTEAD}"
            )
        if teacher.needs_masks and not (student.needs_masks and student.preprocessor == teacher.preprocessor):
            raise UserError(
                f"maskd's tokens learn from the teacher's own losses, and those of a {type(teacher).__name__} "
                f"want masks, which are at hand only for a student with masks and the same input: {INSTEAD}"
            )
        self.classes = SharedClasses(context, "maskd")
        self.segments = student.task == SEGMENTATION
        if self.segments and self.classes.missing:
            raise UserError(f"maskd wants a teacher that knows all of a segmenter's classes: {INSTEAD}")
        self.loss = MasKDLoss(alpha=options.alpha)
        self.token_fraction, self.student_masks_from = options.token_fraction, options.student_masks_from
        self.learning, self.in_use = nn.ModuleDict(), nn.ModuleDict()
        if self.segments:
            self.requires = frozenset({"outputs", "labels"})
            widths = {LOGITS: len(student.classes)}
        else:
            self.align = LevelAligner(context.matching, options.adapt)
            widths = {str(level.student_stride): level.teacher_channels for level in context.matching.levels}
        for key, width in widths.items():
            learning = ReceptiveTokens(width, options.tokens, options.token_shares)
            self.learning[key] = learning
            self.in_use[key] = as_buffers(learning)

    def forward(self, step: StepOutputs) -> Tensor:
        progress = step.progress
        learns = self.training and (progress is None or progress <= self.token_fraction)
        if learns:
            self.in_use.load_state_dict(self.learning.state_dict())
        terms = []
        for key, student, teacher in self._maps(step):
            tokens = self.in_use[key]
            assert isinstance(tokens, ReceptiveTokens)
            with torch.no_grad():
                masks_NTHW = tokens.masks(teacher)
                if self.student_masks_from < 1 and (progress is None or progress > self.student_masks_from):
                    masks_NTHW = masks_NTHW * tokens.masks(student)
                shares_NT = tokens.shares(teacher)
            terms.append(self.loss(student, teacher, masks_NTHW, shares_NT))
        loss = torch.stack(terms).sum()
        if learns:
            stage_1 = self._stage_1(step)
        else:  # DistributedDataParallel wants a gradient for every parameter, at every step
            stage_1 = torch.stack([parameter.sum() for parameter in self.learning.parameters()]).sum() * 0
        return loss + stage_1 - stage_1.detach()

    def _maps(self, step: StepOutputs) -> Iterator[tuple[str, Tensor, Tensor]]:
        if self.segments:
            yield LOGITS, *pixel_logits(step, self.classes)
            return
        for level, student, teacher in self.align(step):
            yield str(level.student_stride), student, teacher

    def _stage_1(self, step: StepOutputs) -> Tensor:
        if self.segments:
            ((_, _, logits_NQHW),) = self._maps(step)
            masked_NQHW, masks_NTHW = self.learning[LOGITS](logits_NQHW)
            # The logits are in the student's order of classes, as its labels are.
            losses = step.teacher_model.losses(SegmentationOutputs(masked_NQHW), step.student_batch)
            return torch.stack([*losses.values(), self.loss.overlap(masks_NTHW)]).sum()
        pyramid, overlaps = dict(step.teacher), []
        for level in self.align.levels:
            stride = level.teacher_stride
            # two of the student's levels may meet one of the teacher's: it is then masked twice
            pyramid[stride], masks_NTHW = self.learning[str(level.student_stride)](pyramid[stride])
            overlaps.append(self.loss.overlap(masks_NTHW))
        teacher, batch = step.teacher_model, step.teacher_batch
        assert batch.targets is not None, "maskd needs a batch with targets"
        if not self.classes.same:
            batch = replace(batch, targets=self.classes.teacher_targets(batch.targets))
        try:
            # The flag of the detector alone: a two-stage one then samples regions as in training, while the
            # layers below stay in evaluation mode.
            teacher.training = True
            with own_draws(step.generator):
                losses = teacher.losses(teacher.forward_head(pyramid, batch), batch)
        finally:
            teacher.training = False
        return torch.stack([*losses.values(), *overlaps]).sum()


def as_buffers(module: ReceptiveTokens) -> ReceptiveTokens:
    """A copy with the same state dict, of which nothing is trained."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())
    return module
