"""Segmenters as graphs: label maps at the input's size, and by the verbs at the images'."""

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
from detdistill.deployment.export import PixelAgreement, compare, export
from detdistill.errors import UserError
from detdistill.models import build_model, load_model, save_model
from detdistill.models.base import Preprocess
from detdistill.models.exported import ExportedSegmenter, load_onnx
from detdistill.recipe import parse_recipe

from .test_export import pictures

pytestmark = pytest.mark.slow  # each export takes seconds

SIZE = (64, 96)
CLASSES = ("road", "sky", "tree")


def segmenter(family: str = "pspnet", **options: object) -> torch.nn.Module:
    """Untrained; its classifier is drawn until every class is somewhere."""
    torch.manual_seed(0)
    section = {"family": family, "backbone": "mobilenetv3_small_050", "channels": 16, **options}
    model = build_model(parse_recipe({"data": "digits", "student": section}).student, CLASSES).eval()
    torch.nn.init.normal_(model.head.cls.weight, std=1.0)
    with torch.no_grad():
        images = torch.rand(2, 3, 32, 48).repeat_interleave(4, 2).repeat_interleave(4, 3)
        batch = model.preprocess(list(images))
        means_Q = model.forward_head(model.forward_features(batch), batch).logits_NQHW.mean(dim=(0, 2, 3))
        model.head.cls.bias -= means_Q
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "in")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, Path]:
    weights = tmp_path_factory.mktemp("export") / "student.safetensors"
    save_model(segmenter(), weights)
    return weights, export(weights, size=SIZE, check=folder).path


@pytest.mark.parametrize(
    ("family", "convention"),
    [("pspnet", Preprocess(divisor=8)), ("deeplabv3", Preprocess(divisor=8, bgr=True, fill=0.3))],
)
def test_pixels_are_pytorchs(family: str, convention: Preprocess, folder: Path, tmp_path: Path) -> None:
    model = segmenter(family)
    model.preprocessor = convention
    done = export(model, tmp_path / "x.onnx", size=SIZE, check=folder)
    assert isinstance(done.agreement, PixelAgreement)
    assert done.agreement.equal > 0.999
    assert done.agreement.classes > 1
    onnx.checker.check_model(str(done.path))


def test_an_image_of_the_inputs_size_has_pytorchs_label_map(saved: tuple[Path, Path]) -> None:
    weights, path = saved
    exported, model = load_model(path), load_model(weights).eval()
    assert isinstance(exported, ExportedSegmenter)
    image = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    with torch.no_grad():
        ours, theirs = exported([image])[0]["semantic"], model([image])[0]["semantic"]
    assert ours.dtype == theirs.dtype
    assert (ours == theirs).float().mean() > 0.999
    assert len(theirs.unique()) > 1


def test_maps_are_as_large_as_their_images(saved: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    _, path = saved
    command = ["predict", str(path), str(folder), "--out", str(tmp_path / "drawn")]
    assert main(command) == 0
    for one in detdistill.predict(path, folder, device="cpu"):
        with Image.open(one.path) as image:
            assert tuple(one.semantic_HW.shape) == (image.height, image.width)


def test_the_file_says_what_it_is(saved: tuple[Path, Path]) -> None:
    weights, path = saved
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["task"] == "segmentation"
    assert facts["classes"] == list(CLASSES)
    assert "nms_threshold" not in facts
    assert load_onnx(path).spec == load_model(weights).spec
    outputs = onnx.load(path).graph.output
    assert [(output.name, output.type.tensor_type.elem_type) for output in outputs] == [
        ("labels", onnx.TensorProto.UINT8)
    ]


def test_it_is_measured_as_the_model_is(saved: tuple[Path, Path], tmp_path: Path) -> None:
    weights, path = saved
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind / "val").mkdir(parents=True)
    for i in range(3):
        labels_HW = rng.integers(0, 3, (8, 12), np.uint8).repeat(8, 0).repeat(8, 1)
        image = rng.integers(0, 255, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(image).save(tmp_path / "images" / "val" / f"{i}.png")
        Image.fromarray(labels_HW).save(tmp_path / "labels" / "val" / f"{i}.png")
    (tmp_path / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    ours, theirs = (detdistill.evaluate(each, tmp_path, workers=0).numbers() for each in (path, weights))
    assert ours["mIoU"] == pytest.approx(theirs["mIoU"], abs=2e-3)
    assert theirs["mIoU"] > 0.1


def test_any_number_of_images(folder: Path, tmp_path: Path) -> None:
    done = export(segmenter(), tmp_path / "x.onnx", size=SIZE, dynamic_batch=True, check=folder)
    exported = load_onnx(done.path)
    assert exported.any_batch
    maps = exported([torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8) for _ in range(3)])
    assert [tuple(one["semantic"].shape) for one in maps] == [(60, 90)] * 3


def test_a_program_of_torch_export(folder: Path, tmp_path: Path) -> None:
    done = export(segmenter(), tmp_path / "x.pt2", size=SIZE, check=folder)
    assert done.agreement.equal > 0.999


def test_the_check_sees_another_model(saved: tuple[Path, Path], folder: Path) -> None:
    other = segmenter("deeplabv3")
    images = [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in sorted(folder.iterdir())]
    assert compare(other, load_onnx(saved[1]), images).equal < 0.9


def test_it_cannot_learn(saved: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="an exported model cannot learn"):
        load_onnx(saved[1]).train()(
            [torch.rand(3, 50, 50)], [{"semantic": torch.zeros(50, 50, dtype=torch.uint8)}]
        )
