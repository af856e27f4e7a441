"""GID: features, relations and responses where student and teacher disagree (Dai et al., CVPR 2021).

General instances are chosen first: with p = max_Q σ(class logits) of an anchor, those of the largest
|p_T - p_S|, each with the box of the more confident model, after class-agnostic suppression; no ground truth is
used. With R of them in the batch, pooled to F (C, 10, 10) from both pyramids::

    L_feature  = feature_weight · Σ (F_T - F_S)² / (R · 100)
    L_relation = relation_weight · Σ_ij smooth-L1(D_T, D_S)_ij / (R (R - 1)),  D_ij = |F_i - F_j|₂ / its mean
                 over i ≠ j; 0 if R < 3
    L_class    = cls_weight · Σ BCE(z_S, σ(z_T)) / n      over the n anchors that would answer for an instance,
    L_box      = box_weight · Σ |d_T - d_S| / n           were the instances objects; d is the head's encoding,
                                                          of distributions the mean

Shape legend: N images, P anchors of all levels, Q classes, R instances of the batch, C channels.
Reduction: "sum/R" (over R and the 100 cells, not over C), "mean" over pairs, "sum/n".

Paper and code: there is no official code. We follow the published re-implementation's equations and weights,
of RetinaNet, with what it means to do: its adapters are never applied, and its boxes carry gradient. The
distances of L_box are L1 there (smooth L1 with beta 0); ``box_beta`` has others. The classes' cross-entropy
keeps the teacher's entropy, so that the loss of an equal student is not 0. Relations are of the instances of
a process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image, nms, roi_align

from detdistill.distillation.adapters import LevelAligner, conv3x3
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.outputs import (
    INSTEAD,
    SharedClasses,
    box_outputs,
    class_logits,
    require_alike_heads,
    require_same_grid,
)
from detdistill.distillation.precision import in_full_precision
from detdistill.distillation.regions import in_cells, stride_of_boxes
from detdistill.errors import UserError
from detdistill.models.base import Batch, DenseOutputs, HeadOutputs, Model
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.heads import avg_factor
from detdistill.recipe.methods import GIDOptions

POOLED = 10
CANDIDATES = 3000  # anchors of an image before suppression
NMS_THRESHOLD = 0.3


class GIDLoss(nn.Module):
    """The module's three terms. Computed in float32 whatever the autocast.

    Args:
        feature_weight, relation_weight, cls_weight, box_weight: factors on the terms.
        box_beta: where the smooth L1 of encoded boxes turns into a line; 0 is L1.

    Raises:
        ValueError: a negative box_beta.
    """

    def __init__(
        self,
        *,
        feature_weight: float = 5e-4,
        relation_weight: float = 40.0,
        cls_weight: float = 0.1,
        box_weight: float = 1.0,
        box_beta: float = 0.0,
    ) -> None:
        super().__init__()
        if box_beta < 0:
            raise ValueError(f"box_beta must not be negative, got {box_beta}")
        self.feature_weight, self.relation_weight = feature_weight, relation_weight
        self.cls_weight, self.box_weight, self.box_beta = cls_weight, box_weight, box_beta

    @in_full_precision
    def forward(
        self,
        student_RCHW: Tensor,
        teacher_RCHW: Tensor,
        student_cls_NPQ: Tensor | None = None,
        teacher_cls_NPQ: Tensor | None = None,
        student_box_NP4: Tensor | None = None,
        teacher_box_NP4: Tensor | None = None,
        chosen_NP: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; the teacher is detached.

        Args:
            student_RCHW, teacher_RCHW: pooled instances; R may be 0.
            student_cls_NPQ, teacher_cls_NPQ: class logits; None leaves the response terms out.
            student_box_NP4, teacher_box_NP4: boxes in the head's encoding.
            chosen_NP: bool, the anchors of the response terms.
        """
        teacher_RCHW = teacher_RCHW.detach()
        count, _, height, width = student_RCHW.shape
        squares = (teacher_RCHW - student_RCHW).square().sum()
        loss = self.feature_weight * squares / (avg_factor(squares.new_full((), count)) * height * width)
        if count >= 3:
            s_RR, t_RR = (distances(x.flatten(1)) for x in (student_RCHW, teacher_RCHW))
            relation = F.smooth_l1_loss(s_RR, t_RR, reduction="sum") / (count * (count - 1))
            loss = loss + self.relation_weight * relation
        if student_cls_NPQ is None:
            return loss
        assert teacher_cls_NPQ is not None
        assert student_box_NP4 is not None
        assert teacher_box_NP4 is not None
        assert chosen_NP is not None
        chosen = chosen_NP.to(loss.dtype)
        n = avg_factor(chosen.sum())
        bce_NPQ = F.binary_cross_entropy_with_logits(
            student_cls_NPQ, teacher_cls_NPQ.detach().sigmoid(), reduction="none"
        )
        box_NP4 = F.smooth_l1_loss(
            student_box_NP4, teacher_box_NP4.detach(), beta=self.box_beta, reduction="none"
        )
        cls, box = ((x * chosen[..., None]).sum() / n for x in (bce_NPQ, box_NP4))
        return loss + self.cls_weight * cls + self.box_weight * box


