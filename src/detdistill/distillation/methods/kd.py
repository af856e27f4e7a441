"""KD: the teacher's class scores and boxes as soft targets (Hinton et al., 2015, for dense predictions).

One-stage detectors score each class by itself: the soft target of an anchor is a number for each class::

    w     = max over classes of sigmoid(t)           how much of an object the teacher sees at an anchor
    n     = max(1, sum of w)                         how many it sees in the batch
    L_cls = cls_weight · τ² · sum of w · KL(sigmoid(t / τ) || sigmoid(s / τ)) / n
    L_box = box_weight · sum of w · |b_S - b_T|₁ / n                        b in the head's own encoding

where sides are distributions (GFL), b are their means, in strides; ld compares the distributions themselves.

The weight w keeps the background, of which there is a thousand times more, from being all that is learned, and
n, unlike a mean over anchors and classes, does not change with the size of the image or the number of classes.

Two-stage detectors share one softmax among classes and background. Both second stages answer for the regions
that the student samples; the teacher's is run on them::

    L_cls = cls_weight · τ² · mean over regions of KL(softmax(t / τ) || softmax(s / τ))
    L_box = box_weight · sum of p · |Δ_S - Δ_T|₁ / max(1, sum of p)     p = the teacher's share of each class

Segmenters choose a class for each pixel (of the cells that see a part of the image, labeled or not)::

    L     = cls_weight · τ² · mean over pixels of KL(softmax(t / τ) || softmax(s / τ))

There is no single source for detectors: KL, τ² and soft targets are Hinton's, the weights and n are ours. The
centerness of FCOS is not distilled. Shape legend: N images, P anchors, Q classes, R regions.
Reduction: "sum/mask" (the mask is w, or p) over all levels together; the classes of regions and of pixels
"mean".
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.outputs import (
    SEGMENTATION,
    SharedClasses,
    box_outputs,
    class_logits,
    on_levels,
    pixel_logits,
    region_responses,
    require_alike_heads,
    tempered_kl,
    two_stage,
)
from detdistill.distillation.precision import in_full_precision
from detdistill.distillation.regions import valid_mask
from detdistill.models.base import DenseOutputs
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.heads import avg_factor
from detdistill.recipe.methods import KDOptions


class KDLoss(nn.Module):
    """L_cls + L_box of the module's equations: one-stage, and in :meth:`regions` two-stage.

    Args:
        cls_weight, box_weight: factors on the terms; a term of weight 0 is not computed.
        temperature: τ; above 1 it brings out what lies between the classes.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(self, *, cls_weight: float = 1.0, box_weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.cls_weight, self.box_weight, self.temperature = cls_weight, box_weight, temperature

    @in_full_precision
    def forward(
        self,
        student_NPQ: Tensor,
        teacher_NPQ: Tensor,
        student_NP4: Tensor | None = None,
        teacher_NP4: Tensor | None = None,
    ) -> Tensor:
        """Class logits (N, P, Q) and encoded boxes (N, P, 4), the teacher's are detached. Returns a scalar.

        Without boxes there is no box term.
        """
        teacher_NPQ = teacher_NPQ.detach()
        weight_NP = teacher_NPQ.amax(dim=2).sigmoid()
        count = avg_factor(weight_NP.sum())
        loss = student_NPQ.new_zeros(())
        if self.cls_weight:
            s, t = student_NPQ / self.temperature, teacher_NPQ / self.temperature
            # KL of two Bernoullis from logits: nothing here overflows, and it is exactly 0 where they agree
            kl_NPQ = F.softplus(s) - F.softplus(t) - t.sigmoid() * (s - t)
            kl = (weight_NP * kl_NPQ.sum(dim=2)).sum() / count
            loss = loss + self.cls_weight * self.temperature**2 * kl
        if self.box_weight and student_NP4 is not None and teacher_NP4 is not None:
            l1_NP = (student_NP4 - teacher_NP4.detach()).abs().sum(dim=2)
            loss = loss + self.box_weight * (weight_NP * l1_NP).sum() / count
        return loss

    @in_full_precision
    def regions(
        self, student_RQ: Tensor, teacher_RQ: Tensor, student_RQ4: Tensor, teacher_RQ4: Tensor
    ) -> Tensor:
        """The same for regions, the teacher's are detached. Returns a scalar.

        Args:
            student_RQ, teacher_RQ: class logits (R, Q + 1), the background's first; R may be 0.
            student_RQ4, teacher_RQ4: box deltas (R, 4·(Q + 1)).
        """
        teacher_RQ, teacher_RQ4 = teacher_RQ.detach(), teacher_RQ4.detach()
        loss = student_RQ.new_zeros(())
        if self.cls_weight:
            kl_R = tempered_kl(student_RQ, teacher_RQ, self.temperature)
            loss = loss + self.cls_weight * kl_R.sum() / avg_factor(kl_R.new_full((), len(kl_R)))
        if self.box_weight:
            share_RQ = teacher_RQ.softmax(dim=1)[:, 1:]
            l1_RQ = (student_RQ4 - teacher_RQ4).abs().unflatten(1, (-1, 4)).sum(dim=2)[:, 1:]
            loss = loss + self.box_weight * (share_RQ * l1_RQ).sum() / avg_factor(share_RQ.sum())
        return loss

    @in_full_precision
    def pixels(self, student_NQHW: Tensor, teacher_NQHW: Tensor, valid_NHW: Tensor) -> Tensor:
        """The same for pixels: class logits (N, Q, H, W), the teacher's are detached. Returns a scalar.

        Args:
            valid_NHW: bool; the pixels that count.
        """
        s, t = (x / self.temperature for x in (student_NQHW, teacher_NQHW.detach()))
        log_s, log_t = s.log_softmax(dim=1), t.log_softmax(dim=1)
        kl_NHW = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)
        return self.cls_weight * self.temperature**2 * (kl_NHW * valid_NHW).sum() / avg_factor(valid_NHW.sum())


