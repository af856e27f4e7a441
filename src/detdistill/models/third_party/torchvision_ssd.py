"""torchvision's SSD and SSDlite objects in five steps: the object's own layers, losses and detections.

Their input has one size, to which images are stretched: here antialiased, as DETRs' are; by torchvision not, so
that detections in an image that is made smaller differ a little from those of the object's own ``forward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD, SSDScoringHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou

from detdistill.errors import UserError
from detdistill.models.base import (
    Batch,
    Detections,
    Detector,
    HeadOutputs,
    Preprocess,
    Pyramid,
    TappedPyramid,
    ThirdPartyOutputs,
    eval_mode,
)
from detdistill.models.layers.heads import UNMATCHED
from detdistill.models.third_party.torchvision import TAPS, class_names, with_background, without_background

STRIDES = (4, 8, 16, 32, 64)  # of the levels to compare; those beyond have a few cells, of no whole stride


class TorchvisionSSD(Detector):
    """The five steps of an SSD object.

    Args:
        model: the object, over any backbone; it is not copied.
        classes: names, the background left out or first; not needed for torchvision's COCO weights.
        preprocess: another input convention than the object's own.

    Raises:
        UserError: the object has a head, transform or number of classes that is not torchvision's own.
    """

    kind = "anchor"
    incomparable = True
    model: SSD

    def __init__(self, model: SSD, classes: Sequence[str], preprocess: Preprocess | None) -> None:
        super().__init__()
        head = getattr(model.head, "classification_head", None)
        if not isinstance(head, SSDScoringHead):
            raise UserError(f"wrap: the head of this {type(model).__name__} is not torchvision's own: {TAPS}")
        self.model = model
        self.classes, self.background = class_names(classes, head.num_columns)
        self.preprocessor = preprocess or _preprocess_of(model.transform)
        self._levels = _levels_of(model.backbone, self.preprocessor.size)
        self.pyramid_channels = {stride: channels for _, stride, channels in self._levels}

    @property
    def exported(self) -> nn.Module:
        return self.model

    def forward_features(self, batch: Batch) -> TappedPyramid:
        """The levels that have a stride; the head still sees them all."""
        features = _maps(self.model.backbone(batch.images_N3HW))
        pyramid = TappedPyramid({stride: features[at] for at, stride, _ in self._levels})
        pyramid.output = features
        return pyramid

    def forward_head(self, pyramid: Pyramid, batch: Batch) -> ThirdPartyOutputs:
        """The head's outputs under torchvision's names, and each image's anchors."""
        assert isinstance(pyramid, TappedPyramid)
        features = pyramid.output
        anchors = self.model.anchor_generator(ImageList(batch.images_N3HW, batch.sizes), features)
        return ThirdPartyOutputs((self.model.head(features), anchors))

    def losses(self, head_outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(head_outputs, ThirdPartyOutputs)
        assert batch.targets is not None, "losses need a batch with targets"
        outputs, anchors = head_outputs.output
        targets = with_background(batch.targets, self.background)
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            outputs = {name: x.float() for name, x in outputs.items()}
            matched = [
                self._match(target["boxes"], boxes) for target, boxes in zip(targets, anchors, strict=True)
            ]
            losses: dict[str, Tensor] = self.model.compute_loss(targets, outputs, anchors, matched)
        return losses

    def _match(self, boxes_K4: Tensor, anchors_P4: Tensor) -> Tensor:
        if len(boxes_K4) == 0:
            return torch.full((len(anchors_P4),), UNMATCHED, device=anchors_P4.device)
        matched_P: Tensor = self.model.proposal_matcher(box_iou(boxes_K4, anchors_P4))
        return matched_P

    def decode(self, head_outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(head_outputs, ThirdPartyOutputs)
        found = self.model.postprocess_detections(*head_outputs.output, batch.sizes)
        return without_background(self.model.transform, found, batch, self.background)


def _preprocess_of(transform: Any) -> Preprocess:
    if not isinstance(transform, GeneralizedRCNNTransform) or transform.fixed_size is None:
        raise UserError("wrap: this SSD has no fixed_size to stretch images to: give preprocess=Preprocess(…)")
    width, height = transform.fixed_size
    red, green, blue = transform.image_mean
    std_red, std_green, std_blue = transform.image_std
    return Preprocess(
        (height, width), (red, green, blue), (std_red, std_green, std_blue), transform.size_divisible,
        keep_ratio=False,
    )  # fmt: skip


def _maps(features: Any) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features.values())


def _levels_of(backbone: nn.Module, size: tuple[int, int] | None) -> list[tuple[int, int, int]]:
    """(place, stride, channels) of the maps of STRIDES, their sides rounded up, seen on an image of zeros."""
    height, width = size or (320, 320)
    parameter = next(backbone.parameters(), torch.empty(0))
    with eval_mode(backbone), torch.no_grad():
        maps = _maps(backbone(torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype)))
    cells = [tuple(x.shape[-2:]) for x in maps]
    levels = []
    for stride in STRIDES:
        wanted = -(-height // stride), -(-width // stride)
        if wanted in cells:
            levels.append((cells.index(wanted), stride, maps[cells.index(wanted)].shape[1]))
    if not levels:
        raise UserError(f"wrap: the backbone has no map of a stride of {STRIDES}: {TAPS}")
    return levels
