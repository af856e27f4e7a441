"""CrossKD: the teacher's head goes on from the student's tower (Wang et al., CVPR 2024).

The student's tower maps after block i, before the ReLU, take the rest of the teacher's frozen head; its
predictions p̂ from them are compared with its own p on the teacher's maps. The student's own predictions, which
the ground truth pulls elsewhere, are left alone. Gradient flows through the teacher's head, never into it.

::

    f̂ = (f_S - mean(f_S)) / (std(f_S) + 1e-6) · std(f_T) + mean(f_T)     per channel, over N·H·W
    L_cls = cls_weight · Σ_NPQ BCE(p̂, σ(p)) · |σ(p̂) - σ(p)|^beta / n
    L_box = box_weight · Σ_NP w · (1 - GIoU(b̂, b)) / n,  w = max_Q σ(p);  or -log IoU
    L_box = box_weight · Σ_NP4 w · KL(b || b̂) / (4 · Σ w)                          where a head predicts bins

Shape legend: N images, P anchors of the teacher's crossed levels, Q shared classes, B bins of a box side.
Reduction: "sum/n" with n the anchors that answer for an object by the teacher's own assignment, at least 1 for
each image, or the sum of their centerness, at least 1 for the batch.

Paper and code: the scale is aligned as in the published code (the paper hardly says so). The code leaves out
anchors that the assignment ignores, and weights FCOS 0.4 and 0.75, with -log IoU, over the sum of centerness;
we follow. Without any object that sum is 1e-6 there, which makes the loss explode, and 1 here. Boxes without
area are as far apart as in the code, 13.8 by -log IoU and 1 by GIoU, also where both are equal; their gradient
is 0 here, and up to a side over 1e-7 there where only one side is 0. Not taken over: ATSS's centerness term,
and the GIoU that a later configuration for GFL adds (weight 2, and 3 for the distributions). A student's tower
shorter than i blocks gives its last map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.alignment import Alignment
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.outputs import INSTEAD, SharedClasses, tempered_kl
from detdistill.distillation.precision import in_full_precision
from detdistill.errors import UserError
from detdistill.models.base import DenseOutputs
from detdistill.models.families.fcos import centerness_of
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.assignment import centers
from detdistill.models.layers.heads import IGNORED, avg_factor, flatten_maps, gather_matched_boxes
from detdistill.recipe.methods import CrossKDOptions

EPS = 1e-7
LEAST = {"iou": 1e-6, "giou": 1e-7}  # area that counts as one: the published code's


class CrossKDLoss(nn.Module):
    """The module's L_cls + L_box. Reduction: "sum/n". Computed in float32 whatever the autocast.

    Args:
        cls_weight, box_weight: factors on the two terms.
        beta: the sharpness of the weight on classes; below 1 its slope would be infinite at equality.
        box_loss: "giou" (1 - GIoU) or "iou" (-log IoU), of decoded boxes.
        temperature: of distributions of box sides, with the factor temperature².

    Raises:
        ValueError: beta below 1, or a temperature that is not positive.
    """

    def __init__(
        self,
        *,
        cls_weight: float = 1.0,
        box_weight: float = 1.0,
        beta: float = 1.0,
        box_loss: Literal["giou", "iou"] = "giou",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if beta < 1:
            raise ValueError(f"beta must be at least 1, got {beta}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.cls_weight, self.box_weight = cls_weight, box_weight
        self.beta, self.box_loss, self.temperature = beta, box_loss, temperature

    @in_full_precision
    def forward(
        self,
        student_cls_NPQ: Tensor,
        teacher_cls_NPQ: Tensor,
        student_box: Tensor,
        teacher_box: Tensor,
        count: Tensor,
        valid_NP: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; the teacher is detached.

        Args:
            student_cls_NPQ, teacher_cls_NPQ: class logits.
            student_box, teacher_box: boxes (N, P, 4) xyxy, or logits (N, P, 4, B) of each side's bins.
            count: n, a scalar.
            valid_NP: bool, False where an anchor does not count; None: all count.
        """
        teacher_NPQ, teacher_box = teacher_cls_NPQ.detach().sigmoid(), teacher_box.detach()
        valid = teacher_NPQ.new_ones(teacher_NPQ.shape[:2]) if valid_NP is None else valid_NP.to(teacher_NPQ)
        bce_NPQ = F.binary_cross_entropy_with_logits(student_cls_NPQ, teacher_NPQ, reduction="none")
        focus_NPQ = (student_cls_NPQ.sigmoid() - teacher_NPQ).abs() ** self.beta
        cls = (bce_NPQ * focus_NPQ * valid[..., None]).sum() / count
        weight_NP = teacher_NPQ.amax(dim=2) * valid
        if student_box.ndim == 4:
            kl_NP4 = tempered_kl(student_box, teacher_box, self.temperature)
            box = (kl_NP4 * weight_NP[..., None]).sum() / (4 * avg_factor(weight_NP.sum(), least=EPS))
        else:
            box = (box_distance(student_box, teacher_box, self.box_loss) * weight_NP).sum() / count
        return self.cls_weight * cls + self.box_weight * box


