from __future__ import annotations

import pytest

import detdistill
from detdistill.commands.demo import demo
from detdistill.errors import UserError

SMALL = {
    "family": "fcos",
    "backbone": "mobilenetv3_small_050",
    "channels": 16,
    "head_depth": 1,
    "strides": [8, 16],
}
DATA = {"format": "digits", "train_size": 16, "val_size": 4, "image_size": 64}
BUDGET = {"max_steps": 2, "batch_size": 4, "workers": 0, "evaluate_every": 0, "device": "cpu"}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "digits"))


def test_distil_from_python(tmp_path):
    recipe = detdistill.Recipe.model_validate({"data": DATA, "student": SMALL, "training": BUDGET})
    teacher = detdistill.train(recipe, out=tmp_path / "teacher")
    result = detdistill.distill(
        teacher.run, {**SMALL, "channels": 8}, DATA, "ima", training=BUDGET, out=tmp_path / "student"
    )
    assert result.status == "finished"
    student = detdistill.load_model(result.student)
    assert student.pyramid_channels == {8: 8, 16: 8}
    evaluation = detdistill.evaluate(student, recipe, batch_size=2, workers=0)
    assert evaluation.coco.as_dict()["AP"] == pytest.approx(result.metrics["AP"], abs=1e-6)


def test_mistakes_are_told_in_the_words_of_the_arguments(tmp_path):
    with pytest.raises(UserError, match="the arguments of distill"):
        detdistill.distill("nowhere", {"famly": "fcos"}, DATA, out=tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        detdistill.distill("nowhere", SMALL, DATA, training=BUDGET, out=tmp_path)


@pytest.mark.slow
def test_the_demo_runs_to_its_pictures_and_goes_on(tmp_path):
    result = demo(tmp_path, seeds=(0, 1), fast=True)
    assert set(result.baseline) == set(result.distilled) == {0, 1}
    assert len(result.gains) == 2
    for name in ("table.md", "curves.png", "gallery.png", "comparison.json", "report.html"):
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "table.md").read_text().count("student + IMA") == 2
    before = result.teacher.student.stat().st_mtime_ns
    assert demo(tmp_path, seeds=(0, 1), fast=True).gains == result.gains
    assert result.teacher.student.stat().st_mtime_ns == before
