"""What one-stage detectors share: a dense head on every level of the pyramid, and the choice of detections.

Shape legend: N images, P anchors (of a level, or of all levels one after the other), Q classes, E numbers that
encode a box (the head's ``box_width``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import clip_boxes_to_image

from detdistill.models.base import (
    Batch,
    Candidates,
    DenseOutputs,
    Detections,
    ExportableDetector,
    HeadOutputs,
    Preprocess,
    Pyramid,
)
from detdistill.models.layers.backbones import Backbone, FeaturePyramid
from detdistill.models.layers.heads import (
    DenseHead,
    best_detections,
    best_scores,
    flatten_maps,
    level_anchors,
    select_candidates,
)
from detdistill.recipe.models import Convention, FCOSConfig, OneStageConfig, RetinaNetConfig


class OneStage(ExportableDetector):
    """Backbone, neck and dense head. A family adds its losses, its scores and its encoding of boxes.

    Attributes:
        convention: where the libraries differ, whose way is taken. ``mmdet``: cells are exactly a stride apart
            (:func:`~detdistill.models.layers.heads.level_anchors`), and boxes without an area are no
            candidates.
    """

    convention: Convention = "torchvision"

    def __init__(
        self,
        config: OneStageConfig,
        classes: Sequence[str],
        backbone: Backbone,
        neck: FeaturePyramid,
        head: DenseHead,
        anchor_generator: AnchorGenerator,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.anchor_generator = anchor_generator
        self.classes = tuple(classes)
        self.preprocessor = Preprocess(mean=backbone.mean, std=backbone.std)
        if isinstance(config, RetinaNetConfig | FCOSConfig):  # the others have one way, the class's
            self.convention = config.convention
        self.pyramid_channels = neck.channels
        self.score_threshold = config.score_threshold
        self.nms_threshold = config.nms_threshold
        self.max_detections = config.max_detections
        self.topk_candidates = config.topk_candidates

    def forward_features(self, batch: Batch) -> Pyramid:
        return self.neck(self.backbone(batch.images_N3HW))

    def forward_head(self, pyramid: Pyramid, batch: Batch, *, tower_features: bool = False) -> DenseOutputs:
        """Head outputs; with ``tower_features`` also the towers' maps before each ReLU."""
        return self.head(pyramid, tower_features)

    def anchors(self, pyramid: Pyramid, batch: Batch) -> list[Tensor]:
        """What the dense outputs answer for, level by level: (H·W·A, 4) xyxy in network input, rows first.

        The same for every image. Anchor-free heads have one square, of the stride's size, about each cell's
        center.
        """
        return level_anchors(self.anchor_generator, pyramid, batch, self.convention != "torchvision")

    @abstractmethod
    def match(self, boxes_K4: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        """Which object each anchor answers for in training.

        Args:
            boxes_K4: objects in network input; K may be 0.
            anchors: of each level, as :meth:`anchors` gives them.

        Returns:
            (P,) int64: index of the object, UNMATCHED or IGNORED. No host synchronization.
        """

    @abstractmethod
    def scores(self, outputs: DenseOutputs) -> list[Tensor]:
        """Level by level (N, P, Q) in [0, 1]: by what candidates are chosen."""

    def score_factors(self, outputs: DenseOutputs) -> list[Tensor] | None:
        """Level by level (N, P): by what candidates' scores are multiplied before suppression, or None."""
        return None

    @abstractmethod
    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (..., 4) xyxy from the head's encoding (..., E), at anchors (..., 4) that broadcast to them."""

    def boxes(self, outputs: DenseOutputs, batch: Batch) -> Tensor:
        """Every anchor's box, (N, P, 4) float32 xyxy in network input, all levels."""
        encoded_NPE = torch.cat(flatten_maps(outputs.box.values(), self.head.box_width), dim=1)
        return self.decode_boxes(encoded_NPE, torch.cat(self.anchors(outputs.cls, batch)))

    @property
    def drop_empty(self) -> bool:  # type: ignore[override]
        return self.convention != "torchvision"

    def candidates(self, batch: Batch) -> Candidates:
        """The best of each level, one level after the other."""
        outputs = self.forward_head(self.forward_features(batch), batch)
        encoded = flatten_maps(outputs.box.values(), self.head.box_width)
        factors = self.score_factors(outputs)
        found = []
        for level, (scores_NPQ, encoded_NPE, anchors_P4) in enumerate(
            zip(self.scores(outputs), encoded, self.anchors(outputs.cls, batch), strict=True)
        ):
            scores, at, labels = best_scores(scores_NPQ, self.topk_candidates)
            kept = scores > self.score_threshold
            if factors is not None:
                scores = scores * factors[level].gather(1, at)
            boxes = self.decode_boxes(
                encoded_NPE.gather(1, at[..., None].expand(-1, -1, encoded_NPE.shape[2])), anchors_P4[at]
            )
            found.append((boxes, torch.where(kept, scores, 0.0), labels))
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))

    def decode(self, outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(outputs, DenseOutputs)
        levels = list(
            zip(
                self.scores(outputs),
                flatten_maps(outputs.box.values(), self.head.box_width),
                self.anchors(outputs.cls, batch),
                strict=True,
            )
        )
        factors = self.score_factors(outputs)
        detections = []
        for i, size in enumerate(batch.sizes):
            found = []
            for level, (scores_NPQ, encoded_NPE, anchors_P4) in enumerate(levels):
                scores, at, labels = select_candidates(
                    scores_NPQ[i], self.score_threshold, self.topk_candidates
                )
                if factors is not None:
                    scores = scores * factors[level][i][at]
                boxes = self.decode_boxes(encoded_NPE[i][at], anchors_P4[at])
                found.append((clip_boxes_to_image(boxes, size), scores, labels))
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
            if self.drop_empty:
                solid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
                boxes, scores, labels = boxes[solid], scores[solid], labels[solid]
            detections.append(
                best_detections(
                    boxes,
                    scores,
                    labels,
                    self.nms_threshold,
                    self.max_detections,
                    size,
                    batch.original_sizes[i],
                )
            )
        return detections
