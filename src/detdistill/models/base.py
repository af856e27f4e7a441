"""The five steps of a detector, and the objects that pass between them.

::

    images, targets ─preprocess─▶ Batch ─pyramid─▶ Pyramid ─predict─▶ Raw ─┬─losses─▶ {name: scalar}
                                                                           └─decode─▶ list of detections

Shape legend: N images, C channels, H W rows and columns, K objects of an image, Q classes, A anchors a cell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
"""``boxes`` (K, 4) float xyxy in pixels of the image it comes with, ``labels`` (K,) int64 in 0…Q-1."""

Detections = dict[str, Tensor]
"""``boxes`` (K, 4) xyxy in pixels of the original image, ``labels`` (K,), ``scores`` (K,) falling."""

Kind = Literal["anchor", "anchor_free", "two_stage"]
"""What a detector answers from: anchors, cells, or proposals. Published settings of methods go by it."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(slots=True)
class Batch:
    """What the network sees.

    Attributes:
        images_N3HW: normalised, padded with zeros on the right and at the bottom.
        sizes: (height, width) of each image in network input, before padding.
        original_sizes: (height, width) of each image as it was given.
        targets: boxes scaled to network input, or None.
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
        box: (N, A·4, H, W) box regression, in the head's own encoding.
        centerness: (N, 1, H, W) logits, or None where the head has none.
        hidden: where they were asked for, the class and the box tower's maps before the ReLU of each block.
    """

    cls: Pyramid
    box: Pyramid
    centerness: Pyramid | None = None
    hidden: list[tuple[Pyramid, Pyramid]] | None = None


@dataclass(slots=True)
class TwoStageRaw:
    """Outputs of a two-stage detector before any softmax; R proposals over the whole batch.

    Attributes:
        rpn: the region proposal network's dense outputs (Q = 1: objectness).
        proposals: per image (R_n, 4) xyxy in network input; in training the sampled ones.
        roi_logits_RQ: (R, Q + 1) class logits, background at index 0.
        roi_deltas_RQ4: (R, 4·(Q + 1)) box deltas.
        roi_labels: in training, per image the sampled proposals' labels (0 is background), else None.
        roi_targets: in training, per image the sampled proposals' regression targets (R_n, 4), else None.
    """

    rpn: DenseRaw
    proposals: list[Tensor]
    roi_logits_RQ: Tensor
    roi_deltas_RQ4: Tensor
    roi_labels: list[Tensor] | None = None
    roi_targets: list[Tensor] | None = None


Raw = DenseRaw | TwoStageRaw


def dense(raw: Raw) -> DenseRaw:
    """The outputs on the pyramid: a one-stage detector's own, a two-stage detector's proposals network."""
    return raw.rpn if isinstance(raw, TwoStageRaw) else raw


@dataclass(frozen=True)
class Preprocess:
    """Resize, normalise, pad: the model's own input convention.

    Args:
        size: (short, long): the short side becomes ``short`` unless the long side would pass ``long``
            (torchvision's rule); None takes images as they come.
        mean, std: of RGB in [0, 1].
        divisor: height and width are padded to a multiple of it (the largest backbone stride).
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    divisor: int = 32

    def __call__(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, zoom: float = 1.0
    ) -> Batch:
        """Make a batch.

        Args:
            images: (3, H, W) each, uint8 or float in [0, 1], on one device; sizes may differ.
            targets: one for each image, boxes in pixels of that image.
            zoom: factor on the input size (multi-scale training gives teacher and student the same one).
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
            height, width = image.shape[-2:]
            scale = self.scale(height, width) * zoom
            if scale != 1.0:
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
                scaled_targets.append({**targets[i], "boxes": boxes_K4})
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

    def _pad(self, images: Sequence[Tensor]) -> Tensor:
        height = max(image.shape[-2] for image in images)
        width = max(image.shape[-1] for image in images)
        height, width = (-(-side // self.divisor) * self.divisor for side in (height, width))
        padded = images[0].new_zeros(len(images), 3, height, width)
        for row, image in zip(padded, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]].copy_(image)
        return padded


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
        spec: how to build this model again (what a student file records), or None.
    """

    kind: ClassVar[Kind | None] = None
    classes: tuple[str, ...]
    preprocessor: Preprocess
    pyramid_channels: dict[int, int]
    pyramid_norms: Mapping[int, nn.BatchNorm2d] = MappingProxyType({})
    spec: dict[str, Any] | None = None

    def preprocess(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, zoom: float = 1.0
    ) -> Batch:
        """Resize, normalise and pad; scale the targets' boxes with the images."""
        return self.preprocessor(images, targets, zoom)

    @abstractmethod
    def pyramid(self, batch: Batch) -> Pyramid:
        """Backbone and neck."""

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
