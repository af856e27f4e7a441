"""MMDetection's checkpoints: which model they hold, and their weights under this project's names.

The names and shapes of a file's entries say its family, backbone and sizes. What they cannot say (where the
strides are, the colors' order and scale, thresholds) stands in the config that MMDetection writes into its
files (``mmdet_configs.py``). ``docs/mmdet.md`` lists what is understood.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from detdistill.errors import UserError
from detdistill.models.base import IMAGENET_MEAN, IMAGENET_STD
from detdistill.models.build import construct
from detdistill.models.checkpoints.io import save_model
from detdistill.models.checkpoints.mmdet_configs import (
    Config,
    Triple,
    classes_in,
    config_in,
    detection_settings,
    has_tricks,
    input_scale,
    normalization,
    read_config,
    refuse_what_differs,
    value_at,
)
from detdistill.models.checkpoints.torchvision import COCO_CATEGORIES, TRAINED_SIZE
from detdistill.models.checkpoints.weights import State, find_weights, load_weights, read_content, state_of
from detdistill.models.layers.backbones import offered_strides
from detdistill.output import output_file
from detdistill.recipe import names_of
from detdistill.recipe.models import NetworkConfig, model_config

Style = Literal["pytorch", "caffe"]

WAYS = ("retinanet", "fcos", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn")
"""Families that are built MMDetection's way when asked; others always are."""

COCO_CLASSES = tuple(name for name in COCO_CATEGORIES[1:] if name != "N/A")
FINEST = 8  # stride of a one-stage detector's first level
DETECTRON_BGR = (102.9801, 115.9465, 122.7717)  # the Caffe backbones of the plain FCOS
DETECTRON2_BGR = (103.53, 116.28, 123.675)  # all other Caffe backbones

SIGNS = {
    "bbox_head.retina_cls.weight": "retinanet",
    "bbox_head.conv_centerness.weight": "fcos",
    "bbox_head.fcos_centerness.weight": "fcos",  # as written before MMDetection 2.4
    "bbox_head.centerness.weight": "fcos",
    "bbox_head.gfl_cls.weight": "gfl",
    "bbox_head.reppoints_cls_out.weight": "reppoints",
    "roi_head.bbox_head.fc_cls.weight": "faster_rcnn",
    "roi_head.bbox_head.0.fc_cls.weight": "cascade_rcnn",
}
"""The entry that tells a family."""

