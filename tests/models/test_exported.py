"""Graphs that another program wrote: what their metadata say is compared with what they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detdistill.errors import UserError
from detdistill.models.exported import load_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FACTS = {
    "format": 1, "version": "0.1", "classes": ["cat", "dog"], "size": [32, 64], "keep_ratio": True,
    "padding": [0.0, 0.0, 0.0], "spec": None, "task": "detection", "score_threshold": 0.05,
    "nms_threshold": 0.5, "max_detections": 10, "drop_empty": True,
}  # fmt: skip
SPEC = {
    "model": {"family": "fcos"}, "classes": ["cat", "dog"], "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1],
}  # fmt: skip
OUTPUTS = {
    "boxes": np.array([[[1, 2, 20, 20], [30, 3, 50, 30]]], np.float32),
    "scores": np.array([[0.9, 0.8]], np.float32),
    "labels": np.array([[0, 1]], np.int64),
}


def write(
    path: Path,
    facts: Any = FACTS,
    shape: tuple[Any, ...] = (1, 3, 32, 64),
    outputs: dict[str, Any] | None = None,
    kind: int = 1,
) -> Path:
    """A graph that gives the same outputs for any image."""
    outputs = OUTPUTS if outputs is None else outputs
    tensors = {name: onnx.numpy_helper.from_array(value) for name, value in outputs.items()}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], [name], value=tensor) for name, tensor in tensors.items()],
        "constant",
        [onnx.helper.make_tensor_value_info("images", kind, shape)],
        [onnx.helper.make_tensor_value_info(n, t.data_type, outputs[n].shape) for n, t in tensors.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    entry = model.metadata_props.add()
    entry.key, entry.value = "detdistill", facts if isinstance(facts, str) else json.dumps(facts)
    onnx.save(model, path)
    return path


def test_a_graph_and_metadata_that_agree_detect(tmp_path: Path) -> None:
    model = load_onnx(write(tmp_path / "x.onnx"))
    (found,) = model([torch.zeros(3, 32, 64)])
    assert found["labels"].tolist() == [0, 1]
    assert found["boxes"].tolist() == OUTPUTS["boxes"][0].tolist()


def test_an_input_whose_sizes_are_open_is_taken(tmp_path: Path) -> None:
    assert load_onnx(write(tmp_path / "x.onnx", shape=("N", 3, "H", "W"))).any_batch


DISAGREEING: dict[str, tuple[dict[str, Any], str]] = {
    "another height": ({"shape": (1, 3, 64, 64)}, "input images"),
    "one channel": ({"shape": (1, 1, 32, 64)}, "input images"),
    "three dimensions": ({"shape": (3, 32, 64)}, "input images"),
    "bytes as input": ({"kind": 2}, "input images"),
    "sizes that it does not take": ({"facts": FACTS | {"needs_sizes": True}}, "inputs images"),
    "no labels": ({"outputs": {n: OUTPUTS[n] for n in ("boxes", "scores")}}, "outputs boxes, scores"),
    "boxes of five": ({"outputs": OUTPUTS | {"boxes": np.zeros((1, 2, 5), np.float32)}}, "output boxes"),
    "scores as int64": ({"outputs": OUTPUTS | {"scores": np.zeros((1, 2), np.int64)}}, "output scores"),
    "labels as float": ({"outputs": OUTPUTS | {"labels": np.zeros((1, 2), np.float32)}}, "output labels"),
    "masks that it does not give": ({"facts": FACTS | {"mask_convention": "mmdet"}}, "outputs boxes"),
    "a detector called a segmenter": (
        {"facts": {key: FACTS[key] for key in list(FACTS)[:7]} | {"task": "segmentation"}}, "outputs boxes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DISAGREEING)
def test_metadata_that_are_not_of_the_graph_are_refused(name: str, tmp_path: Path) -> None:
    arguments, said = DISAGREEING[name]
    with pytest.raises(UserError, match=said) as caught:
        load_onnx(write(tmp_path / "x.onnx", **arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": []}, {"classes": ["cat", "cat"]}, {"classes": 2}, {"size": [0, 64]}, {"size": [32]},
        {"size": [10**9, 64]}, {"padding": [0, 0]}, {"padding": [0, 0, float("nan")]}, {"score_threshold": 7},
        {"score_threshold": None}, {"nms_threshold": -1}, {"max_detections": 0}, {"spec": {"classes": 3}},
        {"spec": [1]}, {"more": 1}, {"format": 2}, {"padding": [1e30, 0, 0]}, {"max_detections": 10**9},
        {"spec": {"model": 3, "classes": ["a"], "mean": [0, 0, 0], "std": [1, 1, 1]}, "nms_threshold": None},
        {"spec": SPEC, "nms_threshold": None}, {"task": 3}, {"spec": {**SPEC, "model": [1]}},
    ],
)  # fmt: skip
def test_metadata_that_say_the_impossible_are_refused(change: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.onnx: what it says of its model cannot be used") as caught:
        load_onnx(write(tmp_path / "x.onnx", FACTS | change))
    assert "\n" not in str(caught.value)
    assert not re.search("Facts|Spec|ModelConfig|instance", str(caught.value))


@pytest.mark.parametrize("family", ["rtdetr_v2", None])
def test_a_family_without_suppression_has_no_threshold(family: str | None, tmp_path: Path) -> None:
    spec = None if family is None else {**SPEC, "model": {"family": family}}
    load_onnx(write(tmp_path / "x.onnx", FACTS | {"spec": spec, "nms_threshold": None}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_metadata_that_are_no_facts_are_refused(text: str, tmp_path: Path) -> None:
    said = r"x\.onnx: what it says of its model|does not say what model it is"
    with pytest.raises(UserError, match=said) as caught:
        load_onnx(write(tmp_path / "x.onnx", text))
    assert "Facts" not in str(caught.value)


@pytest.mark.parametrize("label", [2, -1, 10**12])
def test_a_label_of_no_class_is_refused(label: int, tmp_path: Path) -> None:
    outputs = OUTPUTS | {"labels": np.array([[0, label]], np.int64)}
    model = load_onnx(write(tmp_path / "x.onnx", outputs=outputs))
    with pytest.raises(UserError, match="its metadata name 2 classes"):
        model([torch.zeros(3, 32, 64)])


@pytest.mark.parametrize("name", ["boxes", "scores"])
def test_a_graph_with_damaged_weights_is_refused(name: str, tmp_path: Path) -> None:
    outputs = OUTPUTS | {name: np.full_like(OUTPUTS[name], np.nan)}
    model = load_onnx(write(tmp_path / "x.onnx", outputs=outputs))
    with pytest.raises(UserError, match="gives NaN: its weights are damaged"):
        model([torch.zeros(3, 32, 64)])
