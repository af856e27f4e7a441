"""Exported files: against PyTorch's own five steps, on images of other sizes than the graph's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from detdistill.cli import main
from detdistill.commands.predict import predict
from detdistill.deployment.export import Agreement, compare, export
from detdistill.errors import UserError
from detdistill.evaluation.evaluate import evaluate
from detdistill.models import Detector, Preprocess, build_model, load_model, save_model
from detdistill.models.exported import ExportedDetector, load_onnx
from detdistill.models.graph import DetectionGraph, letterbox_of
from detdistill.recipe import parse_recipe

pytestmark = pytest.mark.slow  # each export takes seconds

SIZE = (64, 96)
CLASSES = ("bolt", "nut")


def detector(family: str = "fcos", **options: object) -> Detector:
    """Untrained, but with many detections of scores and sizes that differ."""
    torch.manual_seed(0)
    section = {"family": family, "backbone": "mobilenetv3_small_050", "channels": 8, "head_depth": 1, **options}
    model = build_model(parse_recipe({"data": "digits", "student": section}).student, CLASSES)
    for parameter in model.head.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    nn.init.constant_(model.head.cls.bias, 0.0)
    return model.eval()


def pictures(folder: Path) -> Path:
    """Smooth colors, higher, wider and larger than the graph's input."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(((80, 40), (50, 120), (200, 170))):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "in")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, Path]:
    """A weights file and its export."""
    root = tmp_path_factory.mktemp("export")
    weights = root / "student.safetensors"
    save_model(detector(), weights)
    return weights, export(weights, size=SIZE, check=folder).path


def as_if_trained_at(model: Detector) -> Detector:
    """The torch path on the graph's canvas."""
    model.preprocessor = letterbox_of(model.preprocessor, SIZE)
    return model


# --- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("retinanet", {}),
        ("fcos", {"convention": "mmdet_tricks", "score_threshold": 0.5}),
        ("gfl", {"score_threshold": 0.4}),
        ("reppoints", {"score_threshold": 0.5}),
    ],
    ids=["retinanet", "fcos-mmdet_tricks", "gfl", "reppoints"],
)
def test_every_one_stage_family_detects_what_pytorch_does(
    family: str, options: dict[str, object], folder: Path, tmp_path: Path
) -> None:
    model = detector(family, **options)
    done = export(model, tmp_path / "x.onnx", size=SIZE, check=folder)
    assert done.agreement.detections > 5
    assert done.agreement.equal == 1
    assert done.agreement.box_difference < 0.01
    assert done.agreement.score_difference < 1e-4


def test_predictions_are_those_of_the_torch_path(saved: tuple[Path, Path], folder: Path) -> None:
    weights, path = saved
    ours = predict(path, folder, threshold=0.5, device="cpu")
    theirs = predict(as_if_trained_at(load_model(weights)), folder, threshold=0.5, device="cpu")
    assert sum(len(one.scores_K) for one in theirs) > 20
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.boxes_K4, other.boxes_K4, atol=1e-3, rtol=0)
        torch.testing.assert_close(mine.scores_K, other.scores_K, atol=1e-5, rtol=0)
        assert mine.names == other.names


@pytest.mark.parametrize(
    "convention", [Preprocess(bgr=True, fill=0.5), Preprocess(keep_ratio=False, mean=(0.2, 0.5, 0.9))]
)
def test_input_conventions(convention: Preprocess, folder: Path, tmp_path: Path) -> None:
    model = detector(strides=[16, 32])
    model.preprocessor = convention
    if not convention.keep_ratio:
        model.preprocessor = letterbox_of(convention, SIZE)
    assert export(model, tmp_path / "x.onnx", size=SIZE, check=folder).agreement.equal == 1


def test_any_number_of_images(folder: Path, tmp_path: Path) -> None:
    model = as_if_trained_at(detector(strides=[16, 32]))
    exported = load_onnx(export(model, tmp_path / "x.onnx", size=SIZE, dynamic_batch=True, check=folder).path)
    images = [torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8) for _ in range(3)]
    with torch.inference_mode():
        for ours, theirs in zip(exported(images), model(images), strict=True):
            assert len(theirs["scores"]) > 5
            torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=1e-3, rtol=0)
            torch.testing.assert_close(ours["labels"], theirs["labels"])


