"""What files of strangers say of their models: refused in one line where it cannot be used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from detdistill.errors import UserError
from detdistill.models import build_model, load_model, load_teacher, load_weights, read_state_dict, save_model
from detdistill.models.build import needs_masks
from detdistill.models.checkpoints.weights import load_backbone
from detdistill.recipe import model_config

CLASSES = ("cat", "dog", "bird")
SMALL = model_config(
    family="fcos", backbone="mobilenetv3_small_050", channels=16, head_depth=1, size=(64, 64), strides=(8, 16)
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("good") / "model.safetensors"
    save_model(build_model(SMALL, CLASSES), file)
    return file


def spec_of(file: Path) -> Any:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["spec"])


def with_spec(file: Path, spec: str, out: Path) -> Path:
    save_file(load_file(file), out, {"spec": spec})
    return out


def nan() -> float:
    return float("nan")


DAMAGED: dict[str, tuple[Any, str]] = {
    "no classes": ({"classes": []}, "classes"),
    "classes as a number": ({"classes": 3}, "classes"),
    "classes as text": ({"classes": "cat"}, "classes"),
    "a class that is no text": ({"classes": ["cat", "dog", 3]}, "classes.2"),
    "the same class twice": ({"classes": ["cat", "dog", "cat"]}, "'cat' is named twice"),
    "a class without a name": ({"classes": ["cat", "dog", " "]}, "empty name"),
    "two means": ({"mean": [0, 0]}, "mean"),
    "a mean that is no number": ({"mean": [0, 0, nan()]}, "mean.2"),
    "an infinite mean": ({"mean": [0, 0, float("inf")]}, "mean.2"),
    "an id that is text": ({"category_ids": [1, 2, "3"]}, "category_ids.2"),
    "two equal ids": ({"category_ids": [1, 2, 2]}, "category_ids"),
    "std of 0": ({"std": [1, 1, 0]}, "std.2"),
    "a negative std": ({"std": [1, 1, -1]}, "std.2"),
    "an unknown family": ({"model": {"family": "yolo"}}, "model.family"),
    "no channels": ({"model": {"channels": 0}}, "model.channels"),
    "a model that is a list": ({"model": []}, "model"),
    "a size of four": ({"model": {"size": [1, 2, 3, 4]}}, "model.size"),
    "a Python object": ({"model": {"python": "Net, 3 parameters"}}, "Python object"),
    "ids of two classes": ({"category_ids": [1, 2]}, "category_ids"),
    "something else": ({"run_this": "os.system"}, "run_this"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_not_a_spec_is_refused_with_its_place(name: str, good: Path, tmp_path: Path) -> None:
    change, said = DAMAGED[name]
    file = with_spec(good, json.dumps({**spec_of(good), **change}), tmp_path / "x.safetensors")
    section = model_config(weights=str(file))
    for read in (
        lambda: load_model(file),
        lambda: load_teacher(section, CLASSES),
        lambda: build_model(section, CLASSES),
        lambda: needs_masks(section),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert said in str(caught.value)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model", "classes", "mean", "std"])
def test_a_spec_without_a_part_is_refused(missing: str, good: Path, tmp_path: Path) -> None:
    spec = spec_of(good)
    del spec[missing]
    file = with_spec(good, json.dumps(spec), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"{missing}: Field required"):
        load_model(file)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "NaN", "null", "3", "[" * 100_000, '{"a":' * 100_000])
def test_text_that_is_no_spec_is_refused(text: str, good: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.safetensors: what it says of its model"):
        load_model(with_spec(good, text, tmp_path / "x.safetensors"))


def test_a_spec_that_says_little_is_completed_by_defaults(good: Path, tmp_path: Path) -> None:
    spec = spec_of(good)
    spec["model"] = {
        key: spec["model"][key] for key in ("family", "backbone", "channels", "head_depth", "strides")
    }
    file = with_spec(good, json.dumps(spec), tmp_path / "x.safetensors")
    assert load_model(file).classes == CLASSES
    spec["model"] = {"backbone": "mobilenetv3_small_050"}  # a RetinaNet, which these weights are not
    file = with_spec(good, json.dumps(spec), tmp_path / "y.safetensors")
    with pytest.raises(UserError, match=r"do not fit|says that it holds"):
        load_model(file)


def test_files_of_earlier_versions_are_read(good: Path, tmp_path: Path) -> None:
    spec = spec_of(good)
    del spec["detdistill"]
    save_file(load_file(good), tmp_path / "x.safetensors", {"detdistill": "0.1", "spec": json.dumps(spec)})
    again, now = load_model(tmp_path / "x.safetensors"), load_model(good)
    assert again.spec == now.spec
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), now.parameters(), strict=True))


def test_equal_models_are_equal_bytes(good: Path, tmp_path: Path) -> None:
    model = load_model(good)
    marks = set()
    for _ in range(8):
        save_model(model, tmp_path / "again.safetensors")
        marks.add(hashlib.sha256((tmp_path / "again.safetensors").read_bytes()).hexdigest())
    assert marks == {hashlib.sha256(good.read_bytes()).hexdigest()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, good: Path, tmp_path: Path) -> None:
    state = load_file(good)
    name = next(name for name in state if name.startswith("head.") and name.endswith("weight"))
    state[name].view(-1)[-1] = value
    with safe_open(good, framework="pt") as opened:
        save_file(state, tmp_path / "x.safetensors", opened.metadata())
    with pytest.raises(UserError, match=rf"x\.safetensors: 1 entries have infinite values or NaN: {name}"):
        load_model(tmp_path / "x.safetensors")
    model = load_model(good)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="infinite values or NaN"):
        load_weights(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_backbone_weights_that_are_not_finite_are_refused() -> None:
    model: Any = build_model(SMALL, CLASSES)
    state = {name: tensor.clone() for name, tensor in model.backbone.body.state_dict().items()}
    state["conv_stem.weight"][0] = float("nan")
    with pytest.raises(UserError, match=r"infinite values or NaN: backbone\.body\.conv_stem\.weight"):
        load_backbone(model.backbone, state)


@pytest.mark.parametrize("length", [1, 2])
def test_a_file_that_holds_itself_is_refused(length: int, tmp_path: Path) -> None:
    outer: dict[str, Any] = {}
    outer["model"] = outer if length == 1 else {"state_dict": outer}
    torch.save(outer, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: holds itself"):
        read_state_dict(tmp_path / "x.pt")


def test_numbers_written_as_text_are_numbers(good: Path, tmp_path: Path) -> None:
    spec = {**spec_of(good), "mean": ["0.5", 0, 0]}
    file = with_spec(good, json.dumps(spec), tmp_path / "x.safetensors")
    assert load_model(file).preprocessor.mean == (0.5, 0.0, 0.0)


@pytest.mark.parametrize("change", [{"model": {"channels": 4096}}, {"classes": [str(i) for i in range(10**5)]}])
def test_a_model_larger_than_its_file_is_refused_before_it_takes_memory(
    change: dict[str, Any], good: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    spec = spec_of(good)
    spec |= {
        "classes": change.get("classes", spec["classes"]),
        "model": spec["model"] | change.get("model", {}),
    }
    file = with_spec(good, json.dumps(spec), tmp_path / "x.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for section in (None, model_config(weights=str(file))):
        with pytest.raises(UserError, match=r"x\.safetensors: says that it holds a model of .* MiB"):
            load_model(file) if section is None else build_model(section, CLASSES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: (t * 10).to(torch.int8), "torch.int8"),
        (lambda t: t.to(torch.complex64), "torch.complex64"),
        (lambda t: t.to_sparse(), "torch.float32 torch.sparse_coo"),
        (lambda t: t.bool(), "torch.bool"),
    ],
)
def test_values_that_cannot_be_copied_as_they_are_are_refused(damage: Any, said: str, good: Path) -> None:
    model = load_model(good)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = next(name for name in state if name.startswith("head.") and name.endswith("weight"))
    state[name] = damage(state[name])
    with pytest.raises(UserError, match=rf"wrong shape {name}: file {said}"):
        load_weights(model, state)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken(kind: torch.dtype, good: Path) -> None:
    model = load_model(good)
    state = {n: t.to(kind) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    assert load_weights(model, state).complete
