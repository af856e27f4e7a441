"""Saved detectors: safetensors files that say what model they hold.

The metadata hold the spec: the recipe's model section, the classes, and the input normalisation.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from detdistill.config import ModelConfig, UserError
from detdistill.models.base import Detector
from detdistill.models.build import construct
from detdistill.models.weights import find_weights, load_weights, read_spec, read_state_dict


def save_model(model: Detector, path: str | Path) -> None:
    """Write a self-describing safetensors file, whole or not at all.

    Args:
        model: built by ``build_model`` (it then has a ``spec``).
        path: the file; its folder must exist.

    Raises:
        UserError: the model has no spec, or the file cannot be written.
    """
    if model.spec is None:
        raise UserError("this model has no spec to save: build it with detdistill.models.build_model")
    path = Path(path)
    tensors = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    metadata = {"detdistill": importlib.metadata.version("detdistill"), "spec": json.dumps(model.spec)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error})") from error


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Detector:
    """Rebuild a detector from a self-describing file or a run folder.

    Args:
        path: a file written by ``save_model``, or a folder that holds ``student.safetensors``.
        device: where to put it.

    Returns:
        The detector, in evaluation mode.

    Raises:
        UserError: no such file, no spec in it, or its tensors do not fit its spec.
    """
    path = find_weights(path)
    spec = read_spec(path)
    if spec is None:
        raise UserError(
            f"{path}: does not say what model it is (it was not saved by detdistill); "
            f"describe the model in a recipe and give the file as its `weights`"
        )
    config = ModelConfig.model_validate({**spec["model"], "weights": None, "backbone_weights": None})
    model = construct(config, spec["classes"], spec)
    load_weights(model, read_state_dict(path), source=str(path))
    return model.to(device).eval()
