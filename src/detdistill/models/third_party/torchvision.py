"""torchvision's detectors as they stand in a user's program: the object's own modules, in five steps.

Losses and detections are those of the object's own ``forward``; a test holds the proof. torchvision counts
labels from 1 (row 0 of the classes is the background); here as everywhere outside, labels are 0…Q-1.

Shape legend: N images, P all anchors of an image, Q classes without the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou

from detdistill.errors import UserError
from detdistill.models.base import (
    Batch,
    DenseOutputs,
    Detections,
    Detector,
    HeadOutputs,
    Preprocess,
    Pyramid,
    TappedPyramid,
    Target,
    ThirdPartyOutputs,
    eval_mode,
)
from detdistill.models.checkpoints.torchvision import BACKGROUND, COCO_CATEGORIES
from detdistill.models.families.fcos import match_cells
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.heads import UNMATCHED, DenseHead, flatten_maps

PROBE = (256, 512)  # pixels of the image on which a backbone tells its strides
TAPS = "give taps={stride: module name}"


def wrap_torchvision(
    model: nn.Module, classes: Sequence[str] = (), preprocess: Preprocess | None = None
) -> Detector:
    """The five steps of a torchvision RetinaNet, FCOS, FasterRCNN or MaskRCNN object.

    Args:
        model: the object, over any backbone; it is not copied.
        classes: names, the background left out or first; not needed for torchvision's COCO weights.
        preprocess: another input convention than the object's own.

    Raises:
        UserError: the object has a head, transform or number of classes that is not torchvision's own.
    """
    if isinstance(model, detection.RetinaNet):
        return TorchvisionRetinaNet(model, classes, preprocess)
    if isinstance(model, detection.FCOS):
        return TorchvisionFCOS(model, classes, preprocess)
    if isinstance(model, detection.MaskRCNN):
        return TorchvisionMaskRCNN(model, classes, preprocess)
    assert isinstance(model, detection.FasterRCNN)
    return TorchvisionFasterRCNN(model, classes, preprocess)


# --- one stage -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class RowsRaw(DenseOutputs):
    """Dense outputs, and the class rows as the object has them: with its background, where it has one."""

    rows: Pyramid | None = None


class TorchvisionHead(DenseHead):
    """The object's own layers, called as our heads are."""

    background = 0  # 1 where row 0 of the classes is the background, which the maps leave out

    def __init__(self, model: detection.RetinaNet | detection.FCOS) -> None:
        nn.Module.__init__(self)  # the towers are there already
        cls, box = model.head.classification_head, model.head.regression_head
        if not isinstance(cls, RetinaNetClassificationHead | FCOSClassificationHead) or not isinstance(
            box, RetinaNetRegressionHead | FCOSRegressionHead
        ):
            raise UserError(f"wrap: the head of this {type(model).__name__} is not torchvision's own: {TAPS}")
        self.cls_tower, self.box_tower = _blocks(cls.conv), _blocks(box.conv)
        self.cls, self.box = cls.cls_logits, box.bbox_reg
        self.centerness = box.bbox_ctrness if isinstance(box, FCOSRegressionHead) else None
        self.channels = self.cls.in_channels
        self.num_rows = cls.num_classes

    def outputs(self, cls: Pyramid, box: Pyramid) -> RowsRaw:
        rows = {stride: self.cls(x) for stride, x in cls.items()}
        boxes = {stride: self.box(x) for stride, x in box.items()}
        if self.centerness is None:
            return RowsRaw(self._without_background(rows), boxes, rows=rows)
        return RowsRaw(
            cls=self._without_background(rows),
            box={stride: F.relu(x) for stride, x in boxes.items()},
            centerness={stride: self.centerness(x) for stride, x in box.items()},
            rows=rows,
        )

    def _without_background(self, rows: Pyramid) -> Pyramid:
        if not self.background:
            return rows
        by_anchor = {stride: x.unflatten(1, (-1, self.num_rows)) for stride, x in rows.items()}
        return {stride: x[:, :, 1:].flatten(1, 2) for stride, x in by_anchor.items()}


def _blocks(tower: nn.Sequential) -> nn.Sequential:
    """A tower's layers as plain blocks that each end with a ReLU; torchvision's own cannot be sliced."""
    blocks: list[list[nn.Module]] = [[]]
    for layer in (inner for part in tower for inner in (part if isinstance(part, nn.Sequential) else [part])):
        blocks[-1].append(layer)
        if isinstance(layer, nn.ReLU):
            blocks.append([])
    return nn.Sequential(*(nn.Sequential(*block) for block in blocks if block))


