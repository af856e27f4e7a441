"""Two-stage detectors and DETRs as graphs: their candidates are what PyTorch's own steps find."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from detdistill.deployment.export import export
from detdistill.errors import UserError
from detdistill.evaluation.evaluate import evaluate
from detdistill.models import Detector, build_model
from detdistill.models.exported import load_onnx
from detdistill.models.graph import letterbox_of
from detdistill.models.third_party.wrap import wrap
from detdistill.recipe import parse_recipe

from .test_export import CLASSES, SIZE, pictures

pytestmark = pytest.mark.slow  # each export takes half a minute

DETRS = ("rtdetr_v2", "d_fine")


def detector(family: str, **options: object) -> Detector:
    """Untrained, but with many detections of scores, sizes and places that differ."""
    if family in DETRS:
        pytest.importorskip("transformers")
        options = {"channels": 32, "head_depth": 2, **options}
    torch.manual_seed(0)
    section = {"family": family, "backbone": "mobilenetv3_small_050", "channels": 8, **options}
    model = build_model(parse_recipe({"data": "digits", "student": section}).student, CLASSES)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and ("rpn" in name or "head" in name):
            nn.init.normal_(parameter, std=0.2 if family in DETRS else 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "in")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("faster_rcnn", {"score_threshold": 0.2}),
        ("faster_rcnn", {"convention": "mmdet", "nms_threshold": 0.3}),
        ("cascade_rcnn", {"strides": (8, 16, 32, 64)}),
        ("cascade_rcnn", {"convention": "mmdet", "strides": (8, 16)}),
        ("mask_rcnn", {"max_detections": 40}),
        ("cascade_mask_rcnn", {"convention": "mmdet", "strides": (8, 16)}),
        ("rtdetr_v2", {"score_threshold": 0.3}),
        ("d_fine", {"max_detections": 30}),
    ],
    ids=["faster", "faster-mmdet", "cascade", "cascade-mmdet", "mask", "cascade-mask", "rtdetr_v2", "d_fine"],
)
def test_every_family_detects_what_pytorch_does(
    family: str, options: dict[str, object], folder: Path, tmp_path: Path
) -> None:
    model = detector(family, **options)
    done = export(model, tmp_path / "x.onnx", size=SIZE, check=folder)
    assert done.agreement.detections > 30
    assert done.agreement.equal == 1
    assert done.agreement.box_difference < 0.01
    assert done.agreement.score_difference < 1e-4
    onnx.checker.check_model(str(done.path))
    facts = json.loads((tmp_path / "x.json").read_text())
    assert facts["needs_sizes"] == (family not in DETRS)
    masks = "mask" in family
    assert (facts["nms_threshold"] is None) == (masks or family in DETRS)
    assert facts["mask_convention"] == (options.get("convention", "torchvision") if masks else None)
    assert done.agreement.mask_overlap == (pytest.approx(1, abs=1e-3) if masks else None)


def test_proposals_end_where_the_image_does(folder: Path, tmp_path: Path) -> None:
    """With other ``sizes`` the same pixels give other boxes: what lies in the padding is not looked at."""
    model = detector("faster_rcnn", strides=(8, 16))
    exported = load_onnx(export(model, tmp_path / "x.onnx", size=SIZE, check=folder).path)
    assert exported.facts.needs_sizes
    (graph,) = exported._graph
    images_N3HW = torch.rand(1, 3, *SIZE) * 255
    whole, half = (graph(images_N3HW, torch.tensor([[64.0, width]])) for width in (96, 48))
    assert half[0][..., 2].max() <= 48 < whole[0][..., 2].max()


def test_images_of_a_batch_go_through_the_graph_one_by_one(folder: Path, tmp_path: Path) -> None:
    model = detector("faster_rcnn", strides=(8, 16))
    exported = load_onnx(export(model, tmp_path / "x.onnx", size=SIZE, check=folder).path)
    model.preprocessor = letterbox_of(model.preprocessor, SIZE)
    images = [torch.rand(3, 6, 6).repeat_interleave(10, 1).repeat_interleave(side, 2) for side in (6, 15)]
    with torch.inference_mode():
        for ours, theirs in zip(exported(images), model(images), strict=True):
            assert len(theirs["scores"]) > 5
            torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=1e-2, rtol=0)
            torch.testing.assert_close(ours["labels"], theirs["labels"])


def test_masks_are_measured_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path))
    data = {"format": "digits", "train_size": 2, "val_size": 4, "image_size": 64}
    section = {"family": "mask_rcnn", "backbone": "mobilenetv3_small_050", "channels": 8, "strides": (8, 16)}
    recipe = parse_recipe({"data": data, "student": {**section, "score_threshold": 0.0}})
    model = build_model(recipe.student, [str(digit) for digit in range(10)]).eval()
    path = export(model, tmp_path / "x.onnx", size=(64, 64)).path
    ours, theirs = (evaluate(each, recipe, workers=0, device="cpu") for each in (path, model))
    assert sum(map(len, theirs.masks)) > 0
    assert [len(masks) for masks in ours.masks] == [len(masks) for masks in theirs.masks]
    assert pytest.approx(theirs.coco_masks.AP, abs=1e-4) == ours.coco_masks.AP


def test_a_program_of_torch_export(folder: Path, tmp_path: Path) -> None:
    model = detector("faster_rcnn", strides=(8, 16))
    done = export(model, tmp_path / "x.pt2", size=SIZE, check=folder)
    assert done.agreement.equal == 1
    assert done.agreement.detections > 5


def test_what_cannot_be_exported_is_told_with_what_can(tmp_path: Path) -> None:
    for family in ("faster_rcnn", "d_fine"):
        with pytest.raises(UserError, match="one image at a time: leave out --dynamic-batch"):
            export(detector(family), tmp_path / "x.onnx", size=SIZE, dynamic_batch=True)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8))
    foreign = wrap(convolution, {8: "0"}, letterbox_of(detector("fcos").preprocessor, SIZE))
    with pytest.raises(UserError, match="a Wrapped cannot be exported: train a student of a family from here"):
        export(foreign, tmp_path / "x.onnx", size=SIZE)
    assert not list(tmp_path.iterdir())
