"""CWD: where each channel looks, as a distribution over the map (Shu et al., ICCV 2021).

L = alpha · τ² / (N·C) · sum over n, c of KL(softmax(T_nc / τ) ‖ softmax(S_nc / τ)), each softmax over the H·W
cells of a channel. Reduction: "sum/(N·C)"; levels are summed.

Published settings differ: for detection on pyramid maps τ 1 and alpha 10 on every level (mmrazor; the default
here), τ 1 and alpha 5 on the four finest (RetinaNet with an X101 teacher, the authors' detection code: preset
"retinanet_x101"); for segmentation τ 4, alpha 50 on the last map and 3 on the class logits, whose channels are
the classes (preset "segmentation"; pixel-wise `kd` stands beside it there). Some code divides by
N·H·W, or takes the logarithm of a softmax, which underflows; here it is N·C, as in the paper, and log_softmax.

Shape legend: N images, C channels, H W rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.adapters import LevelAligner
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.outputs import SEGMENTATION, SharedClasses, pixel_logits
from detdistill.distillation.precision import in_full_precision
from detdistill.errors import UserError
from detdistill.recipe.methods import CWDOptions


class CWDLoss(nn.Module):
    """alpha · τ² / (N·C) · sum over n, c of KL(softmax(T_nc / τ) ‖ softmax(S_nc / τ)) over H·W.

    Reduction: "sum/(N·C)".

    Args:
        alpha: factor on the loss.
        tau: temperature τ; high values let more cells count.

    Raises:
        ValueError: tau is not above 0.
    """

    def __init__(self, *, alpha: float = 10.0, tau: float = 1.0) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau must be above 0, got {tau}")
        self.alpha, self.tau = alpha, tau

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        """Both (N, C, H, W); the teacher is detached. Returns a scalar."""
        n, c = student_NCHW.shape[:2]
        log_s, log_t = (
            F.log_softmax(x.flatten(2) / self.tau, dim=2) for x in (student_NCHW, teacher_NCHW.detach())
        )
        divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        return self.alpha * self.tau**2 / (n * c) * divergence


class CWD(Method):
    """Sum of :class:`CWDLoss` over the matched levels, and of segmenters on the class logits."""

    def __init__(self, context: PairContext, options: CWDOptions) -> None:
        super().__init__()
        self.align = LevelAligner(context.matching, options.adapt)
        self.loss = CWDLoss(alpha=options.alpha, tau=options.tau)
        self.logits_loss: CWDLoss | None = None
        if not options.logits_alpha:
            return
        if context.student.task != SEGMENTATION:
            raise UserError("cwd: logits_alpha is for segmenters; leave it out")
        self.classes = SharedClasses(context, "cwd", instead="set logits_alpha to 0")
        self.logits_loss = CWDLoss(alpha=options.logits_alpha, tau=options.tau)
        self.requires = frozenset({"outputs"})

    def forward(self, step: StepOutputs) -> Tensor:
        terms = [self.loss(s, t) for _, s, t in self.align(step)]
        if self.logits_loss is not None:
            terms.append(self.logits_loss(*pixel_logits(step, self.classes)))
        return torch.stack(terms).sum()