class TorchvisionOneStage(OneStage):
    """What RetinaNet and FCOS objects share."""

    def __init__(
        self,
        model: detection.RetinaNet | detection.FCOS,
        classes: Sequence[str],
        preprocess: Preprocess | None,
    ) -> None:
        Detector.__init__(self)  # a backbone, neck and head of ours are not there
        self.model = model
        # In __dict__ the head is no submodule: its layers are the model's already, and would be averaged twice.
        self.__dict__["head"] = TorchvisionHead(model)
        self.classes, self.head.background = class_names(classes, self.head.num_rows, may_lack_background=True)
        self.preprocessor = preprocess or preprocess_of(model.transform)
        self.anchor_generator = model.anchor_generator
        levels = levels_of(model.backbone)
        self.pyramid_channels = dict(levels)
        if len(self.pyramid_channels) < len(levels):
            raise UserError(
                f"wrap: the levels of this backbone have the strides {[stride for stride, _ in levels]}: build "
                "it with returned_layers whose strides differ"
            )
        self.score_threshold, self.nms_threshold = model.score_thresh, model.nms_thresh
        self.max_detections, self.topk_candidates = model.detections_per_img, model.topk_candidates

    head: TorchvisionHead
    model: detection.RetinaNet | detection.FCOS

    @property
    def exported(self) -> nn.Module:
        return self.model

    def forward_features(self, batch: Batch) -> Pyramid:
        features = self.model.backbone(batch.images_N3HW)
        maps = [features] if isinstance(features, Tensor) else features.values()
        return dict(zip(self.pyramid_channels, maps, strict=True))

    def losses(self, head_outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(head_outputs, RowsRaw)
        assert batch.targets is not None, "losses need a batch with targets"
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            outputs = {name: torch.cat(levels, dim=1) for name, levels in self._outputs(head_outputs).items()}
            targets = with_background(batch.targets, self.head.background)
            return self._own_losses(targets, outputs, self.anchors(head_outputs.cls, batch))

    def _own_losses(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        anchors_P4 = torch.cat(anchors)
        return self.model.compute_loss(targets, outputs, [anchors_P4] * len(targets))

    def decode(self, head_outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(head_outputs, RowsRaw)
        anchors = [self.anchors(head_outputs.cls, batch)] * len(batch.sizes)
        found = self.model.postprocess_detections(self._outputs(head_outputs), anchors, batch.sizes)
        return without_background(self.model.transform, found, batch, self.head.background)

    def _outputs(self, head_outputs: RowsRaw) -> dict[str, list[Tensor]]:
        """The head's outputs under torchvision's names, level by level (N, P, numbers)."""
        assert head_outputs.rows is not None
        outputs = {
            "cls_logits": flatten_maps(head_outputs.rows.values(), self.head.num_rows),
            "bbox_regression": flatten_maps(head_outputs.box.values(), 4),
        }
        if head_outputs.centerness is not None:
            outputs["bbox_ctrness"] = flatten_maps(head_outputs.centerness.values(), 1)
        return outputs


class TorchvisionRetinaNet(TorchvisionOneStage):
    """The five steps of a RetinaNet object."""

    family = "retinanet"
    kind = "anchor"
    model: detection.RetinaNet

    def match(self, boxes_K4: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        anchors_P4 = torch.cat(list(anchors))
        if len(boxes_K4) == 0:
            return torch.full((len(anchors_P4),), UNMATCHED, device=anchors_P4.device)
        matched_P: Tensor = self.model.proposal_matcher(box_iou(boxes_K4, anchors_P4))
        return matched_P

    def scores(self, head_outputs: DenseOutputs) -> list[Tensor]:
        return [logits.sigmoid() for logits in flatten_maps(head_outputs.cls.values(), len(self.classes))]

    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        flat = self.model.box_coder.decode_single(
            encoded.reshape(-1, 4), anchors.expand_as(encoded).reshape(-1, 4)
        )
        return flat.view_as(encoded)


class TorchvisionFCOS(TorchvisionOneStage):
    """The five steps of an FCOS object."""

    family = "fcos"
    kind = "anchor_free"
    model: detection.FCOS

    def _own_losses(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        counts = [len(anchors_P4) for anchors_P4 in anchors]
        return self.model.compute_loss(targets, outputs, [torch.cat(anchors)] * len(targets), counts)

    def match(self, boxes_K4: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        return match_cells(boxes_K4, anchors, self.model.center_sampling_radius)

    def scores(self, head_outputs: DenseOutputs) -> list[Tensor]:
        assert head_outputs.centerness is not None
        levels = zip(
            flatten_maps(head_outputs.cls.values(), len(self.classes)),
            flatten_maps(head_outputs.centerness.values(), 1),
            strict=True,
        )
        return [torch.sqrt(a.sigmoid() * b.sigmoid()) for a, b in levels]

    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        boxes: Tensor = self.model.box_coder.decode(encoded, anchors)
        return boxes


# --- two stages ------------------------------------------------------------------------------------------


class TorchvisionFasterRCNN(Detector):
    """The five steps of a FasterRCNN object; ``predict`` runs its proposals and regions, losses and all."""

    family = "faster_rcnn"
    kind = "two_stage"
    incomparable = True
    model: detection.FasterRCNN

    def __init__(
        self, model: detection.FasterRCNN, classes: Sequence[str], preprocess: Preprocess | None
    ) -> None:
        super().__init__()
        if model.roi_heads.has_keypoint():
            raise UserError(f"wrap: keypoints are not learnt here: {TAPS} for a teacher of features")
        self.model = model
        predictor = model.roi_heads.box_predictor
        layer = getattr(predictor, "cls_score", None)
        if not isinstance(layer, nn.Linear):
            raise UserError(f"wrap: {type(predictor).__name__}, the box predictor, has no cls_score: {TAPS}")
        self.classes, self.background = class_names(classes, layer.out_features)
        self.preprocessor = preprocess or preprocess_of(model.transform)
        levels = levels_of(model.backbone)
        self._strides = [stride for stride, _ in levels]
        self.pyramid_channels = {}
        for stride, channels in levels:
            self.pyramid_channels.setdefault(stride, channels)

    @property
    def exported(self) -> nn.Module:
        return self.model

    def forward_features(self, batch: Batch) -> TappedPyramid:
        """The feature maps by stride; of several with one stride the first, as the heads still see them all."""
        features = self.model.backbone(batch.images_N3HW)
        features = {"0": features} if isinstance(features, Tensor) else features
        pyramid = TappedPyramid()
        pyramid.output = features
        for stride, x_NCHW in zip(self._strides, features.values(), strict=True):
            pyramid.setdefault(stride, x_NCHW)
        return pyramid

    def forward_head(self, pyramid: Pyramid, batch: Batch) -> ThirdPartyOutputs:
        assert isinstance(pyramid, TappedPyramid)
        images, features = ImageList(batch.images_N3HW, batch.sizes), pyramid.output
        targets = None
        if self.training and batch.targets is not None:
            targets = with_background(batch.targets, self.background)
        proposals, rpn_losses = self.model.rpn(images, features, targets)
        found, roi_losses = self.model.roi_heads(features, proposals, batch.sizes, targets)
        return ThirdPartyOutputs((found, {**roi_losses, **rpn_losses}))

    def losses(self, head_outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(head_outputs, ThirdPartyOutputs)
        losses: dict[str, Tensor] = head_outputs.output[1]
        assert losses, "losses need raw predictions made in training mode"
        return dict(losses)

    def decode(self, head_outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(head_outputs, ThirdPartyOutputs)
        return without_background(self.model.transform, head_outputs.output[0], batch, self.background)


class TorchvisionMaskRCNN(TorchvisionFasterRCNN):
    """The five steps of a MaskRCNN object."""

    family = "mask_rcnn"
    needs_masks = True


# --- what they share -------------------------------------------------------------------------------------


def class_names(
    given: Sequence[str], rows: int, may_lack_background: bool = False
) -> tuple[tuple[str, ...], int]:
    """The names without the background, and whether (1, 0) row 0 is the background.

    Raises:
        UserError: so many names do not go with so many rows.
    """
    names = tuple(given)
    if not names and rows == len(COCO_CATEGORIES):
        names = COCO_CATEGORIES
    if len(names) == rows and names[0] == BACKGROUND:
        return names[1:], 1
    if len(names) == rows - 1 and names:
        return names, 1
    if len(names) == rows and may_lack_background:
        return names, 0
    raise UserError(
        f"wrap: the model has {rows} class rows, of which the first is the background: give classes= with "
        f"{rows - 1} names" + (f", not {len(names)}" if names else "")
    )


def preprocess_of(transform: GeneralizedRCNNTransform) -> Preprocess:
    """The object's input convention; of several training sizes that of evaluation (the recipe may zoom).

    Raises:
        UserError: another transform.
    """
    if not isinstance(transform, GeneralizedRCNNTransform) or transform.fixed_size is not None:
        raise UserError(
            "wrap: this model has a transform of its own or a fixed_size: give preprocess=Preprocess(…)"
        )
    red, green, blue = transform.image_mean
    std_red, std_green, std_blue = transform.image_std
    size = transform.min_size[-1], transform.max_size
    return Preprocess(size, (red, green, blue), (std_red, std_green, std_blue), transform.size_divisible)


def levels_of(backbone: nn.Module) -> list[tuple[int, int]]:
    """(stride, channels) of each map that a backbone gives, seen on an image of zeros."""
    parameter = next(backbone.parameters(), torch.empty(0))
    with eval_mode(backbone), torch.no_grad():
        features = backbone(torch.zeros(1, 3, *PROBE, device=parameter.device, dtype=parameter.dtype))
    maps = [features] if isinstance(features, Tensor) else features.values()
    return [(PROBE[1] // x.shape[-1], x.shape[1]) for x in maps]


def with_background(targets: Sequence[Target], background: int) -> list[Target]:
    """Targets with torchvision's labels."""
    return [{**target, "labels": target["labels"] + background} for target in targets]


def without_background(
    transform: Any, found: list[Detections], batch: Batch, background: int
) -> list[Detections]:
    """Detections in pixels of the original images, with labels 0…Q-1."""
    with eval_mode(transform):  # in training it would leave the boxes as they are
        found = transform.postprocess(found, batch.sizes, batch.original_sizes)
    shifted = [{**one, "labels": one["labels"] - background} for one in found]
    return [{name: value[one["labels"] >= 0] for name, value in one.items()} for one in shifted]