class KD(Method):
    """:class:`KDLoss` between the predictions of two detectors whose heads mean the same.

    One-stage: of one family, on the matched levels, which may be fewer by `finest` or `strides`. Two-stage:
    Faster, Mask and Cascade R-CNN, also in inputs of unequal size, on all regions; of a cascade its first head
    counts. Segmenters: any two.
    """

    def __init__(self, context: PairContext, options: KDOptions) -> None:
        super().__init__()
        self.segments = context.student.task == SEGMENTATION
        regions = two_stage(context)
        if self.segments:
            self.requires = frozenset({"outputs"})
        elif regions:
            self.requires = frozenset({"student_outputs"})
        else:
            require_alike_heads(context, "kd")
            self.requires = frozenset({"outputs"})
        self.classes = SharedClasses(context, "kd", background=regions)
        self.strides = [level.student_stride for level in context.matching.levels]
        self.loss = KDLoss(
            cls_weight=options.cls_weight, box_weight=options.box_weight, temperature=options.temperature
        )

    def forward(self, step: StepOutputs) -> Tensor:
        if self.segments:
            ours, theirs = pixel_logits(step, self.classes)
            return self.loss.pixels(ours, theirs, valid_mask(step.teacher_batch, theirs))
        student, teacher = step.student_outputs, step.teacher_outputs
        if not isinstance(student, DenseOutputs):
            found = region_responses(step, self.classes)
            return self.loss.regions(
                found.student_logits_RQ,
                found.teacher_logits_RQ,
                found.student_deltas_RQ4,
                found.teacher_deltas_RQ4,
            )
        assert isinstance(teacher, DenseOutputs)
        student, teacher = (on_levels(outputs, self.strides) for outputs in (student, teacher))
        logits = self.classes(
            class_logits(student, self.classes.student_count), class_logits(teacher, self.classes.teacher_count)
        )
        if not self.loss.box_weight:
            return self.loss(*logits)
        assert isinstance(step.student_model, OneStage)
        assert isinstance(step.teacher_model, OneStage)
        ours = box_outputs(student, step.student_model.head)
        return self.loss(*logits, ours, box_outputs(teacher, step.teacher_model.head))
