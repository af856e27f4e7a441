"""A detector with masks from its recipe to its pictures; data and recipes that do not go with it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detdistill
from detdistill.commands.check import check
from detdistill.commands.predict import predict
from detdistill.data.masks import decode_mask
from detdistill.errors import UserError
from detdistill.recipe import parse_recipe
from detdistill.report import models as report_models
from detdistill.report.pictures import draw_pairs

DATA = {"format": "digits", "train_size": 12, "val_size": 4, "image_size": 64}
STUDENT = {
    "family": "mask_rcnn", "backbone": "mobilenetv3_small_050", "channels": 16, "strides": [8, 16],
    "anchor_scale": 2, "score_threshold": 0.0, "max_detections": 20,
}  # fmt: skip
BUDGET = {"max_steps": 2, "batch_size": 4, "workers": 0, "evaluate_every": 0, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETDISTILL_CACHE", str(tmp_path_factory.mktemp("digits")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = parse_recipe({
        "data": DATA, "student": STUDENT, "training": {**BUDGET, "augment": {"crop": 0.5, "zoom_out": 0.5}},
    })  # fmt: skip
    return detdistill.train(recipe, out=tmp_path_factory.mktemp("runs") / "mask")


def test_a_run_has_numbers_of_boxes_and_of_masks(run):
    boxes = [name for name in run.metrics if name.startswith(("AP", "AR"))]
    assert len(boxes) == 12
    assert all(f"mask_{name}" in run.metrics for name in boxes)
    rows = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("loss/loss_mask", 0) > 0 for row in rows)
    assert any("mask_AP" in row for row in rows)
    assert (run.run / "samples.png").stat().st_size > 0


def test_a_saved_detector_is_measured_with_its_masks_again(run):
    recipe = detdistill.load_recipe(run.run / "recipe.yaml")
    evaluation = detdistill.evaluate(run.run, recipe, workers=0, device="cpu")
    for name, value in evaluation.numbers().items():
        assert value == pytest.approx(run.metrics[name], abs=1e-6, nan_ok=True)
    assert not math.isnan(evaluation.numbers()["mask_AP"])
    for found, masks in zip(evaluation.detections, evaluation.masks, strict=True):
        assert len(masks) == len(found["boxes"]) == 20
        assert set(found) == {"boxes", "labels", "scores"}


def test_the_report_draws_masks(run, tmp_path, monkeypatch):
    drawn = []

    def draw(images, classes, **options):
        drawn.extend(images)
        return draw_pairs(drawn, classes, **options)

    monkeypatch.setattr(report_models, "draw_pairs", draw)
    detdistill.write_report(run.run, out=tmp_path / "report.html", threshold=0.0, workers=0, device="cpu")
    assert len(drawn) == DATA["val_size"]
    for image, truth, found in drawn:
        assert truth["masks"].shape == (len(truth["boxes"]), *image.shape[1:])
        assert len(found["masks"]) == len(found["boxes"]) == 20


def test_predictions_carry_their_masks(run, tmp_path):
    path = tmp_path / "images" / "7.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(path)
    (found,) = predict(run.run, path, out=tmp_path / "out", threshold=0.0, device="cpu")
    assert found.masks_KHW.dtype == torch.bool
    assert found.masks_KHW.shape == (len(found.boxes_K4), 50, 70)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(rows) == len(found.boxes_K4)
    for row, mask in zip(rows, found.masks_KHW.numpy(), strict=True):
        assert (decode_mask(row["segmentation"], 50, 70) == mask).all()


def test_resumed_from_its_file_the_family_is_still_one_with_masks(run, tmp_path):
    """The section's own family is the default one: what matters is the file's."""
    recipe = parse_recipe({"data": DATA, "student": {"weights": str(run.student)}, "training": BUDGET})
    assert "mask_AP" in detdistill.train(recipe, out=tmp_path).metrics


# --- boxes alone -----------------------------------------------------------------------------------------


def boxes_alone(kind: str, folder: Path) -> Path:
    for part in ("train", "val"):
        (folder / "images" / part).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(folder / "images" / part / f"{part}.png")
    if kind == "coco":
        for part in ("train", "val"):
            truth = {
                "images": [{"id": 1, "file_name": f"{part}.png", "width": 64, "height": 64}],
                "categories": [{"id": 1, "name": "nut"}],
                "annotations": [
                    {
                        "id": 1,
                        "image_id": 1,
                        "category_id": 1,
                        "bbox": [5, 5, 20, 20],
                        "area": 400,
                        "iscrowd": 0,
                    }
                ],
            }
            (folder / f"{part}.json").write_text(json.dumps(truth))
    elif kind == "yolo":
        for part in ("train", "val"):
            (folder / "labels" / part).mkdir(parents=True)
            (folder / "labels" / part / f"{part}.txt").write_text("0 0.5 0.5 0.3 0.3\n")
        (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [nut]\n")
    else:
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (folder / name).mkdir(parents=True)
        for part in ("train", "val"):
            Image.new("RGB", (64, 64)).save(folder / "JPEGImages" / f"{part}.jpg")
            (folder / "ImageSets" / "Main" / f"{part}.txt").write_text(f"{part}\n")
            (folder / "Annotations" / f"{part}.xml").write_text(
                f"<annotation><filename>{part}.jpg</filename><size><width>64</width><height>64</height>"
                "<depth>3</depth></size><object><name>nut</name><bndbox><xmin>5</xmin><ymin>5</ymin>"
                "<xmax>25</xmax><ymax>25</ymax></bndbox></object></annotation>"
            )
    return folder


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_boxes_alone_are_refused_before_training(kind, tmp_path):
    data = {"root": str(boxes_alone(kind, tmp_path / "data")), "format": kind}
    recipe = parse_recipe({"data": data, "student": STUDENT, "training": BUDGET})
    wanted = r"has boxes only, and mask_rcnn learns from masks: use faster_rcnn"
    with pytest.raises(UserError, match=wanted):
        detdistill.train(recipe, out=tmp_path / "run")
    (problem,) = check(recipe).problems
    assert problem.endswith("use faster_rcnn")
    alone = parse_recipe({"data": data, "student": {**STUDENT, "family": "faster_rcnn"}, "training": BUDGET})
    assert check(alone).problems == []


def test_a_detector_with_masks_is_measured_by_its_boxes_where_there_is_nothing_else(run, tmp_path):
    root = boxes_alone("coco", tmp_path / "data")
    for file in root.glob("*.json"):
        file.write_text(file.read_text().replace('"nut"', '"3"'))
    evaluation = detdistill.evaluate(run.run, root, workers=0, device="cpu")
    assert evaluation.coco_masks is None
    assert "mask_AP" not in evaluation.numbers()