def test_a_program_of_torch_export(folder: Path, tmp_path: Path) -> None:
    model = as_if_trained_at(detector(strides=[16, 32]))
    done = export(model, tmp_path / "x.pt2", size=SIZE, dynamic_batch=True, check=folder)
    assert done.agreement.equal == 1
    assert done.agreement.detections > 5
    stored = {"detdistill": ""}
    program = torch.export.load(done.path, extra_files=stored).module()
    assert json.loads(stored["detdistill"])["classes"] == list(CLASSES)
    images = torch.randint(0, 256, (3, 3, *SIZE)).float()
    (boxes, scores, labels), candidates = program(images), DetectionGraph(model)(images)
    for theirs, ours in zip((boxes, scores, labels), candidates, strict=True):
        torch.testing.assert_close(theirs, ours)
    with pytest.raises(UserError, match=r"not opened here: give the \.safetensors"):
        load_model(done.path)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (100, 50), (50, 100), (31, 1000), (1000, 31), (7, 7)])
def test_letterbox_holds_every_image(height: int, width: int) -> None:
    batch = letterbox_of(Preprocess(), SIZE)([torch.rand(3, height, width)])
    assert batch.padded_size == SIZE
    scale = min(SIZE[0] / height, SIZE[1] / width)
    assert batch.sizes[0] == pytest.approx((height * scale, width * scale), abs=1)
    outside = batch.images_N3HW[0].clone()
    outside[:, : batch.sizes[0][0], : batch.sizes[0][1]] = 0
    assert not outside.any()


# --- the file --------------------------------------------------------------------------------------------


def test_the_file_holds_the_student_and_says_what_it_is(saved: tuple[Path, Path]) -> None:
    weights, path = saved
    exported = load_model(path)
    assert isinstance(exported, ExportedDetector)
    model = load_model(weights)
    assert exported.classes == CLASSES
    assert exported.spec == model.spec
    assert exported.facts.size == SIZE
    assert (exported.facts.score_threshold, exported.facts.nms_threshold) == (0.05, 0.5)  # a recipe's defaults
    assert json.loads(path.with_suffix(".json").read_text()) == json.loads(exported.facts.model_dump_json())
    parameters = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert 0.9 * parameters < path.stat().st_size < parameters + 300_000
    assert b".py" not in path.read_bytes(), "the exporter's stack traces name files of this machine"


def test_the_check_sees_another_model(saved: tuple[Path, Path], folder: Path) -> None:
    weights, path = saved
    other = load_model(weights)
    nn.init.normal_(other.head.box.weight, std=0.3)
    images = [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in sorted(folder.iterdir())]
    agreement = compare(other, load_onnx(path), images)
    assert agreement.equal < 0.5


def test_a_file_that_disagrees_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad: Callable[..., Agreement] = lambda *_: Agreement(1, 10, 0.5, 0.0, 0.0)  # noqa: E731
    monkeypatch.setattr("detdistill.deployment.export.compare", bad)
    with pytest.raises(UserError, match=r"not written: only 50\.0% of what it finds"):
        export(detector(strides=[32]), tmp_path / "x.onnx", size=SIZE, check=folder)
    assert not list(tmp_path.iterdir())


def test_the_check_of_a_silent_model_says_that_it_shows_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = detector(strides=[32])
    nn.init.constant_(model.head.cls.bias, -100.0)
    save_model(model, tmp_path / "s.safetensors")
    assert main(["export", str(tmp_path / "s.safetensors"), "--size", "64", "96"]) == 0
    said = capsys.readouterr()
    assert "no detections" in said.out + said.err


# --- the verbs -------------------------------------------------------------------------------------------


