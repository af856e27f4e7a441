"""IFVD: how far each pixel is from its class's mean feature (intra-class variation; Wang et al., ECCV 2020).

A class's prototype is the mean of an image's features over its pixels of that class, in each network's map::

    v(F)_p = cos(F_p, mean of F over the pixels of p's class in the image)
    L      = alpha · mean over labeled pixels of (v(S)_p - v(T)_p)²

Shape legend: N images, C channels, H W rows and columns, P pixels, Q classes.
Reduction: "mean" over the labeled pixels; levels are summed.

We leave pixels without a label out; the published code gives them a cosine of 1 on both sides, which adds
nothing but counts in the mean. The published weight is 200; CIRKD's repetition has 20 (preset "cirkd").
Channels need no adapter.

The published whole adds a pixel-wise KL divergence with weight 10 and an adversarial loss with weight 0.001.
That divergence is the mean over pixels *and classes*, so that in `kd`, whose mean is over pixels, its weight is
10 / Q, 0.53 with 19 classes: ``methods: [ifvd, {kd: {cls_weight: 0.53}}, {adversarial: {alpha: 0.001}}]``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.distillation.regions import class_labels
from detdistill.models.layers.heads import avg_factor
from detdistill.recipe.methods import IFVDOptions

EPS = 1e-8  # least length of a pixel's feature


class IFVDLoss(nn.Module):
    """L of the module's equation, for one level.

    Args:
        alpha: factor on the loss.
    """

    def __init__(self, *, alpha: float = 200.0) -> None:
        super().__init__()
        self.alpha = alpha

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor, labels_NHW: Tensor, classes: int) -> Tensor:
        """Maps of one size, channels may differ; the teacher is detached. Returns a scalar.

        Args:
            labels_NHW: int64 classes of the maps' cells; what is not below ``classes`` (255) counts nowhere.
            classes: Q.
        """
        is_NQP = labels_NHW.flatten(1)[:, None] == torch.arange(classes, device=labels_NHW.device)[:, None]
        ours, theirs = (variation(x.flatten(2), is_NQP) for x in (student_NCHW, teacher_NCHW.detach()))
        return self.alpha * (ours - theirs).square().sum() / avg_factor(is_NQP.sum())


def variation(x_NCP: Tensor, is_NQP: Tensor) -> Tensor:
    """v, (N, P): each pixel's cosine with the mean of its class in its image; 0 where it is of none."""
    is_NQP = is_NQP.to(x_NCP.dtype)
    # Two products of matrices, where each pixel's mean would be another map. A cosine does not see the length
    # of a vector: the sum serves as the mean.
    means_NCQ = F.normalize(x_NCP @ is_NQP.transpose(1, 2), dim=1)
    dots_NP = (means_NCQ.transpose(1, 2) @ x_NCP * is_NQP).sum(dim=1)
    return dots_NP / torch.linalg.vector_norm(x_NCP, dim=1).clamp(min=EPS)


class IFVD(Method):
    """Sum of :class:`IFVDLoss` over the matched levels."""

    requires = frozenset({"labels"})

    def __init__(self, context: PairContext, options: IFVDOptions) -> None:
        super().__init__()
        self.levels = context.matching.levels
        self.class_count = len(context.student.classes)
        self.loss = IFVDLoss(alpha=options.alpha)

    def forward(self, step: StepOutputs) -> Tensor:
        terms = []
        for level in self.levels:
            teacher = step.teacher[level.teacher_stride]
            student = step.alignment(step.student[level.student_stride], teacher)
            labels_NHW = class_labels(step.teacher_batch, teacher)
            terms.append(self.loss(student, teacher, labels_NHW, self.class_count))
        return torch.stack(terms).sum()
