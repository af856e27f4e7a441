"""MGD: the teacher's map generated from the student's masked map (Yang et al., ECCV 2022).

Random cells of the student's map are put to 0, in all channels at once; a small network must generate the
teacher's whole map from the rest::

    L = α / N · Σ (T - G(φ(S) · M))²        M (N, 1, H, W): 0 with probability mask_ratio, else 1
    G = 3×3 convolution, ReLU, 3×3 convolution, at the teacher's width, one for each level

Shape legend: N images, C channels, H W rows and columns.
Reduction: "sum/N" for each level; the levels are summed. The loss grows with the size of the image.

Paper and code agree; α (2e-5 one-stage, 5e-7 two-stage, 2e-5 segmentation) and mask_ratio (0.65, 0.45, 0.75; λ
there) are theirs, and so are the levels: all of a one-stage detector's, the four finest of a two-stage one's.
Of segmenters they take the backbone's last stage, here the last map before the classifier.
φ is a 1×1 convolution where channels differ. Their runs clip gradients at a norm of 35, and some start from the
teacher's neck and head ("inheriting"): here `inherit: true` in the recipe, of no method.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detdistill.distillation.adapters import LevelAligner, conv3x3
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.recipe.methods import MGDOptions


class MGDLoss(nn.Module):
    """α / N · Σ over N, C, H, W of (generated - teacher)².

    Args:
        alpha: factor on the loss.
    """

    def __init__(self, *, alpha: float = 2e-5) -> None:
        super().__init__()
        self.alpha = alpha

    @in_full_precision
    def forward(self, generated_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        """Both (N, C, H, W); the teacher is detached. Returns a scalar."""
        squares = (generated_NCHW - teacher_NCHW.detach()).square().sum()
        return self.alpha * squares / len(generated_NCHW)


class MGD(Method):
    """Sum of :class:`MGDLoss` over the matched levels."""

    def __init__(self, context: PairContext, options: MGDOptions) -> None:
        super().__init__()
        self.align = LevelAligner(context.matching, options.adapt, unit=options.unit)
        self.generators = nn.ModuleDict({
            str(level.student_stride): generator(level.teacher_channels) for level in context.matching.levels
        })  # fmt: skip
        self.loss = MGDLoss(alpha=options.alpha)
        self.mask_ratio = options.mask_ratio

    def forward(self, step: StepOutputs) -> Tensor:
        terms = []
        for level, s, t in self.align(step):
            masked = s * random_mask(s, self.mask_ratio, step.generator)
            terms.append(self.loss(self.generators[str(level.student_stride)](masked), t))
        return torch.stack(terms).sum()


def generator(channels: int) -> nn.Module:
    """G in the module's equation."""
    return nn.Sequential(conv3x3(channels, channels), nn.ReLU(), conv3x3(channels, channels))


def random_mask(map_NCHW: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """(N, 1, H, W) of the map's type: 0 with probability ``ratio``, else 1."""
    n, _, height, width = map_NCHW.shape
    random = torch.rand(n, 1, height, width, generator=generator, device=map_NCHW.device)
    return (random >= ratio).to(map_NCHW.dtype)
