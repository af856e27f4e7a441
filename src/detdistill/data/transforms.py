"""Training augmentation with torchvision.transforms.v2: targets stay in step with their image."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import query_size

from detdistill.data.records import UNLABELED
from detdistill.errors import UserError
from detdistill.recipe import AugmentConfig

# Twice the side at most: SSD's factor of 4 costs 16 times the memory where a model takes images as they come.
_ZOOM_OUT_RANGE = (1.0, 2.0)
_GRAY = 114  # what the larger canvas is filled with


class _CropAroundBoxes(v2.RandomIoUCrop):
    """Random IoU crop (SSD, Liu et al. 2016, §2.2) that leaves images without boxes alone."""

    def make_params(self, flat_inputs: list[object]) -> dict[str, object]:
        boxes = next((part for part in flat_inputs if isinstance(part, tv_tensors.BoundingBoxes)), None)
        return {} if boxes is None or len(boxes) == 0 else super().make_params(flat_inputs)


class _RandomScale(v2.Transform):
    """Resize by a factor drawn uniformly (semantic segmentation's crops, and LSJ, Ghiasi et al. 2021)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[object]) -> dict[str, object]:
        height, width = query_size(flat_inputs)
        factor = float(torch.empty(1).uniform_(self.low, self.high))
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: object, params: dict[str, object]) -> object:
        # Not antialiased, as the networks' own resizing is not.
        return self._call_kernel(v2.functional.resize, inpt, size=params["size"], antialias=False)


def build_augment(config: AugmentConfig, *, label_maps: bool = False) -> v2.Transform:
    """A transform of ``(image, target)``.

    ``image`` is a ``tv_tensors.Image``; ``target["boxes"]`` a ``tv_tensors.BoundingBoxes`` (xyxy),
    ``target["masks"]``, if there, a ``tv_tensors.Mask``, and ``target["labels"]`` a tensor. Boxes come out
    clamped to the image and those with a side under one pixel removed, with their labels and masks. For
    semantic segmentation ``target["semantic"]`` is a ``tv_tensors.Mask``, and what is new at a border 255. All
    randomness comes from torch's global CPU generator. ``multi_scale`` is the training loop's: it draws one
    factor for a whole batch.

    Args:
        label_maps: of samples for semantic segmentation.

    Raises:
        UserError: an augmentation that goes by boxes, for label maps.
    """
    if label_maps and (config.crop or config.zoom_out):
        name = "crop" if config.crop else "zoom_out"
        raise UserError(
            f"training.augment.{name} goes by boxes, and this data has label maps: use scale and crop_size"
        )
    steps: list[v2.Transform] = []
    # A plain number would fill masks with it, too: the new border would be object.
    fill = {tv_tensors.Image: _GRAY, "others": UNLABELED if label_maps else 0}
    if config.photometric:
        steps.append(v2.RandomPhotometricDistort())
    if config.zoom_out:
        steps.append(v2.RandomZoomOut(fill=fill, side_range=_ZOOM_OUT_RANGE, p=config.zoom_out))
    if config.crop:
        steps.append(v2.RandomApply([_CropAroundBoxes()], p=config.crop))
    if config.scale:
        steps.append(_RandomScale(*config.scale))
    if config.crop_size:
        steps.append(v2.RandomCrop(config.crop_size, pad_if_needed=True, fill=fill))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    if config.vertical_flip:
        steps.append(v2.RandomVerticalFlip(config.vertical_flip))
    if label_maps:
        return v2.Compose(steps) if steps else v2.Identity()
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)])


def augment_seeded(
    transform: v2.Transform, image: Tensor, target: dict[str, Tensor], seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply a transform whose draws depend on ``seed`` alone, and leave torch's generators as they were.

    Args:
        image: (3, H, W) uint8.
        target: ``boxes`` (K, 4) xyxy, ``labels`` (K,), and perhaps ``masks`` (K, H, W); or ``semantic`` (H, W).
    """
    size = (image.shape[-2], image.shape[-1])
    wrapped: dict[str, Tensor] = dict(target)
    if "boxes" in target:
        wrapped["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    for name in ("masks", "semantic"):
        if name in target:
            wrapped[name] = tv_tensors.Mask(target[name])
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the GPUs that this process trains on.
        torch.default_generator.manual_seed(seed)
        image, wrapped = transform(tv_tensors.Image(image), wrapped)
    return image.as_subclass(Tensor), {key: value.as_subclass(Tensor) for key, value in wrapped.items()}
