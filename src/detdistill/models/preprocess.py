"""What goes into a network: targets, batches, and the input convention that makes them.

Shape legend: N images, C channels, H W rows and columns, K objects of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from detdistill.data.records import UNLABELED

Target = dict[str, Tensor]
"""``boxes`` (K, 4) float xyxy in pixels of the image it comes with, ``labels`` (K,) int64 in 0…Q-1; for
detectors that learn from masks also ``masks`` (K, H, W) bool or uint8, as large as the image. For segmenters
``semantic`` (H, W) uint8 or int64: each pixel's class in 0…Q-1, or 255, which counts nowhere."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


MOST_FLOAT = 8.0  # more is no overshoot of an augmentation, nor a normalized image, but 0…255


@dataclass(slots=True)
class Batch:
    """What the network sees.

    Attributes:
        images_N3HW: normalized, padded on the right and at the bottom.
        sizes: (height, width) of each image in network input, before padding.
        original_sizes: (height, width) of each image as it was given.
        targets: boxes, masks where they are needed, and label maps, scaled to network input (before padding);
            or None.
    """

    images_N3HW: Tensor
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]
    targets: list[Target] | None

    @property
    def padded_size(self) -> tuple[int, int]:
        """(height, width) of the padded input: what feature maps cover."""
        return self.images_N3HW.shape[-2], self.images_N3HW.shape[-1]

    def semantic_labels(self) -> Tensor:
        """The targets' label maps as one (N, H, W) int64 tensor of the padded size; padding is ignored."""
        assert self.targets is not None, "label maps are in a batch with targets"
        labels_NHW = torch.full(
            (len(self.sizes), *self.padded_size), UNLABELED, dtype=torch.int64, device=self.images_N3HW.device
        )
        for row, target, (height, width) in zip(labels_NHW, self.targets, self.sizes, strict=True):
            row[:height, :width].copy_(target["semantic"])
        return labels_NHW


@dataclass(frozen=True)
class Preprocess:
    """Resize, normalize, pad: the model's own input convention.

    Args:
        size: (short, long): the short side becomes ``short`` unless the long side would pass ``long``
            (torchvision's rule); None takes images as they come.
        mean, std: of RGB in [0, 1].
        divisor: height and width are padded to a multiple of it (the largest backbone stride).
        bgr: whether the network takes its channels in the order blue, green, red.
        fill: what padding holds, after normalization.
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
        scale_factor: float = 1.0,
        *,
        with_masks: bool = False,
    ) -> Batch:
        """Make a batch.

        Args:
            images: (3, H, W) each, uint8 or float in [0, 1], on one device; sizes may differ.
            targets: one for each image, in pixels of that image.
            scale_factor: factor on the input size (multi-scale training gives teacher and student the same
                one).
            with_masks: resize the targets' masks with the images (nearest pixel, as torchvision); else they are
                left out of the batch.
        """
        resized, scaled_targets = [], []
        for i, image in enumerate(images):
            _require_image(i, image)
            image = image.float().div(255) if image.dtype == torch.uint8 else image
            mean_311, std_311 = (
                _constant(values, image.dtype, image.device) for values in (self.mean, self.std)
            )
            image = (image - mean_311) / std_311
            image = image.flip(0) if self.bgr else image
            height, width = image.shape[-2:]
            if self.size is not None and not self.keep_ratio:
                image = F.interpolate(
                    image[None], self.stretched(scale_factor), mode="bilinear", antialias=True
                )[0]
            elif (scale := self.scale(height, width) * scale_factor) != 1.0:
                # floor(side · scale), as torchvision's GeneralizedRCNNTransform; thin images keep a pixel
                size = max(1, int(height * scale)), max(1, int(width * scale))
                image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
            resized.append(image)
            if targets is not None:
                scaled_targets.append(_scaled(targets[i], (height, width), image, with_masks))
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

    def stretched(self, scale_factor: float = 1.0) -> tuple[int, int]:
        """(height, width) of every image where the ratio is not kept."""
        assert self.size is not None
        if scale_factor == 1.0:
            return self.size
        height, width = (max(1, round(side * scale_factor / self.divisor)) * self.divisor for side in self.size)
        return height, width

    def canvas(self, images: Sequence[Tensor]) -> tuple[int, int]:
        """(height, width) of the padded batch that these resized images share."""
        sides = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        height, width = (-(-side // self.divisor) * self.divisor for side in sides)
        return height, width

    def _pad(self, images: Sequence[Tensor]) -> Tensor:
        padded = images[0].new_full((len(images), 3, *self.canvas(images)), self.fill)
        for row, image in zip(padded, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]].copy_(image)
        return padded


def _scaled(target: Target, size: tuple[int, int], image_3HW: Tensor, with_masks: bool) -> Target:
    """The target of an image of this size, for the image as it was resized."""
    scaled = dict(target)
    new_size = image_3HW.shape[-2:]
    if "boxes" in target:
        boxes_K4 = target["boxes"].to(image_3HW.dtype, copy=True)
        boxes_K4[:, 0::2] *= new_size[1] / size[1]
        boxes_K4[:, 1::2] *= new_size[0] / size[0]
        scaled["boxes"] = boxes_K4
    masks_KHW = scaled.pop("masks", None)
    if with_masks and masks_KHW is not None:
        scaled["masks"] = _resize_masks(masks_KHW, new_size)
    if "semantic" in target:
        scaled["semantic"] = resize_labels(target["semantic"][None], new_size)[0]
    return scaled


def resize_labels(labels_NHW: Tensor, size: Sequence[int]) -> Tensor:
    """(N, *size) uint8: each new pixel has the class of the pixel in which its center lies."""
    labels_NHW = labels_NHW.to(torch.uint8)
    if labels_NHW.shape[-2:] == torch.Size(size):
        return labels_NHW
    return F.interpolate(labels_NHW[:, None], tuple(size), mode="nearest-exact")[:, 0]


def _resize_masks(masks_KHW: Tensor, size: torch.Size) -> Tensor:
    """(K, *size) uint8: a quarter of float32's memory, and the nearest pixel is as exact."""
    masks_K1HW = masks_KHW[:, None].to(torch.uint8)
    if masks_KHW.shape[1:] != size:
        masks_K1HW = F.interpolate(masks_K1HW, size, mode="nearest")
    return masks_K1HW[:, 0]


@lru_cache(maxsize=64)
def _require_image(i: int, image: Tensor) -> None:
    """Raises:
    ValueError: it is no RGB image of uint8, or of floats in [0, 1]. Values are looked at where that costs no
        wait.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image {i} has shape {tuple(image.shape)}; give RGB images as (3, H, W)")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"image {i} is {image.dtype}; give uint8, or floats in [0, 1]")
    on_cpu = image.device.type == "cpu" and image.dtype in (torch.float32, torch.float64)
    if on_cpu and (most := float(image.detach().numpy().max())) > MOST_FLOAT:
        raise ValueError(f"image {i} has values up to {most:g}; give uint8, or floats in [0, 1]")


def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(3, 1, 1) on the device, copied there once: a copy at each step would hold up the host."""
    with torch.inference_mode(False):  # or a first evaluation would leave a tensor that training cannot use
        return torch.tensor(values, dtype=dtype, device=device)[:, None, None]
