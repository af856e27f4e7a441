"""Exported files in 8 bits: what is in them, what they find, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import detdistill
from detdistill.cli import main
from detdistill.deployment.export import PixelAgreement, export
from detdistill.deployment.quantize import Likeness, _found, _spread, quantize
from detdistill.errors import UserError
from detdistill.models.exported import load_onnx

from .test_export import SIZE, detector, pictures
from .test_export_families import detector as any_detector
from .test_export_segmenters import segmenter

pytestmark = pytest.mark.slow  # each export takes seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "in")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    return export(detector(), tmp_path_factory.mktemp("export") / "student.onnx", size=SIZE, check=folder).path


def test_the_verb(exported: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(exported), str(folder)]) == 0
    said = capsys.readouterr().out
    path = exported.with_suffix(".int8.onnx")
    assert str(path) in said
    assert "ranges of activations from 3 images" in said
    assert "found by both" in said
    onnx.checker.check_model(str(path))
    assert path.stat().st_size < 0.6 * exported.stat().st_size

    graph = onnx.load(path).graph
    made = {output: node for node in graph.node for output in node.output}
    numbers = {array.name: onnx.numpy_helper.to_array(array) for array in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 30
    for node in convolutions:
        for name in node.input[:2]:
            assert made[name].op_type == "DequantizeLinear"
        weights = numbers[made[node.input[1]].input[0]]
        assert weights.dtype == np.int8
        assert len(numbers[made[node.input[1]].input[1]]) == len(weights)  # a scale for each output channel

    # The file is a detector like any other, and says the same of itself.
    assert load_onnx(path).facts == load_onnx(exported).facts
    beside = json.loads(path.with_suffix(".json").read_text())
    assert beside == load_onnx(exported).facts.model_dump(mode="json")
    assert len(detdistill.predict(path, folder, device="cpu")) == 3
    numbers_file = tmp_path / "costs.json"
    assert main(["benchmark", str(exported), str(path), "--runs", "1", "--json", str(numbers_file)]) == 0
    assert "–" in capsys.readouterr().out
    assert json.loads(numbers_file.read_text())[str(path)]["macs"] is None


@pytest.mark.parametrize("family", ["faster_rcnn", "mask_rcnn"])
def test_a_two_stage_detector(family: str, folder: Path, tmp_path: Path) -> None:
    model = any_detector(family, score_threshold=0.2)
    file = export(model, tmp_path / "x.onnx", size=SIZE, check=folder).path
    done = quantize(file, folder, tmp_path / "small.onnx")
    assert isinstance(done.likeness, Likeness)
    assert done.likeness.detections > 30
    assert done.bytes < 0.5 * done.bytes_before  # the linear layers, too
    image = torch.from_numpy(np.array(Image.open(folder / "1.png"))).permute(2, 0, 1)
    (found,) = load_onnx(done.path)([image])
    assert ("masks" in found) == (family == "mask_rcnn")


def test_a_segmenter(folder: Path, tmp_path: Path) -> None:
    file = export(segmenter(), tmp_path / "x.onnx", size=SIZE, check=folder).path
    done = quantize(file, folder)
    assert isinstance(done.likeness, PixelAgreement)
    assert done.likeness.classes == 3
    assert 0.8 < done.likeness.equal < 1


def test_the_ranges_are_those_of_the_images(exported: Path, tmp_path: Path) -> None:
    """The first convolution's input is 255 levels over what the images hold, and no more."""
    scales = {}
    for name, gray in (("dark", 50), ("bright", 255)):
        (tmp_path / name).mkdir()
        pixels = np.full((SIZE[0], SIZE[1], 3), gray, np.uint8)
        pixels[:8] = 0
        Image.fromarray(pixels).save(tmp_path / name / "x.png")
        path = quantize(exported, tmp_path / name, tmp_path / f"{name}.onnx").path
        graph = onnx.load(path).graph
        numbers = {array.name: onnx.numpy_helper.to_array(array) for array in graph.initializer}
        first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
        scales[name] = float(numbers[first.input[1]])
    # Normalized pixels go from -mean / std (0) to (gray / 255 - mean) / std, the widest channel deciding.
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for name, gray in (("dark", 50), ("bright", 255)):
        high = max(0, ((gray / 255 - mean) / std).max())
        assert scales[name] == pytest.approx((high - (-mean / std).min()) / 255, rel=1e-3)


def test_what_is_alike() -> None:
    def found(*rows: tuple[float, float, int, float]) -> dict[str, torch.Tensor]:
        boxes = torch.tensor([[x, 0.0, x + w, 10.0] for x, w, _, _ in rows]).reshape(-1, 4)
        return {
            "boxes": boxes,
            "labels": torch.tensor([row[2] for row in rows]).long(),
            "scores": torch.tensor([row[3] for row in rows]),
        }

    ours = found((0, 10, 0, 0.9), (20, 10, 1, 0.5), (40, 10, 0, 0.31), (60, 10, 0, 0.2))
    # A box moved by a third (IoU 1/2), one of another label, one moved by more, and one that nobody asks for.
    theirs = found((10 / 3, 10, 0, 0.05), (20, 10, 0, 0.9), (44, 10, 0, 0.9), (60, 10, 0, 0.9))
    assert _found(ours, theirs).tolist() == [True, False, False]
    assert _found(theirs, ours).tolist() == [False, False, True]
    assert _found(found(), ours).tolist() == []
    assert _found(ours, found()).tolist() == [False] * 3
    assert "nothing is shown" in str(Likeness(3, 0, float("nan")))


def test_images_are_chosen_evenly() -> None:
    paths = [Path(str(i)) for i in range(10)]
    assert [path.name for path in _spread(paths, 4)] == ["0", "2", "5", "7"]
    assert _spread(paths, 20) == paths


def test_mistakes(exported: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = quantize(exported, folder, tmp_path / "small.onnx")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    for arguments, said in (
        ((done.path, folder), "8-bit already"),
        ((exported, tmp_path / "empty"), "no images"),
        ((exported, tmp_path / "gone"), "no such image or folder"),
        ((tmp_path / "gone.onnx", folder), "no such file"),
        (("/", folder), "no such file"),
        ((exported, folder, exported), "a name of its own"),
        ((exported, folder, tmp_path / "x.pt2"), "ends in .onnx"),
        ((exported, folder, done.path / "x.onnx"), r"small.onnx: cannot be made \(File exists\)"),
    ):
        with pytest.raises(UserError, match=said) as error:
            quantize(*arguments)
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before
