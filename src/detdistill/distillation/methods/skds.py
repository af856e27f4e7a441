"""SKDS: structured knowledge of segmenters, pixel by pixel and pair by pair (Liu et al., CVPR 2019).

Pixels as in `kd`; pairs are the cells of a coarse grid over the last map F, by the cosine of their features::

    L = pixel_weight · mean over pixels of KL(softmax(t) ‖ softmax(s))
      + pair_weight · mean over images and pairs i, j of (cos(F_S,i, F_S,j) - cos(F_T,i, F_T,j))²

Shape legend: N images, C channels, H W rows and columns, Q classes, G cells of the grid.
Reduction: "mean".

Settings: the published code sums its cross-entropy over the batch (of 8) and divides by H·W, with weight 10:
a mean with weight 80 (the cross-entropy's own part, the teacher's entropy, has no gradient); pairs have weight
0.5 in its script (its options default to 1), on a grid of 2×2 cells by max-pooling. CIRKD's repetition (preset
"cirkd") takes weights 1 and 10, and pools by 2 instead of to 2×2: many more pairs. The published code lets no
gradient through the lengths of its cosines, and its windows make 3×3 cells of a map with odd sides; here the
gradient is whole, and the grid is 2×2. The holistic term, a discriminator of whole label maps, is a method of
its own, `adversarial`; the published whole is ``methods: [skds, adversarial]``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.methods.kd import KDLoss
from detdistill.distillation.outputs import SEGMENTATION, SharedClasses, pixel_logits
from detdistill.distillation.precision import in_full_precision
from detdistill.distillation.regions import valid_mask
from detdistill.recipe.methods import SKDSOptions


class SKDSLoss(nn.Module):
    """The terms of the module's equation.

    Args:
        pixel_weight, pair_weight: factors on the terms; a term of weight 0 is not computed.
        grid: cells on each side of the map between which pairs are made; 0: max-pooling by ``pool`` instead.
        pool: side of the pooled windows, where ``grid`` is 0.

    Raises:
        ValueError: a grid below 0 or a pool below 1.
    """

    def __init__(
        self, *, pixel_weight: float = 80.0, pair_weight: float = 0.5, grid: int = 2, pool: int = 2
    ) -> None:
        super().__init__()
        if grid < 0 or pool < 1:
            raise ValueError(f"grid must be at least 0 and pool at least 1, got {grid} and {pool}")
        self.pixel_weight, self.pair_weight = pixel_weight, pair_weight
        self.grid, self.pool = grid, pool
        self.pixel_loss = KDLoss(cls_weight=pixel_weight)

    @in_full_precision
    def forward(self, student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        """The pairs: maps of one size, channels may differ; the teacher is detached. Returns a scalar."""
        ours, theirs = (self._likeness(x) for x in (student_NCHW, teacher_NCHW.detach()))
        return self.pair_weight * F.mse_loss(ours, theirs)

    def _likeness(self, x_NCHW: Tensor) -> Tensor:
        """(N, G, G): the cosine of each pair of cells."""
        if self.grid:
            cells_NCHW = F.adaptive_max_pool2d(x_NCHW, self.grid)
        else:
            cells_NCHW = F.max_pool2d(x_NCHW, self.pool, ceil_mode=True)
        unit_NCG = F.normalize(cells_NCHW.flatten(2), dim=1)
        return unit_NCG.transpose(1, 2) @ unit_NCG


class SKDS(Method):
    """Sum of :class:`SKDSLoss`'s pairs over the matched levels, and its pixels."""

    def __init__(self, context: PairContext, options: SKDSOptions) -> None:
        super().__init__()
        assert context.student.task == SEGMENTATION
        self.levels = context.matching.levels
        self.loss = SKDSLoss(
            pixel_weight=options.pixel_weight,
            pair_weight=options.pair_weight,
            grid=options.grid,
            pool=options.pool,
        )
        if options.pixel_weight:
            self.requires = frozenset({"outputs"})
            self.classes = SharedClasses(context, "skds", instead="set pixel_weight to 0")

    def forward(self, step: StepOutputs) -> Tensor:
        terms = []
        if self.loss.pixel_weight:
            ours, theirs = pixel_logits(step, self.classes)
            terms.append(self.loss.pixel_loss.pixels(ours, theirs, valid_mask(step.teacher_batch, theirs)))
        if self.loss.pair_weight:
            for level in self.levels:
                teacher = step.teacher[level.teacher_stride]
                terms.append(self.loss(step.alignment(step.student[level.student_stride], teacher), teacher))
        nothing = step.student[self.levels[0].student_stride].float().sum() * 0
        return torch.stack(terms).sum() if terms else nothing
