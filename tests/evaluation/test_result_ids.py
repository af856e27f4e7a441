"""The ids in results of `evaluate` and `predict` are those of the data: pycocotools reads both."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import detdistill
from detdistill.cli import main
from detdistill.errors import UserError
from detdistill.models import build_model, load_model, save_model
from detdistill.models.exported import parse_facts
from detdistill.recipe import parse_recipe
from detdistill.training.loop import TrainResult

# As published sets have them: with gaps, in no order, and not the same in both files.
CATEGORIES = [{"id": 90, "name": "red"}, {"id": 3, "name": "blue"}, {"id": 17, "name": "green"}]
COLORS = {90: (220, 0, 0), 3: (0, 0, 220), 17: (0, 220, 0)}
STUDENT = {
    "family": "fcos", "backbone": "mobilenetv3_small_050", "channels": 16, "head_depth": 1, "strides": [8, 16],
    "score_threshold": 0.0,
}  # fmt: skip
BUDGET = {
    "max_steps": 40, "batch_size": 4, "workers": 0, "evaluate_every": 0, "device": "cpu",
    "optimizer": {"lr": 0.02},
}  # fmt: skip


def write_squares(root: Path, part: str, count: int, first_id: int) -> Path:
    """Images of two colored squares; the stem of each image is its id."""
    generator = np.random.default_rng(first_id)
    images, annotations = [], []
    (root / "images" / part).mkdir(parents=True)
    for image_id in range(first_id, first_id + count):
        pixels = generator.integers(90, 130, (64, 96, 3), dtype=np.uint8)
        for column in (0, 48):
            category = [90, 3, 17][int(generator.integers(3))]
            x, y = column + int(generator.integers(8)), int(generator.integers(24))
            pixels[y : y + 36, x : x + 36] = COLORS[category]
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": category,
                "bbox": [x, y, 36, 36], "area": 36 * 36, "iscrowd": 0,
            })  # fmt: skip
        name = f"{image_id:012}.png"
        Image.fromarray(pixels).save(root / "images" / part / name)
        images.append({"id": image_id, "file_name": name, "width": 96, "height": 64})
    truth = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations").mkdir(exist_ok=True)
    file = root / "annotations" / f"instances_{part}.json"
    file.write_text(json.dumps(truth))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, TrainResult]:
    """The data's folder, its val file and a run on it."""
    root = tmp_path_factory.mktemp("squares")
    write_squares(root, "train", 16, 100)
    truth = write_squares(root, "val", 6, 5000)
    recipe = parse_recipe({"data": str(root), "student": STUDENT, "training": BUDGET})
    return root, truth, detdistill.train(recipe, out=tmp_path_factory.mktemp("runs") / "squares")


def pycocotools_numbers(truth: Path, results: Path) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluator = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(value) for value in evaluator.stats]


def test_results_of_evaluate_and_of_predict_measure_the_same_next_to_the_data(
    trained: tuple[Path, Path, TrainResult], tmp_path: Path
) -> None:
    root, truth, run = trained
    assert main(["evaluate", str(run.run), "--workers", "0", "--json", str(tmp_path / "n.json"),
                 "--results", str(tmp_path / "found.json"), "--device", "cpu"]) == 0  # fmt: skip
    out = tmp_path / "drawn"
    folder = root / "images" / "val"
    assert (
        main(["predict", str(run.run), str(folder), "--out", str(out), "--threshold", "0", "--device", "cpu"])
        == 0
    )
    numbers = json.loads((tmp_path / "n.json").read_text())
    measured = list(numbers.values())[:12]
    assert numbers["AP50"] > 0.1
    for results in (tmp_path / "found.json", out / "predictions.json"):
        theirs = pycocotools_numbers(truth, results)
        defined = [(ours, value) for ours, value in zip(measured, theirs, strict=True) if value >= 0]
        assert len(defined) >= 8
        for ours, value in defined:
            assert ours == pytest.approx(value, abs=1e-4)
        rows = json.loads(results.read_text())
        name_of = {category["id"]: category["name"] for category in CATEGORIES}
        assert all(row["category"] == name_of[row["category_id"]] for row in rows)
        assert not any("category_id_is" in row for row in rows)


