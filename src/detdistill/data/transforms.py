"""Training augmentation with torchvision.transforms.v2: boxes, masks and labels stay in step with the image."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from detdistill.config import AugmentConfig

# Twice the side at most: SSD's factor of 4 costs 16 times the memory where a model takes images as they come.
_ZOOM_OUT_RANGE = (1.0, 2.0)
_GREY = 114  # what the larger canvas is filled with


class _CropAroundBoxes(v2.RandomIoUCrop):
    """Random IoU crop (SSD, Liu et al. 2016, §2.2) that leaves images without boxes alone."""

    def make_params(self, flat_inputs: list[object]) -> dict[str, object]:
        boxes = next((part for part in flat_inputs if isinstance(part, tv_tensors.BoundingBoxes)), None)
        return {} if boxes is None or len(boxes) == 0 else super().make_params(flat_inputs)


def build_augment(config: AugmentConfig) -> v2.Transform:
    """A transform of ``(image, target)``.

    ``image`` is a ``tv_tensors.Image``; ``target["boxes"]`` a ``tv_tensors.BoundingBoxes`` (xyxy),
    ``target["masks"]``, if there, a ``tv_tensors.Mask``, and ``target["labels"]`` a tensor. Boxes come out
    clamped to the image and those with a side under one pixel removed, with their labels and masks. All
    randomness comes from torch's global CPU generator. ``multi_scale`` is the training loop's: it draws one
    factor for a whole batch.
    """
    steps: list[v2.Transform] = []
    if config.photometric:
        steps.append(v2.RandomPhotometricDistort())
    if config.zoom_out:
        # A plain number would fill masks with it, too: the new border would be object.
        fill = {tv_tensors.Image: _GREY, "others": 0}
        steps.append(v2.RandomZoomOut(fill=fill, side_range=_ZOOM_OUT_RANGE, p=config.zoom_out))
    if config.crop:
        steps.append(v2.RandomApply([_CropAroundBoxes()], p=config.crop))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    if config.vertical_flip:
        steps.append(v2.RandomVerticalFlip(config.vertical_flip))
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)])


def augment_seeded(
    transform: v2.Transform, image: Tensor, target: dict[str, Tensor], seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply a transform whose draws depend on ``seed`` alone, and leave torch's generators as they were.

    Args:
        image: (3, H, W) uint8.
        target: ``boxes`` (K, 4) xyxy, ``labels`` (K,), and perhaps ``masks`` (K, H, W).
    """
    size = (image.shape[-2], image.shape[-1])
    wrapped: dict[str, Tensor] = {
        **target,
        "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size),
    }
    if "masks" in target:
        wrapped["masks"] = tv_tensors.Mask(target["masks"])
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the GPUs that this process trains on.
        torch.default_generator.manual_seed(seed)
        image, wrapped = transform(tv_tensors.Image(image), wrapped)
    return image.as_subclass(Tensor), {key: value.as_subclass(Tensor) for key, value in wrapped.items()}
