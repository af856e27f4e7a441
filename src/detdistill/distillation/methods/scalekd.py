"""ScaleKD: three scales and an assistant, for small objects, CVPR 2023 (from the paper, under-specified).

Two parts, each with the decisions that the paper leaves open (no official code exists):

SDF, scale-decoupled features. A map x becomes x + f_d(x) for the dilations d = 1, 2, 3 of one and the same
branch f_d (1×1, ReLU, 3×3 of dilation d, ReLU, 1×1, a quarter of the channels between)::

    L_feat = feature_weight · Σ_c mean over images, cells, dilations of (SDF(φ(S)) - SDF(T))²

on every matched level (in the paper: on the last stage of the backbone), with one SDF for all levels and both
models, whose output on T is a target without gradient, and no linear layer behind it.

CSA, cross-scale assistant, one for all levels. Queries of the student's map find what they need in the
teacher's, shrunk by several rates, the finest level's most (8 and 4, then 4 and 2, then 2 and 1; one softmax
over all); a depthwise 3×3 convolution puts the positions into the values. Added to the student's map, this
feeds a head of the assistant's own, a copy of the student's at the start, which learns from the ground truth as
the student does; nothing of that reaches the student. The student's predictions follow the assistant's::

    L_cls + L_box = KDLoss of kd (its weights w are the assistant's scores), cls_weight and box_weight

from `imitate_from` of training on (a third: 30000 of 90000 steps in the paper), when the assistant knows
something. The assistant's ground-truth loss adds its gradient, but not its value, to what is reported.

Shape legend: N images, C channels, H W rows and columns, D channels of an attention head, K keys.
Reduction: "sum/(N·H·W)" for features, summed over levels; "sum/mask" for predictions. The weights are the
paper's, which does not say its reductions: the sum over channels is what makes 0.01 matter. Not taken over:
freezing the backbone for the first steps, and an optimizer of the assistant's own (Adam, 3e-4).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.adapters import LevelAligner
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.methods.kd import KDLoss
from detdistill.distillation.outputs import INSTEAD, box_outputs, class_logits, own_draws
from detdistill.distillation.precision import in_full_precision
from detdistill.errors import UserError
from detdistill.models.base import DenseOutputs, Pyramid, TwoStageOutputs
from detdistill.models.families.faster_rcnn import FasterRCNN, RoIHead
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.heads import DenseHead
from detdistill.recipe.methods import ScaleKDOptions

DILATIONS = (1, 2, 3)
RATES = ((8, 4), (4, 2), (2, 1))  # of the finest level, the next, and all others


class ScaleKDLoss(nn.Module):
    """L_feat of one level; ``predictions`` is the :class:`KDLoss` of the other two terms.

    Args:
        feature_weight: factor on the features' term.
        cls_weight, box_weight, temperature: as of :class:`KDLoss`.

    Raises:
        ValueError: as :class:`KDLoss` does.
    """

    def __init__(
        self,
        *,
        feature_weight: float = 0.01,
        cls_weight: float = 0.2,
        box_weight: float = 0.05,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.feature_weight = feature_weight
        self.predictions = KDLoss(cls_weight=cls_weight, box_weight=box_weight, temperature=temperature)

    @in_full_precision
    def forward(self, student_DNCHW: Tensor, teacher_DNCHW: Tensor) -> Tensor:
        """Maps of each dilation, stacked; the teacher's are detached. Returns a scalar."""
        squares_DNCHW = (student_DNCHW - teacher_DNCHW.detach()).square()
        return self.feature_weight * squares_DNCHW.sum(dim=2).mean()


class ScaleDecoupled(nn.Module):
    """SDF: a map seen with three receptive fields."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = max(1, channels // 4)
        self.reduce = nn.Conv2d(channels, middle, 1)
        self.look = nn.Conv2d(middle, middle, 3)
        self.expand = nn.Conv2d(middle, channels, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(3, N, C, H, W), one for each dilation."""
        reduced = F.relu(self.reduce(x_NCHW))
        seen = [F.conv2d(reduced, self.look.weight, self.look.bias, padding=d, dilation=d) for d in DILATIONS]
        return torch.stack([x_NCHW + self.expand(F.relu(x)) for x in seen])


