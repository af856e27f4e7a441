"""Adversarial distillation: label maps that a discriminator takes for the teacher's (Liu et al., CVPR 2019).

The "holistic" term of SKDS, which IFVD, CWD and CIRKD's repetitions of them also add. A discriminator D scores
whole maps of class logits, high the teacher's (T) and low the student's (S); the student learns to be scored
high, and D learns beside it::

    L      = alpha · (-mean D(S))                                              D as it stands
    L_D    = mean D(S) - mean D(T) + gradient_penalty · mean over images of (|∇D(X)|₂ - 1)²        "wgan-gp"
    L_D    = mean relu(1 + D(S)) + mean relu(1 - D(T))                                             "hinge"
    X      = u T + (1 - u) S, with one u from [0, 1) for each image

S and T carry no gradient in L_D, which is discriminator_weight times as strong as its equation.
Shape legend: N images, Q classes, H W rows and columns, h w those of the scores.
Reduction: "mean".

D is the published one (of SAGAN): BatchNorm of the logits, four 4×4 convolutions of stride 2 with spectral
normalization and leaky ReLUs, self-attention after the third and the fourth, and a 4×4 convolution to one
score. Maps too small for it are padded with zeros.

The published code gives D an optimizer of its own; here its loss is added to the student's, and one optimizer
serves both, so that schedules, checkpoints and several processes need nothing more. For SGD a factor on the
loss is one on the rate: SKDS's weight 0.1 and rates of 1e-2 for the student and 4e-4 for D are
discriminator_weight 0.1 · 0.04. CIRKD's repetition (preset "cirkd") uses the hinge, weights 0.001 and 0.1, and
Adam for D, which is not followed. A method's `weight` in a recipe is a factor on both losses. What is
logged is L, which may be below 0; L_D is in the gradient alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.outputs import SharedClasses, pixel_logits
from detdistill.distillation.precision import in_full_precision
from detdistill.recipe.methods import AdversarialOptions

WIDTHS = (64, 128, 256, 512)
KERNEL, SLOPE = 4, 0.1
LEAST = 2 ** len(WIDTHS)  # cells on a side that leave one after the halvings


class AdversarialLoss(nn.Module):
    """L of the module's equation; its gradient by D's parameters is that of L_D.

    Args:
        alpha: factor on the student's loss.
        discriminator_weight: factor on D's.
        kind: which loss D has.
        gradient_penalty: factor on the penalty of "wgan-gp"; 0: it is not computed.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        discriminator_weight: float = 0.004,
        kind: Literal["wgan-gp", "hinge"] = "wgan-gp",
        gradient_penalty: float = 10.0,
    ) -> None:
        super().__init__()
        self.alpha, self.discriminator_weight = alpha, discriminator_weight
        self.kind, self.gradient_penalty = kind, gradient_penalty

    @in_full_precision
    def forward(
        self, student_NQHW: Tensor, teacher_NQHW: Tensor, mix_N: Tensor, discriminator: nn.Module
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_NQHW, teacher_NQHW: class logits of one shape; the teacher's are detached.
            mix_N: u of each image.
            discriminator: D, logits to scores (N, 1, h, w).
        """
        frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
        loss = -self.alpha * functional_call(discriminator, frozen, (student_NQHW,)).mean()
        if not torch.is_grad_enabled():
            return loss
        s_NQHW, t_NQHW = student_NQHW.detach(), teacher_NQHW.detach()
        of_s, of_t = discriminator(s_NQHW), discriminator(t_NQHW)
        if self.kind == "hinge":
            learning = F.relu(1 + of_s).mean() + F.relu(1 - of_t).mean()
        else:
            learning = of_s.mean() - of_t.mean()
            if self.gradient_penalty:
                mix_N111 = mix_N[:, None, None, None]
                mixed_NQHW = mix_N111 * t_NQHW + (1 - mix_N111) * s_NQHW
                learning = learning + self.gradient_penalty * steepness(discriminator, mixed_NQHW)
        return loss + self.discriminator_weight * (learning - learning.detach())


def steepness(discriminator: nn.Module, x_NQHW: Tensor) -> Tensor:
    """Mean over images of (|∇D|₂ - 1)², ∇D the gradient of an image's summed scores by its logits: a scalar."""
    x_NQHW = x_NQHW.detach().requires_grad_()
    (slope_NQHW,) = torch.autograd.grad(discriminator(x_NQHW).sum(), x_NQHW, create_graph=True)
    return (torch.linalg.vector_norm(slope_NQHW, dim=(1, 2, 3)) - 1).square().mean()


class Discriminator(nn.Module):
    """D of the module's docstring.

    Args:
        classes: Q.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(classes)
        self.down = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, width, KERNEL, stride=2, padding=1))
            for before, width in zip((classes, *WIDTHS), WIDTHS, strict=False)
        )
        self.attention = nn.ModuleDict({str(i): SelfAttention(WIDTHS[i]) for i in (2, 3)})
        self.score = nn.Conv2d(WIDTHS[-1], 1, KERNEL)

    def forward(self, x_NQHW: Tensor) -> Tensor:
        """(N, Q, H, W) to (N, 1, h, w)."""
        x = _at_least(self.norm(x_NQHW), LEAST)
        for i, down in enumerate(self.down):
            x = F.leaky_relu(down(x), SLOPE)
            if str(i) in self.attention:
                x = self.attention[str(i)](x)
        return self.score(_at_least(x, KERNEL))


class SelfAttention(nn.Module):
    """x + γ · (values of all cells, by the likeness of keys to a cell's query); γ starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        query, key, value = (layer(x_NCHW).flatten(2) for layer in (self.query, self.key, self.value))
        likeness_NPP = (query.transpose(1, 2) @ key).softmax(dim=2)
        return x_NCHW + self.gamma * (value @ likeness_NPP.transpose(1, 2)).view_as(x_NCHW)


def _at_least(x_NCHW: Tensor, side: int) -> Tensor:
    """With zeros to the right and below where a side is shorter."""
    height, width = x_NCHW.shape[-2:]
    return F.pad(x_NCHW, (0, max(0, side - width), 0, max(0, side - height)))


class Adversarial(Method):
    """:class:`AdversarialLoss` on the logits of the classes that both know, with a discriminator of its own."""

    requires = frozenset({"outputs"})

    def __init__(self, context: PairContext, options: AdversarialOptions) -> None:
        super().__init__()
        self.classes = SharedClasses(context, "adversarial")
        self.discriminator = Discriminator(len(context.classes.pairs))
        self.loss = AdversarialLoss(
            alpha=options.alpha,
            discriminator_weight=options.discriminator_weight,
            kind=options.kind,
            gradient_penalty=options.gradient_penalty,
        )

    def forward(self, step: StepOutputs) -> Tensor:
        ours, theirs = pixel_logits(step, self.classes)
        mix_N = torch.rand(len(ours), generator=step.generator, device=ours.device)
        return self.loss(ours, theirs, mix_N, self.discriminator)
