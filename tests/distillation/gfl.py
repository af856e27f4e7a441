"""A small one-stage detector whose box sides are distributions, as GFL's, to try methods on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import distance_box_iou

from detdistill.distillation.pair import Pair
from detdistill.models.assignment import atss_assign, centres
from detdistill.models.base import DenseRaw
from detdistill.models.heads import DenseHead, flatten_maps, init_head, take_objects
from detdistill.models.one_stage import OneStage

from .pairs import CLASSES, STRIDES, detector


class DistributionHead(DenseHead):
    def __init__(self, channels, depth, bins):
        super().__init__(channels, depth, group_norm=True)
        self.bins = bins
        self.cls = nn.Conv2d(channels, len(CLASSES), 3, padding=1)
        self.box = nn.Conv2d(channels, 4 * bins, 3, padding=1)
        init_head(self, class_layer=self.cls)
        nn.init.normal_(self.box.weight, std=0.3)  # distributions that differ

    def outputs(self, cls, box):
        return DenseRaw(
            cls={stride: self.cls(x) for stride, x in cls.items()},
            box={stride: self.box(x) for stride, x in box.items()},
        )


class SmallGFL(OneStage):
    """Its own losses are what is needed to train it a little."""

    kind = "anchor"

    def match(self, boxes_K4, anchors):
        return atss_assign(boxes_K4, anchors)

    def boxes(self, raw, batch):
        bins = self.head.bins
        logits = torch.cat(flatten_maps(raw.box.values(), 4 * bins), dim=1).unflatten(2, (4, bins))
        distances_NP4 = logits.softmax(dim=3) @ torch.arange(bins, device=logits.device).float()
        return self.decode_boxes(distances_NP4, torch.cat(self.anchors(raw.cls, batch)))

    def decode_boxes(self, encoded, anchors):
        point, stride = centres(anchors), (anchors[:, 2:] - anchors[:, :2]) / 8
        return torch.cat([point - encoded[..., :2] * stride, point + encoded[..., 2:] * stride], dim=-1)

    def losses(self, raw, batch):
        boxes_NP4, anchors = self.boxes(raw, batch), self.anchors(raw.cls, batch)
        terms = []
        for boxes_P4, target in zip(boxes_NP4, batch.targets, strict=True):
            matched_P = self.match(target["boxes"], anchors)
            wanted_P4 = take_objects(matched_P, target["boxes"], torch.cat(anchors))
            far_P = 1 - distance_box_iou(boxes_P4, wanted_P4).diagonal()
            terms.append((far_P * (matched_P >= 0)).sum())
        classes = [F.softplus(x).mean() for x in raw.cls.values()]
        return {"boxes": torch.stack(terms).mean(), "classes": torch.stack(classes).mean()}

    def scores(self, raw):
        return [x.sigmoid() for x in flatten_maps(raw.cls.values(), len(self.classes))]


def gfl(channels=16, seed=0, bins=6, depth=2):
    base = detector("fcos", channels, seed)
    return SmallGFL(
        base.backbone,
        base.neck,
        DistributionHead(channels, depth, bins),
        AnchorGenerator(tuple((8 * stride,) for stride in STRIDES), ((1.0,),) * len(STRIDES)),
        CLASSES,
        base.preprocessor,
        score_threshold=0.05,
        nms_threshold=0.6,
        max_detections=100,
        topk_candidates=100,
    )


def gfl_pair(methods, **options):
    return Pair(gfl(**options), gfl(channels=24, seed=1), methods)
