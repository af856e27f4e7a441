"""The recipes of real photographs, a few steps each: they parse, check, train, distil, evaluate and predict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detdistill.commands.check import check
from detdistill.commands.predict import predict
from detdistill.data.loading import open_data
from detdistill.recipe import load_recipe
from detdistill.training.train import train

ROOT = Path(__file__).parents[2]
SHORT = ["training.max_steps=3", "training.batch_size=4", "training.workers=0", "training.evaluate_every=0"]

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture
def _real_data(shared_data, monkeypatch):
    monkeypatch.setenv("DETDISTILL_DATA", str(shared_data))
    monkeypatch.setenv("DETDISTILL_BACKBONE", str(shared_data / "weights" / "mobilenetv2_100.timm.safetensors"))


@pytest.fixture
def few_images(_real_data, tmp_path):
    """Overrides that make a recipe train and evaluate on the first images of its sets alone."""

    def overrides(recipe, images=12):
        data = load_recipe(recipe).data
        changes = []
        for part, split in open_data(data).items():
            annotations = json.loads(split.source.read_text())
            annotations["images"] = annotations["images"][:images]
            kept = {image["id"] for image in annotations["images"]}
            annotations["annotations"] = [row for row in annotations["annotations"] if row["image_id"] in kept]
            for image in annotations["images"]:
                path = next(r.path for r in split.records if r.image_id == image["id"])
                image["file_name"] = str(path.relative_to(data.root))
            (tmp_path / f"{part}.json").write_text(json.dumps(annotations))
            changes.append(f"data.{part}={tmp_path / part}.json")
        return [*changes, f"data.images={data.root}"]

    return overrides


@pytest.mark.parametrize("name", ["deeppcb", "coco-mini"])
def test_teacher_to_student_on_real_photographs(name, few_images, tmp_path):
    recipes = ROOT / "recipes" / name
    short = [*SHORT, *few_images(recipes / "teacher.yaml")]
    teacher = train(recipes / "teacher.yaml", short, out=tmp_path / "teacher")
    for method in ("ima", "mimic"):
        overrides = [*short, f"teacher={teacher.student}"]
        result = train(recipes / f"{method}.yaml", overrides, out=tmp_path / method)
        assert result.status == "finished"
        rows = [json.loads(line) for line in (tmp_path / method / "metrics.jsonl").read_text().splitlines()]
        assert all(row["loss/" + method] > 0 for row in rows if "loss" in row)
    split = load_recipe(recipes / "teacher.yaml").data
    image = next(path for path in sorted(Path(split.root).rglob("*.jpg")))
    (prediction,) = predict(result.student, image, out=tmp_path / "seen", teacher=teacher.student)
    assert prediction is not None
    assert list((tmp_path / "seen").glob("*.png")) or list((tmp_path / "seen").glob("*.jpg"))


def test_masks_of_real_nuclei(few_images, tmp_path):
    recipe = ROOT / "recipes/nuclei/teacher.yaml"
    result = train(recipe, [*SHORT, *few_images(recipe)], out=tmp_path / "run")
    assert result.metrics["mask_AP"] >= 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["loss/loss_mask"] > 0 for row in rows if "loss" in row)
    image = sorted(Path(load_recipe(recipe).data.root).rglob("*.jpg"))[0]
    (found,) = predict(result.student, image, threshold=0.0)
    assert found.masks_KHW.any()


def test_a_real_loss_falls(few_images, tmp_path):
    recipe = ROOT / "recipes/deeppcb/baseline.yaml"
    budget = ["training.max_steps=60", "training.batch_size=8", "training.evaluate_every=0", "student.size=128"]
    train(recipe, [*budget, *few_images(recipe, images=100)], out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.usefixtures("_real_data")
@pytest.mark.parametrize("name", ["deeppcb/baseline", "coco-mini/baseline", "nuclei/teacher"])
def test_check_finds_nothing_to_refuse(name):
    assert check(load_recipe(ROOT / "recipes" / f"{name}.yaml")).ok