def test_the_ids_stay_with_the_weights(trained: tuple[Path, Path, TrainResult], tmp_path: Path) -> None:
    _, _, run = trained
    model = load_model(run.run)
    assert dict(zip(model.classes, model.category_ids or (), strict=True)) == {
        "blue": 3,
        "green": 17,
        "red": 90,
    }
    save_model(model, tmp_path / "again.safetensors")
    assert load_model(tmp_path / "again.safetensors").category_ids == model.category_ids


@pytest.mark.parametrize("ids", [[1, 2], [1, 2, 2], [1, 2, "3"], [1, 2, True], {"a": 1}, 7])
def test_ids_that_are_none_are_refused(
    trained: tuple[Path, Path, TrainResult], tmp_path: Path, ids: Any
) -> None:
    _, _, run = trained
    with safe_open(run.student, framework="pt") as file:
        metadata = file.metadata()
    spec = {**json.loads(metadata["spec"]), "category_ids": ids}
    save_file(load_file(run.student), tmp_path / "x.safetensors", {**metadata, "spec": json.dumps(spec)})
    with pytest.raises(UserError, match=r"x\.safetensors: .*category_ids"):
        load_model(tmp_path / "x.safetensors")


def test_an_exported_file_keeps_the_ids(trained: tuple[Path, Path, TrainResult], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    root, _, run = trained
    assert main(["export", str(run.run), "--size", "64", "96", "--out", str(tmp_path / "s.onnx")]) == 0
    (found,) = detdistill.predict(
        tmp_path / "s.onnx", root / "images" / "val" / "000000005000.png", out=tmp_path / "drawn", threshold=0.0
    )
    rows = json.loads((tmp_path / "drawn" / "predictions.json").read_text())
    ids = {"blue": 3, "green": 17, "red": 90}
    assert [row["category_id"] for row in rows] == [ids[name] for name in found.names]
    assert len(rows) > 0


@pytest.mark.parametrize("ids", [[1, 2], [1, 2, 2], [1, 2, "3"]])
def test_ids_that_are_none_are_refused_in_an_exported_file(ids: Any) -> None:
    facts = {
        "version": "1", "classes": ["a", "b", "c"], "size": [64, 64], "keep_ratio": True, "padding": [0, 0, 0],
        "spec": None, "score_threshold": 0, "nms_threshold": 0.5, "max_detections": 100, "drop_empty": False,
    }  # fmt: skip
    file = Path("x.onnx")
    assert parse_facts(json.dumps({**facts, "category_ids": [1, 2, 3]}), file).category_ids == (1, 2, 3)
    with pytest.raises(UserError, match="category_ids"):
        parse_facts(json.dumps({**facts, "category_ids": ids}), file)


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_where_the_data_have_no_ids_the_file_says_so(kind: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        image = tmp_path / ("JPEGImages" if kind == "voc" else "images/val") / f"{name}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(image)
        if kind == "voc":
            xml = (
                "<annotation><size><width>64</width><height>48</height></size><object><name>nut</name><bndbox>"
                "<xmin>5</xmin><ymin>5</ymin><xmax>30</xmax><ymax>30</ymax></bndbox></object></annotation>"
            )
            (tmp_path / "Annotations").mkdir(exist_ok=True)
            (tmp_path / "Annotations" / f"{name}.xml").write_text(xml)
            sets = tmp_path / "ImageSets" / "Main"
            sets.mkdir(parents=True, exist_ok=True)
            (sets / "val.txt").write_text("a\nb\n")
            (sets / "train.txt").write_text("a\nb\n")
        else:
            labels = tmp_path / "labels" / "val"
            labels.mkdir(parents=True, exist_ok=True)
            (labels / f"{name}.txt").write_text("0 .5 .5 .3 .3\n")
            (tmp_path / "data.yaml").write_text("train: images/val\nval: images/val\nnames: [nut]\n")
    torch.manual_seed(0)
    student = parse_recipe({"data": str(tmp_path), "student": STUDENT}).student
    weights = tmp_path / "s.safetensors"
    save_model(build_model(student, ["nut"]), weights)
    results = tmp_path / "r.json"
    assert (
        main(["evaluate", str(weights), "--data", str(tmp_path), "--workers", "0", "--results", str(results)])
        == 0
    )
    rows = json.loads(results.read_text())
    assert {row["image_id"] for row in rows} == {"a", "b"}
    assert {(row["category_id"], row["category"], row["category_id_is"]) for row in rows} == {
        (1, "nut", "label + 1")
    }