def test_the_verbs(saved: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    weights, _ = saved
    out = tmp_path / "e.onnx"
    command = ["export", str(weights), "--size", "64", "96", "--out", str(out), "--check", str(folder)]
    assert main(command) == 0
    assert main(["predict", str(out), str(folder), "--out", str(tmp_path / "drawn")]) == 0
    rows = json.loads((tmp_path / "drawn" / "predictions.json").read_text())
    assert {row["category"] for row in rows} <= set(CLASSES)
    assert rows


def test_an_exported_file_can_be_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path))
    section = {"family": "fcos", "backbone": "mobilenetv3_small_050", "channels": 8, "strides": [32]}
    recipe = parse_recipe(
        {"data": {"format": "digits", "train_size": 2, "val_size": 4, "image_size": 64}, "student": section}
    )
    model = build_model(recipe.student, [str(digit) for digit in range(10)]).eval()
    nn.init.constant_(model.head.cls.bias, 0.0)
    path = export(model, tmp_path / "new" / "x.onnx", size=(64, 64)).path
    ours, theirs = (evaluate(each, recipe, workers=0, device="cpu") for each in (path, model))
    assert sum(len(found["scores"]) for found in theirs.detections) > 0
    assert math.isclose(ours.coco.AP, theirs.coco.AP, abs_tol=1e-6)


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "out", "message"),
    [
        (None, "x.onnx", r"give one height and width \(--size 320 320\)"),
        ((64, 100), "x.onnx", "size 64 100: height and width must be multiples of 32"),
        ((64, 64), "x.pt", r"give a name that ends in \.onnx, or in \.pt2"),
        ((64, 64), "file/x.onnx", r"file: cannot be made \(File exists\)"),
    ],
)
def test_wrong_arguments(size: tuple[int, int] | None, out: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        export(detector(strides=[32]), tmp_path / out, size=size)


def test_files_that_are_not_exports(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(saved[1].read_bytes()[:1000])
    with pytest.raises(UserError, match=r"broken\.onnx: cannot be read as an ONNX file"):
        load_model(broken)
    import onnx

    stranger = onnx.load(saved[1])
    del stranger.metadata_props[:]
    onnx.save(stranger, tmp_path / "stranger.onnx")
    with pytest.raises(UserError, match="does not say what model it is"):
        load_model(tmp_path / "stranger.onnx")


def test_files_of_before_there_were_tasks_are_read(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    import onnx

    old = onnx.load(saved[1])
    stored = next(entry for entry in old.metadata_props if entry.key == "detdistill")
    facts = json.loads(stored.value)
    del facts["task"], facts["needs_sizes"]
    stored.value = json.dumps(facts)
    onnx.save(old, tmp_path / "old.onnx")
    exported = load_onnx(tmp_path / "old.onnx")
    assert exported.facts == load_onnx(saved[1]).facts
    stored.value = json.dumps(facts | {"format": 2})
    onnx.save(old, tmp_path / "new.onnx")
    with pytest.raises(UserError, match=r"cannot be used \(.*\); export it again"):
        load_onnx(tmp_path / "new.onnx")


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(
        UserError, match=r'onnxscript, which is not installed: pip install "detdistill\[export\]"'
    ):
        export(detector(strides=[32]), tmp_path / "x.onnx", size=SIZE)


def test_an_exported_detector_cannot_learn(saved: tuple[Path, Path]) -> None:
    target: dict[str, Tensor] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    with pytest.raises(UserError, match="cannot learn"):
        load_onnx(saved[1]).train()([torch.rand(3, 50, 50)], [target])


def test_the_graph_keeps_the_model(saved: tuple[Path, Path]) -> None:
    """No copy, no change: what was exported detects as before."""
    model = detector(strides=[16])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    DetectionGraph(model)(torch.rand(1, 3, *SIZE) * 255)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_images_at_another_scale_than_in_pytorch_are_a_warning(folder: Path, tmp_path: Path) -> None:
    model = detector()
    model.preprocessor = replace(model.preprocessor, size=(64, 128))
    upright = tmp_path / "in"
    upright.mkdir()
    Image.new("RGB", (50, 100)).save(upright / "a.png")
    with pytest.warns(UserWarning, match=r"1 of 1 images.*factor of up to 0\.50.*--size 128 128"):
        export(model, tmp_path / "x.onnx", check=upright)
