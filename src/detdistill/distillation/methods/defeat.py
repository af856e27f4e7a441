"""DeFeat: objects and background decoupled, on features and regions (Guo et al., CVPR 2021).

Features of objects and of the background are imitated with a weight each; so are, between two-stage detectors,
the class scores of the regions that are objects and of those that are background::

    M      = 1 on the cells that the objects of this level touch; the rule of FPN says which level an object has
    L_neck = 1/levels · Σ_levels w_o / (2 N_o) Σ M (φ(S) - T)² + w_b / (2 N_b) Σ (1 - M)(φ(S) - T)²
    L_head = h_o · mean over object regions of KL(T || S) + h_b · mean over background regions of KL(T || S)

N_o and N_b count elements, channels included. The regions are those that the student sampled for its own loss,
about which the teacher's second stage is asked; or those that the teacher samples, about which the student's
is; or both, and L_head is then the sum of the two. (With the teacher's regions the published code tells objects
from background by the labels of the student's; here a region has its own label.)

Shape legend: N images, C channels, H W rows and columns, R regions of the batch, Q classes and the background.
Reduction: "sum/mask", over the batch, then the mean over the levels. The published code takes that mean, the
paper's equation does not say; we follow the code. Its only configuration (VOC, Faster R-CNN) distills the neck
alone, with weights 3 and 12 on all five levels: these are the defaults. The weights 2 and 2 that it holds for
the regions, and does not use, are the preset "head".

φ is a 3×3 convolution without a ReLU, as in the code (which comments its ReLU out), but starts as PyTorch
starts convolutions, not at the code's N(0, 1e-4), through which hardly any gradient would reach the student.
Our masks are the cells that a box touches. The code's leave out the last row and column where the box ends
within them, and have a single cell for a box within one row or column: of boxes with sides of 8 to 400 pixels
ours have 17 % more cells, and all of the code's. Its rule of levels takes sides one pixel longer. What lies in
the padding counts as background, as in the code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detdistill.distillation.adapters import LevelAligner, conv3x3
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.outputs import (
    SharedClasses,
    region_responses,
    teacher_region_responses,
    tempered_kl,
    two_stage,
)
from detdistill.distillation.precision import in_full_precision
from detdistill.distillation.regions import boxes_in_cells, stride_of_boxes, touched_cells
from detdistill.models.base import Batch
from detdistill.models.layers.heads import avg_factor
from detdistill.recipe.methods import DeFeatOptions


class DeFeatLoss(nn.Module):
    """The neck's term of one level, and in :meth:`head` the regions' term.

    Args:
        object_weight, background_weight: of the neck's term (w_o, w_b).
        head_object_weight, head_background_weight: of the regions' term (h_o, h_b); both 0: no such term.
    """

    def __init__(
        self,
        *,
        object_weight: float = 3.0,
        background_weight: float = 12.0,
        head_object_weight: float = 0.0,
        head_background_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.object_weight, self.background_weight = object_weight, background_weight
        self.head_object_weight, self.head_background_weight = head_object_weight, head_background_weight

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor, object_NHW: Tensor) -> Tensor:
        """Maps (N, C, H, W), the teacher is detached; the mask bool, True on objects. Returns a scalar."""
        # the mean over channels first: masks are one for all of them
        squares_NHW = (student_NCHW - teacher_NCHW.detach()).square().mean(dim=1)
        objects, background = _mean_of(squares_NHW, object_NHW), _mean_of(squares_NHW, ~object_NHW)
        return (self.object_weight * objects + self.background_weight * background) / 2

    @in_full_precision
    def head(self, student_RQ: Tensor, teacher_RQ: Tensor, object_R: Tensor) -> Tensor:
        """Class logits of the same regions, the teacher is detached; the mask bool, True for objects."""
        kl_R = tempered_kl(student_RQ, teacher_RQ.detach(), temperature=1.0)
        objects, background = _mean_of(kl_R, object_R), _mean_of(kl_R, ~object_R)
        return self.head_object_weight * objects + self.head_background_weight * background


class DeFeat(Method):
    """Mean of :class:`DeFeatLoss` over the matched levels, and its head term where both are two-stage.

    Raises:
        ValueError: regions are chosen, and the head has no term.
    """

    requires = frozenset({"labels"})

    def __init__(self, context: PairContext, options: DeFeatOptions) -> None:
        super().__init__()
        asked = bool(options.head_object_weight or options.head_background_weight)
        if options.regions != "student" and not asked:
            raise ValueError(f"regions is {options.regions!r}, but no term uses regions: add `preset: head`")
        with_head = two_stage(context) and asked
        self.classes = None
        if with_head:
            instead = "use it without `preset: head`, on features alone"
            self.classes = SharedClasses(context, "defeat", background=True, instead=instead)
        self.align = LevelAligner(context.matching, options.adapt, conv3x3)
        self.loss = DeFeatLoss(
            object_weight=options.object_weight,
            background_weight=options.background_weight,
            head_object_weight=options.head_object_weight,
            head_background_weight=options.head_background_weight,
        )
        self.regions = options.regions

    def forward(self, step: StepOutputs) -> Tensor:
        strides = [level.teacher_stride for level in self.align.levels]
        terms = [
            self.loss(s, t, level_mask(step.teacher_batch, t, level.teacher_stride, strides))
            for level, s, t in self.align(step)
        ]
        neck = torch.stack(terms).mean()
        return neck if self.classes is None else neck + self._head(step, self.classes)

    def _head(self, step: StepOutputs, classes: SharedClasses) -> Tensor:
        samples = []
        if self.regions != "teacher":
            samples.append(region_responses(step, classes))
        if self.regions != "student":
            samples.append(teacher_region_responses(step, classes))
        terms = []
        for found in samples:
            assert found.labels is not None, "the student samples regions in training mode"
            objects_R = torch.cat(found.labels) > 0
            terms.append(self.loss.head(found.student_logits_RQ, found.teacher_logits_RQ, objects_R))
        return torch.stack(terms).sum()


def level_mask(batch: Batch, map_NCHW: Tensor, stride: int, strides: Sequence[int]) -> Tensor:
    """(N, H, W) bool: the cells touched by the objects that, of these strides, belong to this one."""
    height, width = map_NCHW.shape[-2:]
    assert batch.targets is not None
    masks = []
    for target, cells_K4 in zip(batch.targets, boxes_in_cells(batch, map_NCHW), strict=True):
        here_K = stride_of_boxes(target["boxes"].float(), strides) == stride
        masks.append((touched_cells(cells_K4, height, width) & here_K[:, None, None]).any(dim=0))
    return torch.stack(masks)


def _mean_of(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values under the mask, 0 where there are none."""
    return torch.where(mask, values, 0).sum() / avg_factor(mask.sum())
