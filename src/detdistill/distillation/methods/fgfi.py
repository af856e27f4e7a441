"""FGFI: features near the objects' anchors (Wang et al., "Fine-grained Feature Imitation", CVPR 2019).

The features of the cells near an object are imitated: those that have an anchor whose overlap with the object
comes near the best overlap that any anchor of the level has with it::

    I_ij = 1 where, for any object k, any anchor at ij has IoU > ψ · max over the level's anchors of IoU(k, ·)
    L    = α / (2 N_p) · Σ_ij I_ij Σ_c (φ(S) - T)²_cij        N_p = Σ I

Shape legend: N images, C channels, H W rows and columns, K objects of an image, A anchors a cell, P = H·W·A.
Reduction: "sum/mask", over the batch, for each level; the levels are summed. C is not divided by.

Whose anchors: the teacher's, since the map to imitate is its own, and its features answer for an object at
those anchors. A teacher without anchors gives the cells that the objects' boxes touch.

φ is a 3×3 convolution without the code's ReLU: that code imitates a backbone's map, which is never negative; a
pyramid's map has both signs, and a ReLU could not reach the negative half. φ starts as PyTorch starts
convolutions, not at the code's N(0, 1e-4), through which hardly any gradient would reach the student. The
code's IoU counts sides one pixel longer: of boxes with sides of 8 to 400 pixels, with RetinaNet's anchors at
strides 8 to 64, that changes 0.3 to 0.9 % of the cells of I, and 4 % with three anchors of 32 pixels at
stride 8. The code warms up over 400 steps: give `warmup`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from detdistill.distillation.adapters import LevelAligner, conv3x3
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.distillation.regions import object_mask
from detdistill.models.families.faster_rcnn import FasterRCNN
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.heads import avg_factor
from detdistill.recipe.methods import FGFIOptions


class FGFILoss(nn.Module):
    """α / (2 N_p) · Σ over the mask's cells and all channels of (student - teacher)²; 0 for an empty mask.

    Args:
        alpha: factor on the loss (λ in the paper).
    """

    def __init__(self, *, alpha: float = 0.01) -> None:
        super().__init__()
        self.alpha = alpha

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor, mask_NHW: Tensor) -> Tensor:
        """Both maps (N, C, H, W), the teacher is detached; the mask bool. Returns a scalar."""
        squares_NHW = (student_NCHW - teacher_NCHW.detach()).square().sum(dim=1)
        return self.alpha * torch.where(mask_NHW, squares_NHW, 0).sum() / (2 * avg_factor(mask_NHW.sum()))


class FGFI(Method):
    """Sum of :class:`FGFILoss` over the matched levels."""

    requires = frozenset({"labels"})

    def __init__(self, context: PairContext, options: FGFIOptions) -> None:
        super().__init__()
        self.align = LevelAligner(context.matching, options.adapt, conv3x3)
        self.loss = FGFILoss(alpha=options.alpha)
        self.psi = options.psi

    def forward(self, step: StepOutputs) -> Tensor:
        masks = self._masks(step)
        terms = [self.loss(s, t, masks[level.teacher_stride]) for level, s, t in self.align(step)]
        return torch.stack(terms).sum()

    def _masks(self, step: StepOutputs) -> dict[int, Tensor]:
        """The cells to imitate, (N, H, W) bool for each of the teacher's strides."""
        model, batch = step.teacher_model, step.teacher_batch
        if not isinstance(model, OneStage | FasterRCNN) or model.kind == "anchor_free" or batch.targets is None:
            return {stride: object_mask(batch, x) for stride, x in step.teacher.items()}
        masks = {}
        anchors = model.anchors(step.teacher, batch)
        for (stride, x), anchors_P4 in zip(step.teacher.items(), anchors, strict=True):
            masks[stride] = torch.stack([
                near_anchors(target["boxes"].float(), anchors_P4, (x.shape[-2], x.shape[-1]), self.psi)
                for target in batch.targets
            ])  # fmt: skip
        return masks


def near_anchors(boxes_K4: Tensor, anchors_P4: Tensor, size: tuple[int, int], psi: float) -> Tensor:
    """(H, W) bool: the cells with an anchor near any of the objects (I in the module's equation)."""
    if len(boxes_K4) == 0:
        return torch.zeros(size, dtype=torch.bool, device=anchors_P4.device)
    iou_KP = box_iou(boxes_K4, anchors_P4)
    near_KP = iou_KP > psi * iou_KP.amax(dim=1, keepdim=True)
    return near_KP.any(dim=0).view(*size, -1).any(dim=-1)