class GID(Method):
    """Binds :class:`GIDLoss` to two one-stage detectors with the same strides.

    Student and teacher are compared anchor by anchor. Of unlike heads, which the response terms cannot compare,
    each cell's best anchor is taken. An instance is pooled from the level of its size (FPN's rule), or from the
    nearest that is matched.
    """

    requires = frozenset({"outputs"})

    def __init__(self, context: PairContext, options: GIDOptions) -> None:
        super().__init__()
        student, teacher = context.student, context.teacher
        if not (isinstance(student, OneStage) and isinstance(teacher, OneStage)):
            raise UserError(f"gid chooses anchors by their class scores, so both must be one-stage: {INSTEAD}")
        require_same_grid(context, "gid")
        self.responses = options.cls_weight > 0 or options.box_weight > 0
        instead = "use gid's cls_weight 0 and box_weight 0, which compare no responses"
        self.classes = None  # where no class is shared, each has the scores of all of its own
        if self.responses or context.classes.pairs:
            self.classes = SharedClasses(context, "gid", instead=instead)
        try:
            require_alike_heads(context, "gid", instead)
            self.by_anchor = True
        except UserError:
            if self.responses:
                raise
            self.by_anchor = False
        self.align = LevelAligner(context.matching, options.adapt, adapter=cache(conv3x3))
        self.loss = GIDLoss(
            feature_weight=options.feature_weight,
            relation_weight=options.relation_weight,
            cls_weight=options.cls_weight,
            box_weight=options.box_weight,
            box_beta=options.box_beta,
        )
        self.instances, self.min_side = options.instances, options.min_side

    def forward(self, step: StepOutputs) -> Tensor:
        student, teacher = step.student_outputs, step.teacher_outputs
        assert isinstance(student, DenseOutputs)
        assert isinstance(teacher, DenseOutputs)
        assert isinstance(step.student_model, OneStage)
        assert isinstance(step.teacher_model, OneStage)
        instances = self._choose(step)
        pooled = self._pool(step, instances)
        if not self.responses:
            return self.loss(*pooled)
        assert self.classes is not None
        model = step.student_model
        anchors = model.anchors(student.cls, step.student_batch)
        return self.loss(
            *pooled,
            *self.classes(
                class_logits(student, self.classes.student_count),
                class_logits(teacher, self.classes.teacher_count),
            ),
            box_outputs(student, model.head),
            box_outputs(teacher, step.teacher_model.head),
            torch.stack([model.match(boxes_K4, anchors) >= 0 for boxes_K4 in instances]),
        )

    @torch.no_grad()
    def _choose(self, step: StepOutputs) -> list[Tensor]:
        """The general instances of each image, (K, 4) xyxy in network input."""
        views = (
            (step.student_model, step.student_outputs, step.student_batch),
            (step.teacher_model, step.teacher_outputs, step.teacher_batch),
        )
        shared = (None, None) if self.classes is None else (self.classes.student, self.classes.teacher)
        (score_NP, boxes_NP4), (t_score_NP, t_boxes_NP4) = (
            self._view(*view, cut) for view, cut in zip(views, shared, strict=True)
        )
        difference_NP = t_score_NP - score_NP
        boxes_NP4 = torch.where(difference_NP[..., None] > 0, t_boxes_NP4, boxes_NP4)
        chosen = []
        for difference_P, boxes_P4, size in zip(
            difference_NP, boxes_NP4, step.student_batch.sizes, strict=True
        ):
            boxes_P4 = clip_boxes_to_image(boxes_P4, size)
            large_P = (boxes_P4[:, 2:] - boxes_P4[:, :2]).amin(dim=1) > self.min_side
            score_P = torch.where(large_P, difference_P.abs(), -1.0)
            best_M, at_M = score_P.topk(min(CANDIDATES, len(score_P)))
            boxes_M4 = boxes_P4[at_M]
            kept = nms(boxes_M4, best_M, NMS_THRESHOLD)[: self.instances]
            chosen.append(boxes_M4[kept[best_M[kept] >= 0]])
        return chosen

    def _view(
        self, model: Model, outputs: HeadOutputs | None, batch: Batch, cut: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """What one model sees: scores (N, P) and boxes (N, P, 4), of anchors or of each cell's best anchor."""
        assert isinstance(model, OneStage)
        assert isinstance(outputs, DenseOutputs)
        logits_NPQ = class_logits(outputs, len(model.classes))
        score_NP = (logits_NPQ if cut is None else cut(logits_NPQ)).sigmoid().amax(dim=2)
        boxes_NP4 = model.boxes(outputs, batch)
        if self.by_anchor:
            return score_NP, boxes_NP4
        count = model.anchor_generator.num_anchors_per_location()[0]
        score_NP, best_NP = score_NP.unflatten(1, (-1, count)).max(dim=2)
        index = best_NP[..., None, None].expand(-1, -1, 1, 4)
        return score_NP, boxes_NP4.unflatten(1, (-1, count)).gather(2, index).squeeze(2)

    def _pool(self, step: StepOutputs, instances: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Every instance's (C, 10, 10), of student and teacher, from the level of its size."""
        strides = [level.student_stride for level in self.align.levels]
        level_R = stride_of_boxes(torch.cat(list(instances)), strides)
        student: list[Tensor] = []
        teacher: list[Tensor] = []
        for level, s_NCHW, t_NCHW in self.align(step):
            boxes = [in_cells(boxes_K4, step.teacher_batch, t_NCHW) for boxes_K4 in instances]
            here_R111 = (level_R == level.student_stride)[:, None, None, None]
            for x, pooled in ((s_NCHW, student), (t_NCHW, teacher)):
                regions = roi_align(x.float(), boxes, POOLED, sampling_ratio=2, aligned=True)
                pooled.append(torch.where(here_R111, regions, 0))
        return torch.stack(student).sum(dim=0), torch.stack(teacher).sum(dim=0)


def distances(x_RD: Tensor) -> Tensor:
    """(R, R) Euclidean distances over their mean off the diagonal; R at least 2."""
    x_RD = x_RD - x_RD.mean(dim=0)  # or the products would round small distances away
    square_R = x_RD.square().sum(dim=1)
    square_RR = square_R[:, None] + square_R - 2 * x_RD @ x_RD.T
    count = len(x_RD)
    apart_RR = (square_RR > 0) & ~torch.eye(count, dtype=torch.bool, device=x_RD.device)
    # The root's slope is infinite at 0: no 0 goes into it, also where it is not taken.
    distance_RR = torch.where(apart_RR, torch.where(apart_RR, square_RR, 1).sqrt(), 0)
    mean = distance_RR.sum() / (count * (count - 1))
    return distance_RR / mean.clamp(min=1e-6)
