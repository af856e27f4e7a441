"""LD: localization distillation, of the distributions of box sides (Zheng et al., CVPR 2022).

For heads that predict each side of a box as a distribution over bins (GFL). With
KD(z_S, z_T; τ) = τ² · mean over bins of softmax(z_T/τ) · log(softmax(z_T/τ) / softmax(z_S/τ)), on each level::

    main LD  = main_weight · 2/N · Σ_{positive anchors} Σ_4 max_Q σ(z_S) · KD(box_S, box_T; temperature) / 4
    VLR LD   = vlr_weight · 2/N · Σ_anchors Σ_4 v · KD(box_S, box_T; temperature) / 16
    main KD  = kd_weight · mean over positive anchors of KD(cls_S, cls_T; kd_temperature)

The valuable localization region (VLR) is what nearly answers for an object: alpha · t <= DIoU < t, where t is
ATSS's threshold, and v the anchor's IoU. Positive are the anchors of the student's own assignment.

Shape legend: N images, P anchors of a level, Q classes, B bins, K objects.
Reduction: "sum" over two images and the levels for main LD and VLR LD, "mean" over each level's positive
anchors, summed over levels, for main KD. The published code sums over the batch, which is 2 images of a
process; over a batch of 16 such a sum would be half of the whole loss. 2/N keeps the published weights what
they were.

Paper and code: the code's divisors 4 and 16, its mean over bins, and its missing division by the number of
positive anchors are followed; its KD of classes in the VLR is multiplied by 0 there and left out here. With
cells instead of anchors (region "inside", FCOS) the VLR is the cells within an object that are not positive,
and v the student's score. Imitation of features, which the published runs add, is a method of its own: mimic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, distance_box_iou

from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.outputs import INSTEAD, SharedClasses, require_alike_heads, tempered_kl
from detdistill.distillation.precision import in_full_precision
from detdistill.errors import UserError
from detdistill.models.base import DenseOutputs
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.assignment import atss_thresholds, center_depths, nearest_anchors
from detdistill.models.layers.heads import avg_factor, flatten_maps
from detdistill.recipe.methods import LDOptions

PUBLISHED_IMAGES = 2  # of a process, over which the published sums go


class LDLoss(nn.Module):
    """The module's three terms on one level. Computed in float32 whatever the autocast.

    Args:
        main_weight, vlr_weight, kd_weight: factors on main LD, VLR LD and main KD.
        temperature: of the distributions of box sides.
        kd_temperature: of the classes.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(
        self,
        *,
        main_weight: float = 0.25,
        vlr_weight: float = 0.25,
        kd_weight: float = 10.0,
        temperature: float = 10.0,
        kd_temperature: float = 2.0,
    ) -> None:
        super().__init__()
        if temperature <= 0 or kd_temperature <= 0:
            raise ValueError(f"temperatures must be positive, got {temperature} and {kd_temperature}")
        self.main_weight, self.vlr_weight, self.kd_weight = main_weight, vlr_weight, kd_weight
        self.temperature, self.kd_temperature = temperature, kd_temperature

    @in_full_precision
    def forward(
        self,
        student_box_NP4B: Tensor,
        teacher_box_NP4B: Tensor,
        student_cls_NPQ: Tensor,
        teacher_cls_NPQ: Tensor,
        positive_NP: Tensor,
        vlr_NP: Tensor,
    ) -> Tensor:
        """The loss, a scalar; the teacher is detached.

        Args:
            student_box_NP4B, teacher_box_NP4B: logits of the sides' bins.
            student_cls_NPQ, teacher_cls_NPQ: class logits.
            positive_NP: bool, the anchors that answer for an object.
            vlr_NP: v, 0 outside the region; detached.
        """
        positive = positive_NP.to(student_box_NP4B.dtype)
        bins, classes = student_box_NP4B.shape[3], student_cls_NPQ.shape[2]
        box_NP = tempered_kl(student_box_NP4B, teacher_box_NP4B.detach(), self.temperature).sum(dim=2) / bins
        cls_NP = tempered_kl(student_cls_NPQ, teacher_cls_NPQ.detach(), self.kd_temperature) / classes
        score_NP = student_cls_NPQ.detach().sigmoid().amax(dim=2)
        two_images = PUBLISHED_IMAGES / len(box_NP)
        main = two_images * (positive * score_NP * box_NP).sum() / 4
        vlr = two_images * (vlr_NP.detach() * box_NP).sum() / 16
        kd = (positive * cls_NP).sum() / avg_factor(positive.sum())
        return self.main_weight * main + self.vlr_weight * vlr + self.kd_weight * kd