class ScaleAlign(nn.Module):
    """Gives each channel of a map the mean and standard deviation of another's, over N·H·W.

    Args:
        eps: added to the student's standard deviation, by which its map is divided.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        """The student's map, (N, C, H, W), as the teacher's are; the teacher's is detached."""
        std_s, mean_s = _std_mean(student_NCHW)
        std_t, mean_t = _std_mean(teacher_NCHW.detach())
        gain = std_t / (std_s + self.eps)
        return student_NCHW * gain + (mean_t - mean_s * gain)


def _std_mean(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel, (1, C, 1, 1), with n - 1; of a constant one the gradient is 0, not infinite."""
    values = x_NCHW.numel() // x_NCHW.shape[1]
    variance, mean = torch.var_mean(x_NCHW, (0, 2, 3), correction=min(1, values - 1), keepdim=True)
    return variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt(), mean


class CrossKD(Method):
    """Binds :class:`CrossKDLoss` to two one-stage detectors, also of different families, levels or input sizes.

    Both predictions are the teacher's head's; of its classes those count that the student knows too.
    """

    requires = frozenset({"outputs", "tower_features", "labels"})

    def __init__(self, context: PairContext, options: CrossKDOptions) -> None:
        super().__init__()
        student, teacher = context.student, context.teacher
        if not (isinstance(student, OneStage) and isinstance(teacher, OneStage)):
            raise UserError(
                f"crosskd lets the teacher's head go on from the student's: both must be one-stage; {INSTEAD}"
            )
        blocks = teacher.head.depth
        if blocks == 0 or student.head.depth == 0:
            raise UserError(f"crosskd crosses towers, and a head of head_depth 0 has none: {INSTEAD}")
        depth = options.depth
        if depth is None:
            depth = max(1, blocks * 3 // 4 if teacher.kind == "anchor" else blocks // 2)
        if depth > blocks:
            raise UserError(
                f"crosskd.depth is {depth}, the teacher's towers have {blocks} blocks: use 1 to {blocks}"
            )
        self.teacher_depth, self.student_depth = depth, min(depth, student.head.depth)
        self.classes = SharedClasses(context, "crosskd")
        self.levels = context.matching.levels
        self.loss = CrossKDLoss(
            cls_weight=options.cls_weight,
            box_weight=options.box_weight,
            beta=options.beta,
            box_loss=options.box_loss,
            temperature=options.temperature,
        )
        self.align = ScaleAlign() if options.align_scale else None
        self.normalize = options.normalize
        # As the towers, a mapper serves all levels. Aligned, its output has the teacher's mean: no bias.
        self.mappers = nn.ModuleDict()
        widths = student.head.channels, teacher.head.channels
        if widths[0] != widths[1]:
            for tower in ("cls", "box"):
                self.mappers[tower] = nn.Conv2d(*widths, kernel_size=1, bias=not options.align_scale)

    def forward(self, step: StepOutputs) -> Tensor:
        student, teacher, model = step.student_outputs, step.teacher_outputs, step.teacher_model
        targets = step.teacher_batch.targets
        assert isinstance(student, DenseOutputs)
        assert isinstance(teacher, DenseOutputs)
        assert isinstance(model, OneStage)
        assert student.tower_features is not None
        assert teacher.tower_features is not None
        assert targets is not None, "crosskd needs a batch with targets"
        anchors = model.anchors(teacher.cls, step.teacher_batch)
        objects = [target["boxes"].float() for target in targets]
        matched_NP = torch.stack([model.match(boxes_K4, anchors) for boxes_K4 in objects])
        valid = (matched_NP != IGNORED).split([len(anchors_P4) for anchors_P4 in anchors], dim=1)
        valid_of = dict(zip(teacher.cls, valid, strict=True))
        anchors_of = dict(zip(teacher.cls, anchors, strict=True))

        ours, theirs = (
            student.tower_features[self.student_depth - 1],
            teacher.tower_features[self.teacher_depth - 1],
        )
        parts: list[tuple[Tensor, ...]] = []
        for level in self.levels:
            stride = level.teacher_stride
            cls, box = (
                {stride: self._cross(tower, a[level.student_stride], b[stride], step.alignment)}
                for tower, a, b in zip(("cls", "box"), ours, theirs, strict=True)
            )
            crossed = model.head.go_on(cls, box, self.teacher_depth)
            classes = (self.classes.teacher(_classes(outputs, stride, model)) for outputs in (crossed, teacher))
            boxes = (_boxes(outputs, stride, model, anchors_of[stride]) for outputs in (crossed, teacher))
            parts.append((*classes, *boxes, valid_of[stride]))
        s_cls, t_cls, s_box, t_box, valid_NP = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        share_NP = (matched_NP >= 0).float()
        if self.normalize == "centerness":
            count = (share_NP * _centerness(matched_NP, objects, torch.cat(anchors))).sum()
        else:
            count = share_NP.sum(dim=1).clamp(min=1).sum()
        return self.loss(s_cls, t_cls, s_box, t_box, avg_factor(count), valid_NP)

    def _cross(self, tower: str, student_NCHW: Tensor, teacher_NCHW: Tensor, alignment: Alignment) -> Tensor:
        """The student's map as the teacher's head can take it."""
        if tower in self.mappers:
            student_NCHW = self.mappers[tower](student_NCHW)
        student_NCHW = alignment(student_NCHW, teacher_NCHW)
        return student_NCHW if self.align is None else self.align(student_NCHW, teacher_NCHW)


def _classes(outputs: DenseOutputs, stride: int, model: OneStage) -> Tensor:
    """(N, P, Q) class logits of a level."""
    return flatten_maps([outputs.cls[stride]], len(model.classes))[0]


def _boxes(outputs: DenseOutputs, stride: int, model: OneStage, anchors_P4: Tensor) -> Tensor:
    """(N, P, 4) boxes of a level, or (N, P, 4, B) logits where the head predicts bins."""
    bins = model.head.bins
    if bins is None:
        return model.decode_boxes(flatten_maps([outputs.box[stride]], 4)[0], anchors_P4)
    return flatten_maps([outputs.box[stride]], 4 * bins)[0].unflatten(2, (4, bins))


def box_distance(a: Tensor, b: Tensor, kind: Literal["giou", "iou"]) -> Tensor:
    """1 - GIoU or -log IoU of boxes (..., 4) xyxy, one by one; of two without area 1 or 13.8, no gradient."""
    least = LEAST[kind]
    top_left, bottom_right = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    overlap = _area((bottom_right - top_left).clamp(min=0))
    union = _area(a[..., 2:] - a[..., :2]) + _area(b[..., 2:] - b[..., :2]) - overlap
    iou = torch.where(union > least, overlap, overlap.detach()) / union.clamp(min=least)
    if kind == "iou":
        return -iou.clamp(min=1e-6).log()
    hull = _area(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    hull = hull.clamp(min=least)
    return 1 - iou + (hull - union.clamp(min=least)) / hull


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]


def _centerness(matched_NP: Tensor, objects: Sequence[Tensor], anchors_P4: Tensor) -> Tensor:
    """(N, P) centerness of each anchor's center in its object, 0 outside it; of no meaning without one."""
    point_P2 = centers(anchors_P4)
    found = []
    for matched_P, boxes_K4 in zip(matched_NP, objects, strict=True):
        box_P4 = gather_matched_boxes(matched_P, boxes_K4, anchors_P4)
        found.append(centerness_of(torch.cat([point_P2 - box_P4[:, :2], box_P4[:, 2:] - point_P2], dim=1)))
    return torch.stack(found).nan_to_num(0.0)
