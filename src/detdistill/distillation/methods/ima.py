"""IMA: Instance Mask Alignment, the paper's Eq. 2-10 as a loss on two feature maps, and its method.

A step of the cascade after the other (Algorithm 1): a random mask removes frequencies of the student's map
(Eq. 2-3), instance standardization gives every channel of every instance zero mean and unit variance
(Eq. 5-7), adaptive scale deflation multiplies an instance by its similarity to the teacher's (Eq. 8-10), and
the mean squared error to the teacher's map is taken (Eq. 4). An instance is an item of the batch: Eq. 1 writes
maps as N×C×H×W with "N the number of instances".

Where the equations leave a choice, `IMALoss` has an option; docs/ima.md says what each does, and how
the recommended preset was measured.

Shape legend: N instances, C channels, H W rows and columns, G regions, P pooled side.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from detdistill.data.records import UNLABELED
from detdistill.distillation.adapters import LevelAligner
from detdistill.distillation.correlation import covariances
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.regions import boxes_in_cells, class_labels
from detdistill.distillation.spectrum import SpectralFilter, dct_basis, hermitian
from detdistill.errors import UserError
from detdistill.models.base import Task
from detdistill.models.layers.heads import avg_factor
from detdistill.models.preprocess import resize_labels
from detdistill.recipe.methods import IMAOptions, ImportanceOptions, MaskOptions, StandardizeOptions

POOLED = 7  # side of a box instance, as in the RoI heads of two-stage detectors


class IMALoss(nn.Module):
    """alpha · mean over N, C, H, W of (γ_n · standardize(mask(student)) - standardize(teacher))².

    Reduction: "mean". Computed in float32 whatever the autocast (half-precision Fourier transforms exist for
    powers of two only, and variances round badly).

    Args:
        mask: Eq. 2-3; this and the next two as their classes, or as mappings of their keys.
        standardize: Eq. 5-7.
        importance: Eq. 8-10.
        distance: "mse" (the paper's L2) or "l1".
        alpha: factor on the loss; the paper's 10.
        instance: "image" (Eq. 1), "box" (each box pooled from both maps), or "class_region" (γ for each
            class's region; the paper's segmentation).
        region_stats: with "class_region", standardize within each region too; this deletes the class mean.
        min_pixels: maps smaller than this carry no signal and count 0.
        min_region: with "class_region", regions of fewer pixels do not count.

    Raises:
        ValueError: a group with an unknown key or a wrong value.
    """

    def __init__(
        self,
        *,
        mask: MaskOptions | Mapping[str, Any] = MaskOptions(),
        standardize: StandardizeOptions | Mapping[str, Any] = StandardizeOptions(),
        importance: ImportanceOptions | Mapping[str, Any] = ImportanceOptions(),
        distance: Literal["mse", "l1"] = "mse",
        alpha: float = 10.0,
        instance: Literal["image", "box", "class_region"] = "image",
        region_stats: bool = False,
        min_pixels: int = 4,
        min_region: int = 16,
    ) -> None:
        super().__init__()
        self.mask = MaskOptions.model_validate(mask)
        self.standardize = StandardizeOptions.model_validate(standardize)
        self.importance = ImportanceOptions.model_validate(importance)
        self.distance, self.alpha = distance, alpha
        self.instance, self.region_stats = instance, region_stats
        self.min_pixels, self.min_region = min_pixels, min_region
        if not self.importance.detach and self.importance.kind != "none" and not self.standardize.teacher:
            warnings.warn(
                "this IMA lets the student lower the loss by growing less similar to the teacher (γ carries "
                "gradient and the teacher is not standardized); the 'recommended' preset does not",
                stacklevel=2,
            )

    def forward(
        self,
        student_NCHW: Tensor,
        teacher_NCHW: Tensor,
        *,
        boxes: list[Tensor] | None = None,
        labels_NHW: Tensor | None = None,
        classes: int | None = None,
        valid_NHW: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_NCHW, teacher_NCHW: maps of one shape; the teacher is detached.
            boxes: for instance="box", per image (K, 4) xyxy in cells of the map.
            labels_NHW: for instance="class_region", class indices at any resolution; 255 is ignored.
            classes: how many there are; None looks at the labels, for which the host waits for the device.
            valid_NHW: bool, False on padding: left out of statistics, importance and mean.
            generator: of the mask's random numbers, on the maps' device; None: the global one.

        Raises:
            ValueError: unequal shapes, or no boxes or labels where the instance needs them.
        """
        if student_NCHW.shape != teacher_NCHW.shape:
            raise ValueError(
                f"student {tuple(student_NCHW.shape)} and teacher {tuple(teacher_NCHW.shape)} differ in shape: "
                "put an adapter and a resize between them (LevelAligner does)"
            )
        with torch.autocast(student_NCHW.device.type, enabled=False):
            student, teacher = student_NCHW.float(), teacher_NCHW.detach().float()
            weight = None if valid_NHW is None else valid_NHW[:, None].to(student.dtype)
            factor: Tensor | float = self.alpha
            if self.instance == "box":
                if boxes is None:
                    raise ValueError("instance='box' needs boxes")
                student, teacher = (_pool(maps, boxes) for maps in (student, teacher))
                weight = None
                # The mean over instances: of those that a process has on average.
                factor = factor * len(student) / avg_factor(student.new_full((), len(student)))
            if student.shape[0] == 0 or student.shape[-2] * student.shape[-1] < self.min_pixels:
                return student_NCHW.float().sum() * 0.0
            regions_NGHW = None
            if self.instance == "class_region":
                if labels_NHW is None:
                    raise ValueError("instance='class_region' needs labels_NHW")
                regions_NGHW = self._regions(labels_NHW, student.shape[-2:], classes)
                if weight is not None:
                    regions_NGHW = regions_NGHW * weight
                weight = regions_NGHW.sum(dim=1, keepdim=True)
            return factor * self._loss(student, teacher, weight, regions_NGHW, generator)

    def extra_repr(self) -> str:
        return f"mask=({self.mask}), importance=({self.importance})"

    def _loss(
        self,
        student: Tensor,
        teacher: Tensor,
        weight: Tensor | None,
        regions: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        masked_student, masked_teacher = self._mask(student, teacher, generator)
        if weight is None and self._is_correlation():
            return self._by_correlation(masked_student, masked_teacher)
        stat_regions = regions if self.region_stats else None
        s, t = masked_student, masked_teacher
        if self.standardize.student:
            s = self._standardize(s, weight, stat_regions)
        if self.standardize.teacher:
            t = self._standardize(t, weight, stat_regions)
        if self.importance.kind != "none":
            if self.importance.source == "raw":
                sources = (student, teacher)
            elif self.importance.source == "masked":
                sources = (masked_student, masked_teacher)
            else:
                sources = (
                    s if self.standardize.student else self._standardize(s, weight, stat_regions),
                    t if self.standardize.teacher else self._standardize(t, weight, stat_regions),
                )
            gamma = self._importance(*sources, weight, regions)
            s = gamma * s
            if self.importance.target == "both":
                t = gamma * t
        difference = (s - t).abs() if self.distance == "l1" else (s - t).square()
        if weight is None:
            return difference.mean()
        return (difference * weight).sum() / (avg_factor(weight.sum()) * s.shape[1])

    def _is_correlation(self) -> bool:
        """Whether the distance depends on the two maps through their variances and correlation alone."""
        return (
            self.standardize.student
            and self.standardize.teacher
            and self.standardize.stats == "instance"
            and self.distance == "mse"
            and (self.importance.kind == "none" or self.importance.source == "standardized")
        )

    def _by_correlation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """mean over N, C of γ²a_s + a_t - 2γr: the same number in a third of the passes over memory.

        r is the correlation of student and teacher in a channel of an instance; a_s and a_t are the energies
        var / (var + eps) of the standardized maps, 1 but for silent channels.
        """
        variance_s, variance_t, covariance = covariances(student, teacher)
        a_s, a_t = (
            variance_s / (variance_s + self.standardize.eps),
            variance_t / (variance_t + self.standardize.eps),
        )
        r = covariance * torch.rsqrt((variance_s + self.standardize.eps) * (variance_t + self.standardize.eps))
        gamma: Tensor | float = 1.0
        if self.importance.kind != "none":
            cosine = r.sum(1) * torch.rsqrt((a_s.sum(1) * a_t.sum(1)).clamp(min=1e-16))
            gamma = self._gamma(cosine.detach() if self.importance.detach else cosine)[:, None]
        if self.importance.target == "both":
            return (gamma**2 * (a_s + a_t - 2 * r)).mean()
        return (gamma**2 * a_s + a_t - 2 * gamma * r).mean()

    def _mask(
        self, student: Tensor, teacher: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Eq. 2-3."""
        if self.mask.domain == "none" or self.mask.ratio == 0:
            return student, teacher
        n, c, height, width = student.shape
        shape = {"sample": (n, 1), "batch": (1, 1), "element": (n, c)}[self.mask.sharing]
        random = torch.rand(*shape, height, width, generator=generator, device=student.device)
        symmetric = self.mask.domain == "fft" and self.mask.hermitian
        keep = (hermitian(random) if symmetric else random) >= self.mask.ratio
        if self.mask.keep_dc and self.mask.domain != "spatial":
            keep[..., 0, 0] = True
        masked = self._filter(student, keep)
        return masked, self._filter(teacher, keep) if self.mask.teacher else teacher

    def _filter(self, x: Tensor, keep: Tensor) -> Tensor:
        """F⁻¹(M ⊙ F(x))."""
        size = x.shape[-2:]
        if self.mask.domain == "spatial":
            return x * keep
        if self.mask.domain == "dct":
            rows, columns = (dct_basis(side, x.device) for side in size)
            return rows.T @ (keep * (rows @ x @ columns.T)) @ columns
        return SpectralFilter.apply(x, keep)

    def _standardize(self, x: Tensor, weight: Tensor | None, regions: Tensor | None) -> Tensor:
        """Eq. 5-7 with the biased variance; √(var + eps) has a finite gradient on constant maps."""
        if regions is not None:
            return _standardize_regions(x, regions, self.standardize.eps)
        dims = (-2, -1) if self.standardize.stats == "instance" else (0, -2, -1)
        if weight is None:
            variance, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
        else:
            total = weight.sum(dims, keepdim=True).clamp(min=1)
            mean = (x * weight).sum(dims, keepdim=True) / total
            variance = ((x - mean).square() * weight).sum(dims, keepdim=True) / total
        return (x - mean) * torch.rsqrt(variance + self.standardize.eps)

    def _importance(self, s: Tensor, t: Tensor, weight: Tensor | None, regions: Tensor | None) -> Tensor:
        """Eq. 8-9: γ as (N, 1, 1, 1), or (N, 1, H, W) where each region has its own."""
        if self.importance.detach:
            s, t = s.detach(), t.detach()
        products = torch.stack([(s * t).sum(1), s.square().sum(1), t.square().sum(1)], dim=1)  # (N, 3, H, W)
        if regions is None:
            sums = (products if weight is None else products * weight).sum((-2, -1))[..., None]  # (N, 3, 1)
        else:
            sums = torch.einsum("nkhw,nghw->nkg", products, regions)
        cosine = sums[:, 0] * torch.rsqrt((sums[:, 1] * sums[:, 2]).clamp(min=1e-16))  # (N, G)
        gamma = self._gamma(cosine)
        if regions is None:
            return gamma[:, :, None, None]
        return torch.einsum("ng,nghw->nhw", gamma, regions)[:, None]

    def _gamma(self, cosine: Tensor) -> Tensor:
        gamma = (1 + cosine) / 2 if self.importance.kind == "shifted" else cosine
        return gamma if self.importance.gamma_min is None else gamma.clamp(self.importance.gamma_min, 1.0)

    def _regions(self, labels_NHW: Tensor, size: torch.Size, classes: int | None) -> Tensor:
        """Class regions at the map's resolution as (N, G, H, W) of 0 and 1; small ones are empty."""
        labels = resize_labels(labels_NHW, size).long()
        labels = labels.where(labels != UNLABELED, -1)
        if classes is None:
            classes = max(0, int(labels.max())) + 1
        regions = (labels[:, None] == torch.arange(classes, device=labels.device)[:, None, None]).float()
        return regions * (regions.sum((-2, -1), keepdim=True) >= self.min_region)


class IMA(Method):
    """Sum of :class:`IMALoss` over the matched levels."""

    def __init__(self, context: PairContext, options: IMAOptions) -> None:
        super().__init__()
        wanted: dict[str, Task] = {"box": "detection", "class_region": "segmentation"}
        task, instance = context.student.task, options.instance
        if wanted.get(instance, task) != task:
            raise UserError(
                f"ima: instance '{instance}' is for {wanted[instance]}, and this pair for {task}: "
                f"give instance 'image'"
            )
        if instance != "image":
            self.requires = frozenset({"labels"})
        self.align = LevelAligner(context.matching, options.adapt)
        self.loss = IMALoss(
            mask=options.mask,
            standardize=options.standardize,
            importance=options.importance,
            distance=options.distance,
            alpha=options.alpha,
            instance=options.instance,
            region_stats=options.region_stats,
            min_pixels=options.min_pixels,
            min_region=options.min_region,
        )
        self.classes = len(context.student.classes)

    def forward(self, step: StepOutputs) -> Tensor:
        terms = []
        batch, instance = step.teacher_batch, self.loss.instance
        for _, student, teacher in self.align(step):
            boxes = boxes_in_cells(batch, teacher) if instance == "box" else None
            labels_NHW = class_labels(batch, teacher) if instance == "class_region" else None
            terms.append(
                self.loss(
                    student,
                    teacher,
                    boxes=boxes,
                    labels_NHW=labels_NHW,
                    classes=self.classes,
                    generator=step.generator,
                )
            )
        return torch.stack(terms).sum()


def _pool(maps: Tensor, boxes: list[Tensor]) -> Tensor:
    """Every box of the batch as an instance: (sum of K, C, P, P)."""
    rois = [box.to(maps.dtype) for box in boxes]
    return roi_align(maps, rois, output_size=POOLED, sampling_ratio=2, aligned=True)


def _standardize_regions(x: Tensor, regions: Tensor, eps: float) -> Tensor:
    """Zero mean and unit variance for each channel within each region; 0 outside them."""
    total = regions.sum((-2, -1)).clamp(min=1)[:, None]  # (N, 1, G)
    mean = torch.einsum("nchw,nghw->ncg", x, regions) / total
    centered = x * regions.sum(1, keepdim=True) - torch.einsum("ncg,nghw->nchw", mean, regions)
    variance = torch.einsum("nchw,nghw->ncg", centered.square(), regions) / total
    return centered * torch.einsum("ncg,nghw->nchw", torch.rsqrt(variance + eps), regions)