class CrossScaleAttention(nn.Module):
    """CSA: the student's map with what it lacks of the teacher's."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(student_channels, 8)
        self.query = nn.Conv2d(student_channels, student_channels, 1, bias=False)
        self.key = nn.Conv2d(teacher_channels, student_channels, 1, bias=False)  # no softmax sees a key's bias
        self.value = nn.Conv2d(teacher_channels, student_channels, 1)
        self.position = nn.Conv2d(student_channels, student_channels, 3, padding=1, groups=student_channels)
        self.out = nn.Conv2d(student_channels, student_channels, 1)

    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor, rates: Sequence[int]) -> Tensor:
        keys, values = [], []
        for rate in rates:
            height, width = (math.ceil(side / rate) for side in teacher_NCHW.shape[2:])
            shrunk_NCHW = F.adaptive_avg_pool2d(teacher_NCHW, (height, width))
            value_NCHW = self.value(shrunk_NCHW)
            keys.append(self.key(shrunk_NCHW).flatten(2))
            values.append((value_NCHW + self.position(value_NCHW)).flatten(2))
        query, key, value = (
            x_NCP.unflatten(1, (self.heads, -1)).transpose(2, 3)
            for x_NCP in (self.query(student_NCHW).flatten(2), torch.cat(keys, dim=2), torch.cat(values, dim=2))
        )
        found = F.scaled_dot_product_attention(query, key, value)  # (N, heads, P, D)
        return student_NCHW + self.out(found.transpose(2, 3).reshape(student_NCHW.shape))


class ScaleKD(Method):
    """Sum of :class:`ScaleKDLoss` over the matched levels, and its assistant.

    The teacher may be of another kind than the student: the assistant's head is one like the student's.
    """

    requires = frozenset({"labels"})

    def __init__(self, context: PairContext, options: ScaleKDOptions) -> None:
        super().__init__()
        student = context.student
        if not isinstance(student, OneStage | FasterRCNN):
            raise UserError(
                f"scalekd copies the student's head, and {type(student).__name__} has none that it knows: "
                f"{INSTEAD}"
            )
        self.align = LevelAligner(context.matching, options.adapt)
        self.loss = ScaleKDLoss(
            feature_weight=options.feature_weight,
            cls_weight=options.cls_weight,
            box_weight=options.box_weight,
            temperature=options.temperature,
        )
        self.imitate_from = options.imitate_from
        self.num_classes = len(student.classes)
        widths = {(level.student_channels, level.teacher_channels) for level in context.matching.levels}
        if len(widths) > 1:
            raise UserError(
                "scalekd shares its parts among the levels, whose channels differ here: use `strides` of equal "
                f"channels, or {INSTEAD.removeprefix('use ')}"
            )
        ((student_channels, teacher_channels),) = widths
        self.decoupled = ScaleDecoupled(teacher_channels)
        self.attention = CrossScaleAttention(student_channels, teacher_channels)
        self.head = copy.deepcopy(student.roi_head if isinstance(student, FasterRCNN) else student.head)

    def forward(self, step: StepOutputs) -> Tensor:
        terms = []
        for _, student, teacher in self.align(step):
            ours = self.decoupled(student)
            with torch.no_grad():  # second: an autocast may keep the half-precision weights of the first use
                target = self.decoupled(teacher)
            terms.append(self.loss(ours, target))

        pyramid = {stride: x.detach() for stride, x in step.student.items()}
        for position, level in enumerate(self.align.levels):
            rates = RATES[min(position, len(RATES) - 1)]
            student, teacher = pyramid[level.student_stride], step.teacher[level.teacher_stride]
            pyramid[level.student_stride] = self.attention(student, teacher, rates)
        predictions, ground_truth = (
            self._dense(step, pyramid)
            if isinstance(step.student_outputs, DenseOutputs)
            else self._regions(step, pyramid)
        )
        if step.progress is None or step.progress >= self.imitate_from:
            terms.append(predictions)
        return torch.stack(terms).sum() + ground_truth - ground_truth.detach()

    def _dense(self, step: StepOutputs, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """The student's distance from the assistant's predictions, and the assistant's ground-truth loss."""
        student = step.student_outputs
        assert isinstance(student, DenseOutputs)
        assert isinstance(self.head, DenseHead)
        assistant = self.head(pyramid)
        logits = [class_logits(outputs, self.num_classes) for outputs in (student, assistant)]
        with_boxes = self.loss.predictions.box_weight != 0
        boxes = [box_outputs(outputs, self.head) for outputs in (student, assistant)] if with_boxes else []
        with own_draws(step.generator):
            losses = step.student_model.losses(assistant, step.student_batch)
        return self.loss.predictions(*logits, *boxes), torch.stack(list(losses.values())).sum()

    def _regions(self, step: StepOutputs, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """The same for the second stage, on the regions that the student samples."""
        student, model, batch = step.student_outputs, step.student_model, step.student_batch
        assert isinstance(student, TwoStageOutputs)
        assert isinstance(model, FasterRCNN)
        assert isinstance(self.head, RoIHead)
        maps = {str(stride): x for stride, x in pyramid.items()}
        pooled_RC77 = model.roi_pool(maps, student.proposals, [batch.padded_size] * len(student.proposals))
        logits_RQ, deltas_RQ4 = self.head(pooled_RC77)
        distance = self.loss.predictions.regions(
            student.roi_logits_RQ, logits_RQ, student.roi_deltas_RQ4, deltas_RQ4
        )
        if student.roi_labels is None:  # the student is not training
            return distance, distance.detach()
        assistant = TwoStageOutputs(
            student.rpn, student.proposals, logits_RQ, deltas_RQ4, student.roi_labels, student.roi_targets
        )
        with own_draws(step.generator):
            losses = model.losses(assistant, batch)
        return distance, losses["loss_classifier"] + losses["loss_box_reg"]
