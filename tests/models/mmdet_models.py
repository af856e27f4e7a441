"""MMDetection's published models as facts: configs, and the names and shapes of their entries, written by hand.

``mmdet_oracle.py`` builds the configs with MMDetection itself, compares its names and shapes with these, and
writes what it detects; ``test_mmdet_weights.py`` needs no MMDetection.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
RGB = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True}
BGR = {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "bgr_to_rgb": False}
DETECTRON = {"mean": [102.9801, 115.9465, 122.7717], "std": [1.0, 1.0, 1.0], "bgr_to_rgb": False}


# --- names and shapes ------------------------------------------------------------------------------------


def conv(name: str, out: int, inner: int, side: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, inner, side, side)} | ({f"{name}.bias": (out,)} if bias else {})


def affine(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def batch_norm(name: str, width: int) -> Shapes:
    counters: Shapes = {f"{name}.num_batches_tracked": ()}
    return {**affine(name, width), f"{name}.running_mean": (width,), f"{name}.running_var": (width,)} | counters


def linear(name: str, out: int, inner: int) -> Shapes:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def backbone(depth: int, groups: int = 1, base_width: int = 4) -> Shapes:
    found = {**conv("backbone.conv1", 64, 3, 7, bias=False), **batch_norm("backbone.bn1", 64)}
    bottleneck = depth >= 50
    inner = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        planes = 64 * 2**stage
        width = planes * base_width // 64 * groups if groups > 1 else planes
        out = 4 * planes if bottleneck else planes
        for block in range(blocks):
            at = f"backbone.layer{stage + 1}.{block}"
            if bottleneck:
                found |= conv(f"{at}.conv1", width, inner, 1, bias=False) | batch_norm(f"{at}.bn1", width)
                found |= conv(f"{at}.conv2", width, width // groups, 3, bias=False)
                found |= batch_norm(f"{at}.bn2", width)
                found |= conv(f"{at}.conv3", out, width, 1, bias=False) | batch_norm(f"{at}.bn3", out)
            else:
                found |= conv(f"{at}.conv1", out, inner, 3, bias=False) | batch_norm(f"{at}.bn1", out)
                found |= conv(f"{at}.conv2", out, out, 3, bias=False) | batch_norm(f"{at}.bn2", out)
            if block == 0 and inner != out:
                found |= conv(f"{at}.downsample.0", out, inner, 1, bias=False)
                found |= batch_norm(f"{at}.downsample.1", out)
            inner = out
    return found


def neck(depth: int, channels: int, first: int, extra: str | bool, group_norm: bool = False) -> Shapes:
    widths = [width * (4 if depth >= 50 else 1) for width in (64, 128, 256, 512)][first:]
    found: Shapes = {}
    for i, width in enumerate(widths):
        found |= conv(f"neck.lateral_convs.{i}.conv", channels, width, 1, bias=not group_norm)
        found |= conv(f"neck.fpn_convs.{i}.conv", channels, channels, 3, bias=not group_norm)
    if extra:
        last = widths[-1] if extra == "on_input" else channels
        found |= conv("neck.fpn_convs.3.conv", channels, last, 3, bias=not group_norm)
        found |= conv("neck.fpn_convs.4.conv", channels, channels, 3, bias=not group_norm)
    if group_norm:
        for name in [name for name in found if name.endswith(".conv.weight")]:
            found |= affine(name.replace(".conv.weight", ".gn"), channels)
    return found


def towers(channels: int, depth: int, group_norm: bool, bias: bool) -> Shapes:
    found: Shapes = {}
    for tower in ("cls_convs", "reg_convs"):
        for i in range(depth):
            found |= conv(f"bbox_head.{tower}.{i}.conv", channels, channels, 3, bias)
            if group_norm:
                found |= affine(f"bbox_head.{tower}.{i}.gn", channels)
    return found


def region_head(at: str, channels: int, classes: int, boxes: int) -> Shapes:
    return {
        **linear(f"{at}.shared_fcs.0", 4 * channels, 49 * channels),
        **linear(f"{at}.shared_fcs.1", 4 * channels, 4 * channels),
        **linear(f"{at}.fc_cls", classes + 1, 4 * channels),
        **linear(f"{at}.fc_reg", 4 * boxes, 4 * channels),
    }


def mask_head(at: str, channels: int, classes: int) -> Shapes:
    found: Shapes = {}
    for i in range(4):
        found |= conv(f"{at}.convs.{i}.conv", channels, channels, 3)
    return (
        found | conv(f"{at}.upsample", channels, channels, 2) | conv(f"{at}.conv_logits", classes, channels, 1)
    )


def entries(
    family: str,
    depth: int = 50,
    groups: int = 1,
    base_width: int = 4,
    channels: int = 256,
    classes: int = 80,
    tower_bias: bool = False,
) -> Shapes:
    """Names and shapes of a detector's entries, as MMDetection 2.4 to 3.3 write them."""
    found = backbone(depth, groups, base_width)
    scales: Shapes = {f"bbox_head.scales.{i}.scale": () for i in range(5)}
    if family == "retinanet":
        found |= neck(depth, channels, 1, "on_input") | towers(channels, 4, group_norm=False, bias=True)
        found |= conv("bbox_head.retina_cls", 9 * classes, channels, 3)
        return found | conv("bbox_head.retina_reg", 9 * 4, channels, 3)
    if family == "fcos":
        found |= neck(depth, channels, 1, "on_output") | towers(channels, 4, group_norm=True, bias=tower_bias)
        found |= conv("bbox_head.conv_cls", classes, channels, 3) | conv("bbox_head.conv_reg", 4, channels, 3)
        return found | conv("bbox_head.conv_centerness", 1, channels, 3) | scales
    if family == "gfl":
        found |= neck(depth, channels, 1, "on_output") | towers(channels, 4, group_norm=True, bias=False)
        found |= conv("bbox_head.gfl_cls", classes, channels, 3)
        found |= conv("bbox_head.gfl_reg", 4 * 17, channels, 3) | scales
        return found | {"bbox_head.integral.project": (17,)}
    if family == "reppoints":
        found |= neck(depth, channels, 1, "on_input", group_norm=True)
        found |= towers(channels, 3, group_norm=True, bias=False)
        found |= conv("bbox_head.reppoints_pts_init_conv", channels, channels, 3)
        found |= conv("bbox_head.reppoints_pts_init_out", 18, channels, 1)
        found |= conv("bbox_head.reppoints_cls_conv", channels, channels, 3, bias=False)
        found |= conv("bbox_head.reppoints_cls_out", classes, channels, 1)
        found |= conv("bbox_head.reppoints_pts_refine_conv", channels, channels, 3, bias=False)
        found |= conv("bbox_head.reppoints_pts_refine_out", 18, channels, 1)
        return found | {"bbox_head.moment_transfer": (2,)}
    found |= neck(depth, channels, 0, extra=False)
    found |= conv("rpn_head.rpn_conv", channels, channels, 3)
    found |= conv("rpn_head.rpn_cls", 3, channels, 1) | conv("rpn_head.rpn_reg", 12, channels, 1)
    cascade = family.startswith("cascade")
    for at in ("0.", "1.", "2.") if cascade else ("",):
        found |= region_head(f"roi_head.bbox_head.{at}"[:-1] if at else "roi_head.bbox_head", channels, classes,
                             1 if cascade else classes)  # fmt: skip
        if "mask" in family:
            found |= mask_head(
                f"roi_head.mask_head.{at}"[:-1] if at else "roi_head.mask_head", channels, classes
            )
    return found


