"""The five steps of a detector, and the objects that pass between them.

::

    images, targets ─preprocess─▶ Batch ─pyramid─▶ Pyramid ─predict─▶ Raw ─┬─losses─▶ {name: scalar}
                                                                           └─decode─▶ list of detections

Shape legend: N images, C channels, H W rows and columns, K objects of an image, Q classes, A anchors a cell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pyramid = dict[int, Tensor]
"""Feature maps by stride: ``{8: (N, C, H/8, W/8), 16: …}``."""

Target = dict[str, Tensor]
"""``boxes`` (K, 4) float xyxy in pixels of the image it comes with, ``labels`` (K,) int64 in 0…Q-1; for
detectors that learn from masks also ``masks`` (K, H, W) bool or uint8, as large as the image."""

Detections = dict[str, Tensor]
"""``boxes`` (K, 4) xyxy in pixels of the original image, ``labels`` (K,), ``scores`` (K,) falling; from
detectors with masks also ``masks`` (K, 1, H, W), each pixel's probability, as large as the original image."""

Kind = Literal["anchor", "anchor_free", "two_stage"]
"""What a detector answers from: anchors, cells, or proposals. Published settings of methods go by it."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(slots=True)
class Batch:
    """What the network sees.

    Attributes:
        images_N3HW: normalised, padded on the right and at the bottom.
        sizes: (height, width) of each image in network input, before padding.
        original_sizes: (height, width) of each image as it was given.
        targets: boxes, and masks where they are needed, scaled to network input; or None.
    """

    images_N3HW: Tensor
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]
    targets: list[Target] | None

    @property
    def padded_size(self) -> tuple[int, int]:
        """(height, width) of the padded input: what feature maps cover."""
        return self.images_N3HW.shape[-2], self.images_N3HW.shape[-1]


@dataclass(slots=True)
class DenseRaw:
    """Outputs of a dense head before any sigmoid, by stride.

    Attributes:
        cls: (N, A·Q, H, W) class logits (A = 1 for anchor-free heads).
        box: (N, A·E, H, W) box regression, in the head's own encoding of E numbers (mostly 4).
        centerness: (N, 1, H, W) logits, or None where the head has none.
        initial_box: the first boxes of a head that refines them, encoded as ``box``, or None.
        hidden: where they were asked for, the class and the box tower's maps before the ReLU of each block.
    """

    cls: Pyramid
    box: Pyramid
    centerness: Pyramid | None = None
    initial_box: Pyramid | None = None
    hidden: list[tuple[Pyramid, Pyramid]] | None = None


@dataclass(slots=True)
class TwoStageRaw:
    """Outputs of a two-stage detector before any softmax; R proposals over the whole batch.

    Attributes:
        rpn: the region proposal network's dense outputs (Q = 1: objectness).
        proposals: per image (R_n, 4) xyxy in network input; in training the sampled ones.
        roi_logits_RQ: (R, Q + 1) class logits, background at index 0.
        roi_deltas_RQ4: (R, 4·(Q + 1)) box deltas; those of a class-agnostic head are the same for every class.
        roi_labels: in training, per image the sampled proposals' labels (0 is background), else None.
        roi_targets: in training, per image the sampled proposals' regression targets (R_n, 4), else None.
        mask_logits: in training of a detector with masks, (M, 28, 28): for each sampled proposal that answers
            for an object the mask of its class; else None.
        mask_targets: what they should be, (M, 28, 28) in [0, 1], else None.
        pyramid: what a detector makes its detections' masks from, in ``decode``; None without masks.
        later: of a cascade, what its later stages say of the boxes that the stage before them refined; each has
            this ``rpn``, and no ``later`` of its own.
    """

    rpn: DenseRaw
    proposals: list[Tensor]
    roi_logits_RQ: Tensor
    roi_deltas_RQ4: Tensor
    roi_labels: list[Tensor] | None = None
    roi_targets: list[Tensor] | None = None
    mask_logits: Tensor | None = None
    mask_targets: Tensor | None = None
    pyramid: Pyramid | None = None
    later: Sequence[TwoStageRaw] = ()


@dataclass(slots=True)
class QueryRaw:
    """Outputs of a detector that answers from S queries (the DETRs), before any sigmoid of the scores.

    Attributes:
        logits_NSQ: (N, S, Q) class logits of the last decoder layer.
        boxes_NS4: (N, S, 4) centre and size, over the padded input's width and height.
        outputs: what the losses want beside them (earlier layers, noised objects), as transformers has it.
    """

    logits_NSQ: Tensor
    boxes_NS4: Tensor
    outputs: Any


@dataclass(slots=True)
class ForeignRaw:
    """What a model that this project did not write answered, in a form of its own."""

    output: Any


Raw = DenseRaw | TwoStageRaw | QueryRaw | ForeignRaw


class TappedPyramid(dict[int, Tensor]):
    """A pyramid that remembers, for ``predict``, what else the model gave in the same forward.

    Attributes:
        output: the model's answer; None where it was not let finish.
    """

    output: Any = None


def dense(raw: Raw) -> DenseRaw:
    """The outputs on the pyramid: a one-stage detector's own, a two-stage detector's proposals network."""
    assert isinstance(raw, DenseRaw | TwoStageRaw), (
        "methods on dense outputs refuse other pairs when they are built"
    )
    return raw.rpn if isinstance(raw, TwoStageRaw) else raw


@dataclass(frozen=True)
class Preprocess:
    """Resize, normalise, pad: the model's own input convention.

    Args:
        size: (short, long): the short side becomes ``short`` unless the long side would pass ``long``
            (torchvision's rule); None takes images as they come.
        mean, std: of RGB in [0, 1].
        divisor: height and width are padded to a multiple of it (the largest backbone stride).
        bgr: whether the network takes its channels in the order blue, green, red.
        fill: what padding holds, after normalisation.
        keep_ratio: if False, ``size`` is (height, width) and images are stretched to it, antialiased (as DETRs
            want it); a zoom then goes to the nearest multiple of the divisor.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    divisor: int = 32
    keep_ratio: bool = True
    bgr: bool = False
    fill: float = 0.0

    def __call__(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None = None,
        zoom: float = 1.0,
        *,
        with_masks: bool = False,
    ) -> Batch:
        """Make a batch.

        Args:
            images: (3, H, W) each, uint8 or float in [0, 1], on one device; sizes may differ.
            targets: one for each image, boxes in pixels of that image.
            zoom: factor on the input size (multi-scale training gives teacher and student the same one).
            with_masks: resize the targets' masks with the images (nearest pixel, as torchvision); else they are
                left out of the batch.
        """
        resized, scaled_targets = [], []
        for i, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(f"image {i} has shape {tuple(image.shape)}; give RGB images as (3, H, W)")
            image = image.float().div(255) if image.dtype == torch.uint8 else image
            mean_311, std_311 = (
                _constant(values, image.dtype, image.device) for values in (self.mean, self.std)
            )
            image = (image - mean_311) / std_311
            image = image.flip(0) if self.bgr else image
            height, width = image.shape[-2:]
            if self.size is not None and not self.keep_ratio:
                image = F.interpolate(image[None], self.stretched(zoom), mode="bilinear", antialias=True)[0]
            elif (scale := self.scale(height, width) * zoom) != 1.0:
                # recompute_scale_factor: the size is floor(side · scale), and the sampling grid uses the
                # ratio of the two sizes, as in torchvision's GeneralizedRCNNTransform.
                image = F.interpolate(
                    image[None], scale_factor=scale, mode="bilinear", recompute_scale_factor=True,
                    align_corners=False,
                )[0]  # fmt: skip
            resized.append(image)
            if targets is not None:
                ratio_y, ratio_x = image.shape[-2] / height, image.shape[-1] / width
                boxes_K4 = targets[i]["boxes"].to(image.dtype, copy=True)
                boxes_K4[:, 0::2] *= ratio_x
                boxes_K4[:, 1::2] *= ratio_y
                scaled = {**targets[i], "boxes": boxes_K4}
                masks_KHW = scaled.pop("masks", None)
                if with_masks and masks_KHW is not None:
                    scaled["masks"] = _resize_masks(masks_KHW, image.shape[-2:])
                scaled_targets.append(scaled)
        return Batch(
            images_N3HW=self._pad(resized),
            sizes=[(image.shape[-2], image.shape[-1]) for image in resized],
            original_sizes=[(image.shape[-2], image.shape[-1]) for image in images],
            targets=scaled_targets if targets is not None else None,
        )

    def scale(self, height: int, width: int) -> float:
        """The factor by which an image of this size is resized."""
        if self.size is None:
            return 1.0
        short, long = self.size
        return min(short / min(height, width), long / max(height, width))

    def stretched(self, zoom: float = 1.0) -> tuple[int, int]:
        """(height, width) of every image where the ratio is not kept."""
        assert self.size is not None
        if zoom == 1.0:
            return self.size
        height, width = (max(1, round(side * zoom / self.divisor)) * self.divisor for side in self.size)
        return height, width

    def _pad(self, images: Sequence[Tensor]) -> Tensor:
        height = max(image.shape[-2] for image in images)
        width = max(image.shape[-1] for image in images)
        height, width = (-(-side // self.divisor) * self.divisor for side in (height, width))
        padded = images[0].new_full((len(images), 3, height, width), self.fill)
        for row, image in zip(padded, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]].copy_(image)
        return padded


def _resize_masks(masks_KHW: Tensor, size: torch.Size) -> Tensor:
    """(K, *size) uint8: a quarter of float32's memory, and the nearest pixel is as exact."""
    masks_K1HW = masks_KHW[:, None].to(torch.uint8)
    if masks_KHW.shape[1:] != size:
        masks_K1HW = F.interpolate(masks_K1HW, size, mode="nearest")
    return masks_K1HW[:, 0]


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(3, 1, 1) on the device, copied there once: a copy at each step would hold up the host."""
    with torch.inference_mode(False):  # or a first evaluation would leave a tensor that training cannot use
        return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


class Detector(nn.Module, ABC):
    """A detector in five steps; ``forward`` composes them exactly as torchvision's detectors do.

    Attributes:
        kind: what it answers from; None, something else: methods then have their plain defaults.
        classes: class names; label i means ``classes[i]``.
        preprocessor: the input convention.
        pyramid_channels: ``{stride: channels}`` of what ``pyramid`` returns.
        pyramid_norms: ``{stride: BatchNorm}`` of the levels whose map is the very output of a BatchNorm; none
            unless a detector says so.
        needs_masks: whether it learns from the targets' ``masks``.
        spec: how to build this model again (what a student file records), or None.
        opaque: whether its raw predictions have a form of their own, which no method can compare.
        can_learn: whether it has losses.
    """

    kind: Kind | None = None
    needs_masks: ClassVar[bool] = False
    classes: tuple[str, ...]
    preprocessor: Preprocess
    pyramid_channels: dict[int, int]
    pyramid_norms: Mapping[int, nn.BatchNorm2d] = MappingProxyType({})
    spec: dict[str, Any] | None = None
    opaque: ClassVar[bool] = False
    can_learn: bool = True

    def preprocess(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, zoom: float = 1.0
    ) -> Batch:
        """Resize, normalise and pad; scale the targets' boxes, and masks where training needs them, likewise.

        Raises:
            ValueError: in training, a detector that learns from masks is given targets without them.
        """
        with_masks = self.needs_masks and self.training
        if with_masks and any("masks" not in target for target in targets or ()):
            raise ValueError(
                f"{type(self).__name__} learns from masks, and these targets have boxes only: give each target "
                f"`masks` (K, H, W), or train the family without masks (faster_rcnn, cascade_rcnn)"
            )
        return self.preprocessor(images, targets, zoom, with_masks=with_masks)

    @abstractmethod
    def pyramid(self, batch: Batch) -> Pyramid:
        """Backbone and neck."""

    def pyramid_alone(self, batch: Batch) -> Pyramid:
        """As :meth:`pyramid`, for those who will not ask ``predict``: no more need run than it takes."""
        return self.pyramid(batch)

    @property
    def exported(self) -> nn.Module:
        """The module whose weights are what a user gets: of a wrapped model, the model itself."""
        return self

    @abstractmethod
    def predict(self, pyramid: Pyramid, batch: Batch) -> Raw:
        """Head outputs before any sigmoid. In training a two-stage detector samples its proposals here."""

    @abstractmethod
    def losses(self, raw: Raw, batch: Batch) -> dict[str, Tensor]:
        """Ground-truth losses under torchvision's names; ``batch.targets`` must be there."""

    @abstractmethod
    def decode(self, raw: Raw, batch: Batch) -> list[Detections]:
        """Detections in pixels of the original images."""

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses in training mode, detections in evaluation mode."""
        if self.training and targets is None:
            raise ValueError("in training mode a detector needs targets; call model.eval() for detections")
        batch = self.preprocess(images, targets)
        raw = self.predict(self.pyramid(batch), batch)
        return self.losses(raw, batch) if self.training else self.decode(raw, batch)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own: frozen BatchNorm layers stay as they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
