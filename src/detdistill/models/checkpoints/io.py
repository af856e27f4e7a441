"""Saved detectors: safetensors files that say what model they hold.

The metadata hold the spec: the recipe's model section, the classes, and the input normalization. Of a model
that no recipe can build they say in words what it was; its weights have the names that it gives them itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from detdistill.errors import UserError
from detdistill.models.base import Model
from detdistill.models.build import construct, of_file, require_buildable, require_forward
from detdistill.models.checkpoints.weights import (
    find_weights,
    load_weights,
    read_metadata,
    read_spec,
    read_state_dict,
)
from detdistill.models.exported import load_onnx


def save_model(model: Model, path: str | Path) -> None:
    """Write a self-describing safetensors file, whole or not at all.

    Args:
        model: built from a section (it then has a ``config``), or any other: then only its weights are kept.
        path: the file; its folder must exist.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    state = model.exported.state_dict()
    tensors = {n: t.detach().cpu().contiguous() for n, t in state.items() if isinstance(t, Tensor)}
    # One entry: safetensors writes several in random order, and equal models are to be equal bytes.
    if model.spec is not None:
        version = importlib.metadata.version("detdistill")
        metadata = {"spec": json.dumps({**model.spec, "detdistill": version})}
    else:
        metadata = {"python": describe(model)}
        tensors = {n: t.clone() for n, t in tensors.items()}  # tied weights, which the format has no word for
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        temporary.chmod(0o666 & ~_umask())  # as other files: safetensors lets nobody else read its own
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error})") from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """Rebuild a detector from a self-describing file or a run folder.

    Args:
        path: a file written by ``save_model``, a folder that holds ``student.safetensors``, or an exported ONNX
            file (it stays on the CPU, and cannot learn).
        device: where to put it.

    Returns:
        The detector, in evaluation mode.

    Raises:
        UserError: no such file, no spec in it, or its tensors do not fit its spec.
    """
    path = find_weights(path)
    if path.suffix == ".onnx":
        return load_onnx(path)
    if path.suffix == ".pt2":
        raise UserError(
            f"{path}: a program of torch.export can hold pickles, so it is not opened here: give the "
            f".safetensors or .onnx file of the same student"
        )
    spec = read_spec(path)
    if spec is None and (python := read_metadata(path).get("python")):
        raise UserError(
            f"{path}: holds the weights of a Python object ({python}): build it, and give its load_state_dict "
            "what safetensors.torch.load_file reads"
        )
    if spec is None:
        raise UserError(
            f"{path}: does not say what model it is (it was not saved by detdistill); "
            f"describe the model in a recipe and give the file as its `weights`"
        )
    require_buildable(spec, path)
    model = construct(of_file(spec), spec.classes, spec)
    require_forward(model, path)
    load_weights(model, read_state_dict(path), source=str(path))
    return model.to(device).eval()


def describe(model: Model, *, values: bool = False) -> str:
    """One line by which a run knows an object again: its class, tensors, classes and pyramid.

    Args:
        model: any detector.
        values: tell apart by the weights as well.
    """
    state = {n: t for n, t in model.exported.state_dict().items() if isinstance(t, Tensor)}
    shapes = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()]
    facts = model.classes, sorted(model.pyramid_channels.items()), model.preprocessor, shapes
    mark = zlib.crc32(repr(facts).encode())
    for tensor in state.values() if values else ():
        mark = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, mark)
    numbers = sum(parameter.numel() for parameter in model.exported.parameters())
    return f"{type(model.exported).__name__}, {numbers} parameters, #{mark:08x}"