GAINS = {
    "neck.": 0.35, "retina_cls": 0.5, "retina_reg": 0.1, "bbox_head.conv_": 0.5, "reppoints_pts": 0.5,
    "rpn_reg": 0.3, "rpn_cls": 0.2, "fc_cls": 0.5, "fc_reg": 0.15, "conv_logits": 2.0,
}  # fmt: skip


def lively(shapes: Mapping[str, tuple[int, ...]], caffe: bool) -> dict[str, Tensor]:
    """Numbers that depend on the names alone, under which a detector finds something of many kinds."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        uniform = torch.rand(shape, generator=generator)
        normal = torch.randn(shape, generator=generator)
        fan_in = max(1, torch.Size(shape[1:]).numel())
        if name.endswith("num_batches_tracked"):
            tensor = torch.tensor(0)
        elif name.endswith("integral.project"):
            tensor = torch.linspace(0, 16, 17)
        elif name.endswith("running_var") or name.endswith(".scale"):
            tensor = 0.6 + 0.8 * uniform
        elif name.endswith("running_mean"):
            tensor = 0.1 * normal
        elif len(shape) == 1 and name.endswith("weight"):
            tensor = 0.5 + uniform if "bn3" not in name else 0.2 + 0.2 * uniform
        elif name.endswith("bias") or name.endswith("moment_transfer"):
            tensor = 0.1 * normal
            if name.startswith(("bbox_head.conv_reg", "bbox_head.fcos_reg")):
                tensor = tensor + 2
            if name.startswith(("bbox_head.retina_cls", "bbox_head.conv_cls", "bbox_head.gfl_cls")):
                tensor = tensor - 2
        else:
            gain = next((gain for part, gain in GAINS.items() if part in name), 1.4)
            tensor = normal * gain / fan_in**0.5
        if name == "backbone.conv1.weight" and caffe:
            tensor = tensor / 57  # its input is not divided by the deviation
        state[name] = tensor
    return state


# --- configs ---------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "retinanet": {"family": "retinanet", "depth": 18},
    "retinanet_caffe": {"family": "retinanet", "depth": 50, "caffe": BGR},
    "fcos_caffe": {"family": "fcos", "depth": 50, "caffe": DETECTRON},
    "fcos_tricks": {"family": "fcos", "depth": 18, "tricks": True},
    "gfl": {"family": "gfl", "depth": 18},
    "gfl_x50": {"family": "gfl", "depth": 50, "groups": 32},
    "reppoints": {"family": "reppoints", "depth": 18},
    "faster_rcnn": {"family": "faster_rcnn", "depth": 18},
    "mask_rcnn": {"family": "mask_rcnn", "depth": 18},
    "cascade_rcnn": {"family": "cascade_rcnn", "depth": 18},
    "cascade_mask_rcnn_caffe": {"family": "cascade_mask_rcnn", "depth": 50, "caffe": BGR},
}
"""Small relatives of the published configs: of 32 channels and 7 classes."""

CHANNELS, CLASSES = 32, 7


def case_entries(case: str) -> Shapes:
    given = CASES[case]
    return entries(
        given["family"], given["depth"], given.get("groups", 1), channels=CHANNELS, classes=CLASSES,
        tower_bias="tricks" in given,
    )  # fmt: skip


def config(case: str) -> dict[str, Any]:
    """A ``model`` section of MMDetection 3.x."""
    given = CASES[case]
    family, depth, caffe = given["family"], given["depth"], given.get("caffe")
    body = {
        "type": "ResNet", "depth": depth, "num_stages": 4, "out_indices": (0, 1, 2, 3), "frozen_stages": 1,
        "norm_cfg": {"type": "BN", "requires_grad": not caffe}, "norm_eval": True,
        "style": "caffe" if caffe else "pytorch",
    }  # fmt: skip
    if "groups" in given:
        body |= {"type": "ResNeXt", "groups": given["groups"], "base_width": 4}
    widths = [width * (4 if depth >= 50 else 1) for width in (64, 128, 256, 512)]
    fpn: dict[str, Any] = {"type": "FPN", "in_channels": widths, "out_channels": CHANNELS, "num_outs": 5}
    group_norm = {"type": "GN", "num_groups": 4, "requires_grad": True}
    model: dict[str, Any] = {
        "data_preprocessor": {"type": "DetDataPreprocessor", **(caffe or RGB), "pad_size_divisor": 32},
        "backbone": body,
        "neck": fpn,
    }
    head: dict[str, Any] = {"num_classes": CLASSES, "in_channels": CHANNELS, "feat_channels": CHANNELS}
    test: dict[str, Any] = {"nms_pre": 1000, "min_bbox_size": 0, "score_thr": 0.05, "max_per_img": 100}
    test["nms"] = {"type": "nms", "iou_threshold": 0.6 if family == "gfl" or "tricks" in given else 0.5}
    strides = [8, 16, 32, 64, 128]
    if family == "retinanet":
        fpn |= {"start_level": 1, "add_extra_convs": "on_input"}
        anchors = {
            "type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 3,
            "ratios": [0.5, 1.0, 2.0], "strides": strides,
        }  # fmt: skip
        head |= {"type": "RetinaHead", "stacked_convs": 4, "anchor_generator": anchors}
        return {"type": "RetinaNet", **model, "bbox_head": head, "test_cfg": test}
    if family == "fcos":
        fpn |= {"start_level": 1, "add_extra_convs": "on_output", "relu_before_extra_convs": True}
        head |= {"type": "FCOSHead", "stacked_convs": 4, "strides": strides, "norm_cfg": group_norm}
        if "tricks" in given:
            head |= {
                "norm_on_bbox": True,
                "centerness_on_reg": True,
                "center_sampling": True,
                "conv_bias": True,
            }
        return {"type": "FCOS", **model, "bbox_head": head, "test_cfg": test}
    if family == "gfl":
        fpn |= {"start_level": 1, "add_extra_convs": "on_output"}
        anchors = {
            "type": "AnchorGenerator", "octave_base_scale": 8, "scales_per_octave": 1,
            "ratios": [1.0], "strides": strides,
        }  # fmt: skip
        head |= {"type": "GFLHead", "stacked_convs": 4, "anchor_generator": anchors, "norm_cfg": group_norm}
        head |= {"loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True}, "reg_max": 16}
        return {"type": "GFL", **model, "bbox_head": head, "test_cfg": test}
    if family == "reppoints":
        fpn |= {"start_level": 1, "add_extra_convs": "on_input", "norm_cfg": group_norm}
        head |= {"type": "RepPointsHead", "stacked_convs": 3, "point_strides": strides, "num_points": 9}
        head |= {"point_feat_channels": CHANNELS, "norm_cfg": group_norm, "transform_method": "moment"}
        return {"type": "RepPointsDetector", **model, "bbox_head": head, "test_cfg": test}
    anchors = {
        "type": "AnchorGenerator", "scales": [8], "ratios": [0.5, 1.0, 2.0], "strides": [4, 8, 16, 32, 64],
    }  # fmt: skip
    rpn = {"type": "RPNHead", "in_channels": CHANNELS, "feat_channels": CHANNELS, "anchor_generator": anchors}
    rpn["bbox_coder"] = coder([1.0, 1.0, 1.0, 1.0])
    cascade = family.startswith("cascade")
    heads = [
        {
            "type": "Shared2FCBBoxHead", "in_channels": CHANNELS, "fc_out_channels": 4 * CHANNELS,
            "roi_feat_size": 7, "num_classes": CLASSES, "bbox_coder": coder(stds),
            "reg_class_agnostic": cascade,
        }
        for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
    ]  # fmt: skip
    regions: dict[str, Any] = {"bbox_roi_extractor": extractor(7)}
    if cascade:
        regions |= {"type": "CascadeRoIHead", "num_stages": 3, "stage_loss_weights": [1, 0.5, 0.25]}
        regions["bbox_head"] = heads
    else:
        regions |= {"type": "StandardRoIHead", "bbox_head": heads[0]}
    del test["nms_pre"], test["min_bbox_size"]
    if "mask" in family:
        regions["mask_roi_extractor"] = extractor(14)
        regions["mask_head"] = {
            "type": "FCNMaskHead", "num_convs": 4, "in_channels": CHANNELS, "conv_out_channels": CHANNELS,
            "num_classes": CLASSES,
        }  # fmt: skip
        test["mask_thr_binary"] = 0.5
    proposals = {"nms_pre": 1000, "max_per_img": 1000, "nms": {"type": "nms", "iou_threshold": 0.7}}
    proposals["min_bbox_size"] = 0
    kind = "CascadeRCNN" if cascade else ("MaskRCNN" if "mask" in family else "FasterRCNN")
    return {
        "type": kind, **model, "rpn_head": rpn, "roi_head": regions,
        "test_cfg": {"rpn": proposals, "rcnn": test},
    }  # fmt: skip


def coder(stds: list[float]) -> dict[str, Any]:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0, 0.0, 0.0, 0.0], "target_stds": stds}


def extractor(side: int) -> dict[str, Any]:
    return {
        "type": "SingleRoIExtractor", "out_channels": CHANNELS, "featmap_strides": [4, 8, 16, 32],
        "roi_layer": {"type": "RoIAlign", "output_size": side, "sampling_ratio": 0},
    }  # fmt: skip


def picture() -> Tensor:
    """(3, 150, 200) uint8 RGB: soft blots, sharp edges, each color its own."""
    y, x = torch.meshgrid(torch.arange(150.0), torch.arange(200.0), indexing="ij")
    red = 127 + 120 * torch.sin(x / 17) * torch.cos(y / 23)
    green = 127 + 100 * torch.sign(torch.sin(x / 31 + y / 19))
    blue = (x * y) % 256
    return torch.stack([red, green, blue]).clamp(0, 255).to(torch.uint8)
