"""torchvision's published detectors: their weights under this project's names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models import detection

from detdistill.errors import UserError
from detdistill.models.base import Model
from detdistill.models.checkpoints.weights import PARTS, LoadReport, load_weights

PUBLISHED: dict[str, Any] = {
    "retinanet": detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    "fcos": detection.FCOS_ResNet50_FPN_Weights.COCO_V1,
    "faster_rcnn": detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "mask_rcnn": detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
}
COCO_CATEGORIES: tuple[str, ...] = tuple(PUBLISHED["fcos"].meta["categories"])
BACKGROUND = COCO_CATEGORIES[0]
TRAINED_SIZE = (800, 1333)

RENAMES = (
    (r"^backbone\.fpn\.extra_blocks\.p6\.", "neck.extra.0."),
    (r"^backbone\.fpn\.extra_blocks\.p7\.", "neck.extra.1."),
    (r"^backbone\.fpn\.", "neck.fpn."),
    (r"^(neck\.fpn\.\w+_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),  # as written before torchvision 0.13
    (r"^head\.classification_head\.conv\.", "head.cls_tower."),
    (r"^head\.regression_head\.conv\.", "head.box_tower."),
    (r"^head\.classification_head\.cls_logits\.", "head.cls."),
    (r"^head\.regression_head\.bbox_reg\.", "head.box."),
    (r"^head\.regression_head\.bbox_ctrness\.", "head.centerness."),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.tower.0.0.\1"),  # as written before torchvision 0.13
    (r"^rpn\.head\.conv\.", "rpn.tower."),
    (r"^rpn\.head\.cls_logits\.", "rpn.objectness."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.box."),
    (r"^roi_heads\.box_head\.", "roi_head."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.box."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "mask_branch.heads.0.up."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "mask_branch.heads.0.mask."),
    (r"^roi_heads\.mask_head\.(\d)\.", r"mask_branch.heads.0.tower.\1."),
)


def download(family: str) -> tuple[dict[str, Tensor], tuple[str, ...], float]:
    """The published COCO weights of a family.

    Returns:
        state dict in torchvision's naming, class names by row, epsilon of its frozen BatchNorm.

    Raises:
        UserError: there are none, or the download failed.
    """
    if family not in PUBLISHED:
        raise UserError(f"weights: torchvision's are taken of {', '.join(PUBLISHED)}, not of {family}")
    weights = PUBLISHED[family]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise UserError(
            f"weights: torchvision: {weights.url} cannot be downloaded ({str(error).splitlines()[0]}); "
            f"download it elsewhere into torch's hub cache ({torch.hub.get_dir()}/checkpoints)"
        ) from error
    # torchvision trained these two before its frozen BatchNorm had an epsilon, and sets it to 0 on loading.
    epsilon = 1e-5 if family == "fcos" else 0.0
    return dict(state), tuple(weights.meta["categories"]), epsilon


def is_torchvision(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a torchvision detector with a feature pyramid."""
    return any(name.startswith("backbone.fpn.") for name in state)


def conventions_of(state: Mapping[str, Tensor], classes: Sequence[str]) -> tuple[tuple[str, ...], float]:
    """What the class rows of a torchvision file mean, and its BatchNorm's epsilon.

    91 rows are the published COCO weights; else the rows are the data's classes in their order, after a
    background row if there is one more row than classes (torchvision's own habit).

    Raises:
        UserError: the number of rows fits neither.
    """
    two_stage = "roi_heads.box_predictor.cls_score.bias" in state
    dense = len(state.get("head.classification_head.cls_logits.bias", ()))
    anchors = len(state.get("head.regression_head.bbox_reg.bias", ())) // 4
    rows = len(state["roi_heads.box_predictor.cls_score.bias"]) if two_stage else dense // max(1, anchors)
    if rows == len(COCO_CATEGORIES):
        return COCO_CATEGORIES, 1e-5 if any("bbox_ctrness" in name for name in state) else 0.0
    if rows == len(classes) + 1:
        return (BACKGROUND, *classes), 1e-5
    if rows == len(classes) and not two_stage:
        return tuple(classes), 1e-5
    raise UserError(
        f"these torchvision weights have {rows} class rows, the data {len(classes)} classes: "
        f"list in `data.classes` what the weights were trained on"
    )


def load_torchvision(
    model: Model,
    state: Mapping[str, Tensor],
    categories: Sequence[str],
    *,
    require: Sequence[str] = PARTS,
    norm_epsilon: float = 1e-5,
    source: str = "torchvision",
) -> LoadReport:
    """Load a torchvision RetinaNet, FCOS, Faster or Mask R-CNN over ResNet-50 into the same model of ours.

    Args:
        model: same family, ``resnet50`` (or another ResNet of the same layout), default sizes.
        state: its ``state_dict()``, in the present or the earlier naming.
        categories: the names of its class rows, the background first for two-stage models (``weights.meta``);
            rows are chosen by name, so ``model.classes`` may be any part of them.
        require: as in :func:`~detdistill.models.checkpoints.weights.load_weights`.
        norm_epsilon: the epsilon of the state's BatchNorm layers.
        source: how messages call the weights.

    Raises:
        UserError: as :func:`~detdistill.models.checkpoints.weights.load_weights`.
    """
    # Towers written flat: FCOS as convolution, norm, ReLU; RetinaNet, before torchvision 0.13, without norm.
    block = 3 if any("bbox_ctrness" in name for name in state) else 2
    renamed = {rename(name, block): tensor for name, tensor in state.items()}
    if norm_epsilon != 1e-5:
        _absorb_epsilon(renamed, norm_epsilon)
    two_stage = any(name.startswith("roi_head.") for name in renamed)
    return load_weights(
        model, renamed, require=require, classes=categories[1:] if two_stage else categories, source=source
    )


def rename(name: str, block: int) -> str:
    """This project's name of a torchvision entry; ``block`` counts the modules of a flat tower's block."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    flat = re.match(r"^head\.(cls|box)_tower\.(\d+)\.(weight|bias)$", name)
    if flat:
        name = f"head.{flat[1]}_tower.{int(flat[2]) // block}.{int(flat[2]) % block}.{flat[3]}"
    counted = re.match(r"^roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)$", name)  # before torchvision 0.13
    if counted:
        name = f"mask_branch.heads.0.tower.{int(counted[1]) - 1}.0.{counted[2]}"
    return name


def _absorb_epsilon(state: dict[str, Tensor], epsilon: float) -> None:
    """Scale the norms' weights so that w / sqrt(var + ε) is what it was, now with the usual ε = 1e-5."""
    for name in [name for name in state if name.endswith("running_var")]:
        variance = state[name].double()
        weight = name.replace("running_var", "weight")
        factor = ((variance + 1e-5) / (variance + epsilon)).sqrt()
        state[weight] = (state[weight].double() * factor).to(state[weight].dtype)
