"""Stand-ins for models of other libraries: the same module trees and outputs, small, and none of their code."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_convert

CLASSES = ("a", "b", "c")


def _conv(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )


# --- Ultralytics: a list of layers, each with its number `i` and where its input comes from `f` ------------


class _Up(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2)


class _Concat(nn.Module):
    def forward(self, xs):
        return torch.cat(xs, 1)


class _Detect(nn.Module):
    """For each level (N, 4 + Q, H, W); in evaluation also (N, 4 + Q, P): center, size in pixels, scores."""

    stride = (8, 16, 32)

    def __init__(self, channels, num_classes):
        super().__init__()
        self.nc = num_classes
        self.cv2 = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in channels)
        self.cv3 = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in channels)
        self.calls = 0

    def forward(self, xs):
        self.calls += 1
        levels = [torch.cat([b(x), c(x)], 1) for x, b, c in zip(xs, self.cv2, self.cv3, strict=True)]
        return levels if self.training else (self.predictions(levels), levels)

    def predictions(self, levels):
        found = []
        for x, stride in zip(levels, self.stride, strict=True):
            rows, columns = (torch.arange(side, device=x.device) + 0.5 for side in x.shape[-2:])
            center = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))[None] * stride
            box = torch.cat([center + x[:, :2] * stride, x[:, 2:4].exp() * 2 * stride], 1)
            found.append(torch.cat([box, x[:, 4:].sigmoid()], 1).flatten(2))
        return torch.cat(found, 2)


class YoloLike(nn.Module):
    """``model.5``, ``model.6``, ``model.7`` are the levels, ``model.8`` the head (YOLOv8: 15, 18, 21, 22)."""

    def __init__(self, width=8, num_classes=3):
        super().__init__()
        layers = [
            (
                -1,
                nn.Sequential(_conv(3, width, 2), _conv(width, width, 2), _conv(width, width, 2)),
            ),  # 0: stride 8
            (-1, _conv(width, 2 * width, 2)),  # 1: stride 16
            (-1, _conv(2 * width, 4 * width, 2)),  # 2: stride 32
            (1, _Up()),  # 3
            ([3, 0], _Concat()),  # 4
            (-1, _conv(3 * width, width)),  # 5: P3
            (1, _conv(2 * width, 2 * width)),  # 6: P4
            (2, _conv(4 * width, 4 * width)),  # 7: P5
            ([5, 6, 7], _Detect((width, 2 * width, 4 * width), num_classes)),  # 8
        ]
        for i, (source, layer) in enumerate(layers):
            layer.i, layer.f = i, source
        self.model = nn.Sequential(*(layer for _, layer in layers))

    def forward(self, x):
        seen = []
        for layer in self.model:
            if layer.f != -1:
                x = seen[layer.f] if isinstance(layer.f, int) else [seen[i] for i in layer.f]
            x = layer(x)
            seen.append(x)
        return x

    def loss(self, batch, preds=None):
        """Three numbers times the batch size, and the same without a gradient, as theirs."""
        levels = self(batch["img"]) if preds is None else preds
        pixels = batch["bboxes"] * batch["img"].shape[-1]
        found = self.model[-1].predictions(levels)
        box = sum(
            (found[int(i), :4].T - pixels[k]).abs().mean() for k, i in enumerate(batch["batch_idx"].tolist())
        )
        wanted = torch.zeros(len(batch["img"]), found.shape[1] - 4, 1)
        for i, label in zip(batch["batch_idx"].long(), batch["cls"].flatten().long(), strict=True):
            wanted[i, label] = 1
        cls = F.binary_cross_entropy(found[:, 4:].mean(2, keepdim=True), wanted)
        loss = torch.stack([torch.as_tensor(box, dtype=torch.float32) / 64 / len(batch["img"]), cls, 0 * cls])
        return loss * len(batch["img"]), loss.detach()


def yolo_losses(model, output, batch):
    """What docs/foreign-models.md shows, in the words of the stand-in."""
    height, width = batch.padded_size
    over = torch.tensor([width, height, width, height])
    boxes = [box_convert(target["boxes"], "xyxy", "cxcywh") / over for target in batch.targets]
    labels = [target["labels"] for target in batch.targets]
    theirs = {
        "img": batch.images_N3HW,
        "bboxes": torch.cat(boxes),
        "cls": torch.cat(labels)[:, None].float(),
        "batch_idx": torch.cat([torch.full((len(x),), float(i)) for i, x in enumerate(labels)]),
    }
    box, cls, dfl = model.loss(theirs, output)[0] / len(batch.sizes)
    return {"box": box, "cls": cls, "dfl": dfl}


def yolo_decode(model, output, batch):
    found = []
    for one_DP in output[0]:
        scores_P, labels_P = one_DP[4:].max(0)
        boxes_P4 = box_convert(one_DP[:4].T, "cxcywh", "xyxy")
        kept = batched_nms(boxes_P4, scores_P, labels_P, 0.7)[:300]
        found.append({"boxes": boxes_P4[kept], "labels": labels_P[kept], "scores": scores_P[kept]})
    return found


# --- MMDetection: backbone, neck (a tuple), bbox_head (a tuple of lists) -------------------------------------


class _Backbone(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Sequential(_conv(3, width, 2), _conv(width, width, 2))
        self.layer2, self.layer3 = _conv(width, width, 2), _conv(width, 2 * width, 2)

    def forward(self, x):
        c3 = self.layer2(self.stem(x))
        return c3, self.layer3(c3)


class _Neck(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.lateral_convs = nn.ModuleList([nn.Conv2d(width, channels, 1), nn.Conv2d(2 * width, channels, 1)])

    def forward(self, xs):
        c3, c4 = (conv(x) for conv, x in zip(self.lateral_convs, xs, strict=True))
        return c3 + F.interpolate(c4, scale_factor=2), c4


class _BboxHead(nn.Module):
    def __init__(self, channels, num_classes):
        super().__init__()
        self.cls, self.reg = (
            nn.Conv2d(channels, num_classes, 3, padding=1),
            nn.Conv2d(channels, 4, 3, padding=1),
        )
        self.calls = 0

    def forward(self, xs):
        self.calls += 1
        return [self.cls(x) for x in xs], [self.reg(x) for x in xs]

    def loss_by_feat(self, cls_scores, bbox_preds, batch_gt_instances, batch_img_metas):
        losses = {
            "loss_cls": [x.sigmoid().mean() for x in cls_scores],
            "loss_bbox": [x.abs().mean() for x in bbox_preds],
        }
        assert len(batch_gt_instances) == len(batch_img_metas) == len(cls_scores[0])
        return losses

    def predict_by_feat(self, cls_scores, bbox_preds, batch_img_metas, rescale):
        """The best cell of each image."""
        found = []
        for x, meta in zip(cls_scores[0].flatten(2), batch_img_metas, strict=True):
            box = torch.tensor([[0.0, 0, *meta["img_shape"][::-1]]])
            found.append(
                SimpleNamespace(bboxes=box, labels=x.amax(1).argmax()[None], scores=x.max().sigmoid()[None])
            )
        return found


class MmdetLike(nn.Module):
    def __init__(self, width=8, channels=12, num_classes=3):
        super().__init__()
        self.backbone = _Backbone(width)
        self.neck = _Neck(width, channels)
        self.bbox_head = _BboxHead(channels, num_classes)

    def extract_feat(self, images):
        return self.neck(self.backbone(images))

    def forward(self, inputs, data_samples=None, mode="tensor"):
        assert mode == "tensor"
        return self.bbox_head(self.extract_feat(inputs))