class LD(Method):
    """Sum of :class:`LDLoss` over the matched levels, for two alike heads with distributions."""

    requires = frozenset({"outputs", "labels"})

    def __init__(self, context: PairContext, options: LDOptions) -> None:
        super().__init__()
        student, teacher = context.student, context.teacher
        one_stage = isinstance(student, OneStage) and isinstance(teacher, OneStage)
        other = "the method kd or crosskd" if one_stage else INSTEAD.removeprefix("use ")
        for model in (student, teacher):
            if not isinstance(model, OneStage) or model.head.bins is None:
                raise UserError(
                    f"ld compares distributions of box sides, and {type(model).__name__} predicts none: use a "
                    f"family with a distributional head (gfl), or {other}"
                )
        assert isinstance(student, OneStage)
        assert isinstance(teacher, OneStage)
        ours, theirs = student.head.bins, teacher.head.bins
        if ours != theirs:
            raise UserError(
                f"ld compares distributions bin by bin, the student's {ours} with the teacher's {theirs}: use "
                "a teacher with as many bins, or the method crosskd"
            )
        require_alike_heads(context, "ld")
        self.classes = SharedClasses(context, "ld")
        self.strides = [level.student_stride for level in context.matching.levels]
        self.loss = LDLoss(
            main_weight=options.main_weight,
            vlr_weight=options.vlr_weight,
            kd_weight=options.kd_weight,
            temperature=options.temperature,
            kd_temperature=options.kd_temperature,
        )
        self.region, self.alpha, self.topk = options.region, options.alpha, options.topk

    def forward(self, step: StepOutputs) -> Tensor:
        student, teacher, model = step.student_outputs, step.teacher_outputs, step.student_model
        assert isinstance(student, DenseOutputs)
        assert isinstance(teacher, DenseOutputs)
        assert isinstance(model, OneStage)
        assert model.head.bins is not None
        targets = step.student_batch.targets
        assert targets is not None, "ld needs a batch with targets"
        anchors = model.anchors(student.cls, step.student_batch)
        sizes = [len(anchors_P4) for anchors_P4 in anchors]
        objects = [target["boxes"].float() for target in targets]
        positive_NP = torch.stack([model.match(boxes_K4, anchors) >= 0 for boxes_K4 in objects])
        inside_NP = torch.stack([self._region(boxes_K4, anchors) for boxes_K4 in objects])
        strides = list(student.cls)
        positive_of = dict(zip(strides, positive_NP.split(sizes, dim=1), strict=True))
        region_of = dict(zip(strides, inside_NP.split(sizes, dim=1), strict=True))

        terms = []
        for stride in self.strides:
            cls = self.classes(
                *flatten_maps([student.cls[stride]], self.classes.student_count),
                *flatten_maps([teacher.cls[stride]], self.classes.teacher_count),
            )
            box = [
                flatten_maps([outputs.box[stride]], 4 * model.head.bins)[0].unflatten(2, (4, model.head.bins))
                for outputs in (student, teacher)
            ]
            positive, weight = positive_of[stride], region_of[stride]
            if self.region == "inside":
                weight = torch.where(positive, 0, weight * cls[0].detach().sigmoid().amax(dim=2))
            terms.append(self.loss(*box, *cls, positive, weight))
        return torch.stack(terms).sum()

    def _region(self, boxes_K4: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        """(P,) v of an image's anchors; for "inside" 1 within an object."""
        if self.region == "vlr":
            return valuable_region(boxes_K4, anchors, self.alpha, self.topk)
        return (center_depths(boxes_K4, torch.cat(list(anchors))) > 0).any(dim=0).float()


def valuable_region(boxes_K4: Tensor, anchors: Sequence[Tensor], alpha: float = 0.25, topk: int = 9) -> Tensor:
    """(P,) of each anchor the highest IoU with an object whose valuable region it is in, 0 outside all.

    Args:
        boxes_K4: objects; K may be 0.
        anchors: of each level (P_l, 4).
        alpha, topk: as in :class:`LD`.
    """
    anchors_P4 = torch.cat(list(anchors))
    if len(boxes_K4) == 0:
        return anchors_P4.new_zeros(len(anchors_P4))
    iou_KP = box_iou(boxes_K4, anchors_P4)
    diou_KP = distance_box_iou(boxes_K4, anchors_P4)
    upper_K1 = atss_thresholds(iou_KP, nearest_anchors(boxes_K4, anchors, topk))[:, None]
    inside_KP = (diou_KP >= alpha * upper_K1) & (diou_KP < upper_K1)
    return torch.where(inside_KP, iou_KP, 0).amax(dim=0)
