"""Local checkpoint folders of Hugging Face transformers: ``config.json`` beside ``model.safetensors``.

Nothing is downloaded and nothing unpickled.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detdistill.data.text import read_file
from detdistill.errors import UserError

RTDETR = "rt_detr"
FAMILIES = {RTDETR: "rtdetr_v2", "rt_detr_v2": "rtdetr_v2", "d_fine": "d_fine"}
"""Our name of each ``model_type`` that can be read. RT-DETR is RT-DETRv2 with that one's default options."""

WEIGHTS = "model.safetensors"

RENAMES = (
    (r"^model\.backbone\.model\.", "backbone.body."),
    (r"^model\.encoder_input_proj\.", "neck.projections."),
    (r"^model\.encoder\.", "neck.encoder."),
    (r"^model\.", "head."),
)


def is_checkpoint(path: Path) -> bool:
    """Whether this is the weights file of such a folder."""
    return path.name == WEIGHTS and (path.parent / "config.json").is_file()


def read_spec(path: Path) -> dict[str, Any]:
    """What a file saved by detdistill would say of the model in this weights file.

    Raises:
        UserError: a configuration that cannot be read, or of another kind of model.
    """
    config = _read_json(path.parent / "config.json")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{path.parent}: a transformers checkpoint of {kind!r}; only {', '.join(FAMILIES)} can be read"
        )
    try:
        names = {int(row): str(name) for row, name in config["id2label"].items()}
        classes = [names[row] for row in range(len(names))]
        size, mean, std = _convention(path.parent / "preprocessor_config.json")
        model = {
            "family": FAMILIES[kind],
            "backbone": config["backbone_config"]["model_type"],
            "channels": config["encoder_hidden_dim"],
            "head_depth": config["decoder_layers"],
            "norm": "frozen" if config.get("freeze_backbone_batch_norms", True) else "batch",
            "size": size,
            "transformers": config if kind != RTDETR else config | _as_version_2(config),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path.parent / 'config.json'}: not a whole {kind} configuration ({error!r:.120})"
        ) from None
    return {"model": model, "classes": classes, "mean": mean, "std": std}


def read_state(path: Path) -> dict[str, Tensor]:
    """Its tensors under this project's names.

    transformers reads them, since it knows how names changed over its versions and which heads share tensors.

    Raises:
        UserError: transformers is not installed, or cannot read the file.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: a transformers checkpoint needs transformers: pip install 'detdistill[transformers]'"
        ) from error
    told = transformers.utils.logging
    bars = told.is_progress_bar_enabled()
    told.disable_progress_bar()
    try:
        network, info = transformers.AutoModelForObjectDetection.from_pretrained(
            path.parent,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserError(f"{path}: transformers cannot read it ({str(error).splitlines()[0]:.160})") from error
    finally:
        if bars:
            told.enable_progress_bar()
    drawn = set(info["missing_keys"])
    state = {}
    for name, tensor in network.state_dict().items():
        # The predictions are in the decoder under another name too.
        if name in drawn or not name.startswith("model."):
            continue
        for pattern, ours in RENAMES:
            renamed, count = re.subn(pattern, ours, name)
            if count:
                state[renamed] = tensor
                break
    if network.config.model_type == RTDETR:  # there the share of each point is no buffer
        points = network.config.decoder_n_points
        shares = torch.full((network.config.num_feature_levels * points,), 1 / points)
        for layer in range(network.config.decoder_layers):
            state[f"head.decoder.layers.{layer}.encoder_attn.n_points_scale"] = shares
    return state


def _as_version_2(config: dict[str, Any]) -> dict[str, Any]:
    """What RT-DETRv2's configuration says else, where it is to be an RT-DETR."""
    return {
        "model_type": "rt_detr_v2",
        "decoder_n_levels": config.get("num_feature_levels", 3),
        "decoder_method": "default",
        "decoder_offset_scale": 0.5,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a configuration")
    return content


def _convention(path: Path) -> tuple[list[int], list[float], list[float]]:
    """Input (height, width), mean and std; the published models' where the file does not say."""
    told = _read_json(path) if path.is_file() else {}
    try:
        size = told.get("size") or {}
        sides = [int(size.get("height", 640)), int(size.get("width", 640))]
        if told.get("do_normalize", False) and "image_mean" in told and "image_std" in told:
            return sides, list(told["image_mean"]), list(told["image_std"])
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: not a whole image processor ({error!r:.120})") from None
    return sides, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