BODY = (
    (r"backbone\.((?:layer\d\.\d+\.)?(?:conv\d|bn\d|downsample\.\d)\.\w+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"neck.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.lateral_convs\.(\d+)\.gn\.(\w+)", r"neck.fpn.inner_blocks.\1.1.\2"),
)
TOWERS = (
    (r"bbox_head\.cls_convs\.(\d+)\.conv\.(\w+)", r"head.cls_tower.\1.0.\2"),
    (r"bbox_head\.cls_convs\.(\d+)\.gn\.(\w+)", r"head.cls_tower.\1.1.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.conv\.(\w+)", r"head.box_tower.\1.0.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.gn\.(\w+)", r"head.box_tower.\1.1.\2"),
)
TWO_STAGE = (
    (r"rpn_head\.rpn_conv\.(\w+)", r"rpn.tower.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"rpn.objectness.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"rpn.box.\1"),
)
RENAMES: Mapping[str, Sequence[tuple[str, str]]] = {
    "retinanet": (
        *TOWERS,
        (r"bbox_head\.retina_cls\.(\w+)", r"head.cls.\1"),
        (r"bbox_head\.retina_reg\.(\w+)", r"head.box.\1"),
    ),
    "fcos": (
        *TOWERS,
        (r"bbox_head\.(?:conv|fcos)_cls\.(\w+)", r"head.cls.\1"),
        (r"bbox_head\.(?:conv|fcos)_reg\.(\w+)", r"head.box.\1"),
        (r"bbox_head\.(?:conv_|fcos_)?centerness\.(\w+)", r"head.centerness.\1"),
    ),
    "gfl": (
        *TOWERS,
        (r"bbox_head\.gfl_cls\.(\w+)", r"head.cls.\1"),
        (r"bbox_head\.gfl_reg\.(\w+)", r"head.box.\1"),
    ),
    "reppoints": (
        *TOWERS,
        (r"bbox_head\.reppoints_pts_init_conv\.(\w+)", r"head.points_conv.\1"),
        (r"bbox_head\.reppoints_pts_init_out\.(\w+)", r"head.points.\1"),
        (r"bbox_head\.reppoints_cls_conv\.(\w+)", r"head.cls_look.\1"),
        (r"bbox_head\.reppoints_cls_out\.(\w+)", r"head.cls.\1"),
        (r"bbox_head\.reppoints_pts_refine_conv\.(\w+)", r"head.box_look.\1"),
        (r"bbox_head\.reppoints_pts_refine_out\.(\w+)", r"head.box.\1"),
        (r"bbox_head\.(moment_transfer)", r"head.\1"),
    ),
    "faster_rcnn": TWO_STAGE,
    "mask_rcnn": TWO_STAGE,
    "cascade_rcnn": TWO_STAGE,
    "cascade_mask_rcnn": TWO_STAGE,
}
"""MMDetection's names and ours, beside those of the backbone, the neck and the RoI heads."""

ROI_HEAD = {"shared_fcs.0": "fc6", "shared_fcs.1": "fc7", "fc_cls": "cls", "fc_reg": "box"}
MASK_HEAD = {**{f"convs.{i}.conv": f"tower.{i}.0" for i in range(4)}, "upsample": "up", "conv_logits": "mask"}


@dataclass(frozen=True)
class Checkpoint:
    """What a file is: how to build it here, and how its numbers are to be taken.

    Attributes:
        model: the section of a recipe that builds it.
        classes: names by class row.
        mean, std: of RGB in [0, 1].
        bgr: whether its first convolution sees blue, green, red.
        settings: where what the entries do not say was taken from.
    """

    model: NetworkConfig
    classes: tuple[str, ...]
    mean: Triple
    std: Triple
    bgr: bool
    settings: str


def import_mmdet(
    path: str | Path,
    out: str | Path | None = None,
    *,
    config: str | Path | None = None,
    style: Style | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Path, Checkpoint]:
    """Write one of MMDetection's checkpoints as a file of this project, which says what model it holds.

    Args:
        path: the ``.pth`` file; it is never unpickled.
        out: the file to write; beside ``path``, ending in ``.safetensors``, when not given.
        config: the config with all its bases written out, as MMDetection leaves it in its work folder; the one
            in the checkpoint when not given.
        style: for a checkpoint without a config that can be read: take the published settings of its family
            over this kind of backbone, ``pytorch`` or ``caffe``.
        classes: names of the class rows; those in the file, or COCO's 80, when not given.

    Returns:
        The file written, and what it holds.

    Raises:
        UserError: a file that cannot be read, a model that this project does not compute exactly, entries
            without a place here (all are listed), class names missing.
    """
    path = find_weights(path)
    out = output_file(out if out is not None else path.with_suffix(".safetensors"))
    content = read_content(path, _strip_command(path))
    state = state_of(content, path)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    settings = read_config(Path(config)) if config is not None else config_in(meta)
    checkpoint = describe(state, settings, style=style, classes=classes or classes_in(meta), source=str(path))
    model = construct(checkpoint.model, checkpoint.classes)
    model.preprocessor = replace(model.preprocessor, mean=checkpoint.mean, std=checkpoint.std)
    load_weights(model, convert(state, checkpoint, source=str(path)), source=str(path))
    save_model(model, out)
    return out, checkpoint


# --- what a file is --------------------------------------------------------------------------------------


def describe(
    state: Mapping[str, Tensor],
    config: Config | None,
    *,
    style: Style | None = None,
    classes: Sequence[str] | None = None,
    source: str = "the checkpoint",
) -> Checkpoint:
    """What the entries and the config tell; arguments and errors as in :func:`import_mmdet`."""
    family, backbone = family_of(state, source), backbone_of(state, source)
    if config is None and style is None:
        raise UserError(
            f"{source}: holds no config that can be read; give MMDetection's config with all its bases written "
            f"out (--config), or --style pytorch or --style caffe for the published settings of {family}"
        )
    if config is not None and style is not None:
        raise UserError(f"{source}: its config tells the style: leave --style out")
    lateral = "neck.lateral_convs.0.conv.weight"
    if lateral not in state:
        raise UserError(f"{source}: has no {lateral}: its neck is not MMDetection's FPN")
    options: dict[str, Any] = {
        "family": family, "backbone": backbone, "channels": len(state[lateral]), "size": TRAINED_SIZE,
    }  # fmt: skip
    depth = sum(bool(re.fullmatch(r"bbox_head\.cls_convs\.\d+\.conv\.weight", name)) for name in state)
    if depth:
        options["head_depth"] = depth
    if config is not None:
        refuse_what_differs(config, family, options["channels"], source)
        caffe = value_at(config, "model.backbone.style", "pytorch") == "caffe"
        tricks = family == "fcos" and has_tricks(config, source)
        mean, std, bgr = normalization(config, source)
        options |= detection_settings(config, source)
    else:
        caffe = bgr = style == "caffe"
        # Of FCOS's published settings only the improved ones have a bias before GroupNorm.
        tricks = "bbox_head.cls_convs.0.conv.bias" in state and family == "fcos"
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if caffe:
            mean = input_scale(DETECTRON_BGR if family == "fcos" and not tricks else DETECTRON2_BGR, bgr)
            std = input_scale((1.0, 1.0, 1.0), bgr)
        options["nms_threshold"] = 0.6 if family == "gfl" or tricks else 0.5
    if family in WAYS:
        options["convention"] = "mmdet_tricks" if tricks else "mmdet"
    if caffe:
        options["stride_in_1x1"] = True
    rows = _class_rows(state, family)
    names = names_of(classes, "classes") if classes is not None else COCO_CLASSES
    if len(names) != rows:
        raise UserError(
            f"{source}: has {rows} classes, and {len(names)} names are known: "
            f"give all {rows} in their order, --classes a,b,c"
        )
    settings = "its config" if config is not None else f"published, {style}"
    section = model_config(options, source)
    assert isinstance(section, NetworkConfig)
    return Checkpoint(section, names, mean, std, bgr, settings)


def family_of(state: Mapping[str, Tensor], source: str) -> str:
    """The family that the entries are of.

    Raises:
        UserError: none that is known.
    """
    family = next((family for sign, family in SIGNS.items() if sign in state), None)
    if family is None:
        heads = sorted({".".join(name.split(".")[:2]) for name in state if not name.startswith("backbone.")})
        raise UserError(
            f"{source}: is none of MMDetection's (2.x, 3.x) {', '.join(dict.fromkeys(SIGNS.values()))}; "
            f"it has {', '.join(heads[:12]) or 'a backbone alone'}"
        )
    if any(name.startswith("roi_head.mask_head.") for name in state):
        family = {"faster_rcnn": "mask_rcnn", "cascade_rcnn": "cascade_mask_rcnn"}[family]
    return family


def backbone_of(state: Mapping[str, Tensor], source: str) -> str:
    """timm's name of the ResNet or ResNeXt whose entries these are.

    Raises:
        UserError: it is none.
    """
    blocks = [
        name.split(".")[1] for name in state if re.fullmatch(r"backbone\.layer\d\.\d+\.bn1\.weight", name)
    ]
    layout = tuple(blocks.count(f"layer{i}") for i in range(1, 5))
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    depths = {
        (2, 2, 2, 2): "18",
        (3, 4, 6, 3): "50" if bottleneck else "34",
        (3, 4, 23, 3): "101",
        (3, 8, 36, 3): "152",
    }
    if layout not in depths:
        raise UserError(f"{source}: its backbone is no ResNet (blocks of layer1 to layer4: {list(layout)})")
    name = f"resnet{depths[layout]}"
    if bottleneck:
        width, of_group = state["backbone.layer1.0.conv2.weight"].shape[:2]
        if width != of_group:
            name = f"resnext{depths[layout]}_{width // of_group}x{of_group}d"
    offered_strides(name)  # refuses what timm does not have
    return name


def _class_rows(state: Mapping[str, Tensor], family: str) -> int:
    if family == "fcos":
        return len(state.get("bbox_head.conv_cls.bias", state.get("bbox_head.fcos_cls.bias", ())))
    rows = next(len(state[sign]) for sign in SIGNS if sign in state)
    if family == "retinanet":
        return rows // (len(state.get("bbox_head.retina_reg.bias", (0,) * 4)) // 4)
    return rows if family in ("gfl", "reppoints") else rows - 1  # the background has a row


# --- weights ---------------------------------------------------------------------------------------------


def convert(state: Mapping[str, Tensor], checkpoint: Checkpoint, source: str = "the checkpoint") -> State:
    """The entries under this project's names, ready for the model that ``checkpoint`` describes.

    Raises:
        UserError: entries that have no place there; all are listed.
    """
    family = checkpoint.model.family
    laterals = sum(bool(re.fullmatch(r"neck\.lateral_convs\.\d+\.conv\.weight", name)) for name in state)
    places = {name: rename(name, family, laterals) for name in state}
    strangers = [name for name in places if places[name] is None and not _is_constant(name, state[name])]
    if strangers:
        raise UserError(
            f"{source}: {len(strangers)} entries have no place in {family} over {checkpoint.model.backbone}: "
            f"{', '.join(strangers)}"
        )
    renamed = {place: state[name] for name, place in places.items() if place is not None}
    if checkpoint.bgr:
        renamed["backbone.body.conv1.weight"] = renamed["backbone.body.conv1.weight"].flip(1)
    if family == "fcos":
        for name in [name for name in renamed if re.fullmatch(r"head\.\w+_tower\.\d\.0\.weight", name)]:
            # A convolution without a bias is one whose bias is 0.
            renamed.setdefault(name.replace("weight", "bias"), torch.zeros(len(renamed[name])))
    return {name: _with_background(name, tensor, family) for name, tensor in renamed.items()}


def _with_background(name: str, tensor: Tensor, family: str) -> Tensor:
    """Class rows of a two-stage detector: there the background is the last class, and has neither box nor mask;
    here it is the first, with a box and a mask that are never read."""
    if re.fullmatch(r"(roi_head|later_heads\.\d)\.cls\.\w+", name):
        return tensor.roll(1, dims=0)
    if re.fullmatch(r"mask_branch\.heads\.\d\.mask\.\w+", name):
        return torch.cat([torch.zeros_like(tensor[:1]), tensor])
    if family in ("faster_rcnn", "mask_rcnn") and name.startswith("roi_head.box."):
        return torch.cat([torch.zeros_like(tensor[:4]), tensor])
    return tensor


def rename(name: str, family: str, laterals: int) -> str | None:
    """This project's name of an entry, or None.

    Args:
        name: MMDetection's.
        family: this project's.
        laterals: levels that the neck takes from the backbone.
    """
    output = re.fullmatch(r"neck\.fpn_convs\.(\d+)\.(conv|gn)\.(\w+)", name)
    if output:
        level, part, norm = int(output[1]), output[3], output[2] == "gn"
        if level < laterals:
            return f"neck.fpn.layer_blocks.{level}.{int(norm)}.{part}"
        has_norm = family == "reppoints"
        return f"neck.extra.{level - laterals}.{f'{int(norm)}.' if has_norm else ''}{part}"
    scale = re.fullmatch(r"bbox_head\.scales\.(\d+)\.scale", name)
    if scale and family in ("fcos", "gfl"):
        return f"head.scales.{FINEST << int(scale[1])}"
    region = re.fullmatch(r"roi_head\.(bbox|mask)_head\.(?:(\d)\.)?(.+)\.(\w+)", name)
    if region:
        stage, layer, kind = int(region[2] or 0), region[3], region[4]
        if region[1] == "mask" and layer in MASK_HEAD:
            return f"mask_branch.heads.{stage}.{MASK_HEAD[layer]}.{kind}"
        if region[1] == "bbox" and layer in ROI_HEAD:
            head = f"later_heads.{stage - 1}" if stage else "roi_head"
            return f"{head}.{ROI_HEAD[layer]}.{kind}"
    for pattern, replacement in (*BODY, *RENAMES[family]):
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return None


def _is_constant(name: str, tensor: Tensor) -> bool:
    """Whether it is the list of distances that GFL's bins stand for, which is no weight."""
    return name == "bbox_head.integral.project" and torch.equal(
        tensor, torch.arange(len(tensor), dtype=tensor.dtype)
    )


def _strip_command(path: Path) -> str:
    return (
        "if you trust it, write it again where MMDetection is installed: "
        f"python -c \"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
        "torch.save({'state_dict': c['state_dict'], 'meta': {k: v for k, v in c['meta'].items() "
        f"if k in ('cfg', 'config', 'CLASSES', 'dataset_meta')}}}}, '{path.stem}.plain.pth')\""
    )
