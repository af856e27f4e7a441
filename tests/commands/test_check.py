"""The doctor: what it tells of recipes that can and cannot run."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detdistill.cli.printing import print_check
from detdistill.commands import check as checking
from detdistill.models import RetinaNet, build_model, save_model
from detdistill.recipe import Recipe, parse_recipe

check = partial(checking.check, step=False)
STUDENT = {"backbone": "resnet10t", "channels": 8, "head_depth": 1, "strides": [16, 32]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A COCO set of one class and one image in each part."""
    for name in ("train", "val"):
        image = f"{name}.png"
        Image.new("RGB", (64, 48), "gray").save(tmp_path / image)
        content = {
            "images": [{"id": 1, "file_name": image, "width": 64, "height": 48}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [4, 4, 20, 20], "area": 400}],
            "categories": [{"id": 3, "name": "part"}],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def recipe(folder: Path, **sections: Any) -> Recipe:
    return parse_recipe({"data": str(folder), "student": STUDENT, **sections})


def save_teacher(path: Path, **section: Any) -> Path:
    config = parse_recipe({"data": "digits", "student": {**STUDENT, **section}}).student
    save_model(build_model(config, ["part"]), path)
    return path


def test_a_plain_student(folder: Path) -> None:
    result = check(recipe(folder))
    assert result.ok
    assert result.matching is None
    (student,) = result.models
    assert student.levels == {16: 8, 32: 8}
    model = build_model(recipe(folder).student, ["part"])
    assert student.parameters == sum(p.numel() for p in model.parameters())


def test_a_pair_learns_only_in_the_student(folder: Path, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors", channels=16)
    result = check(recipe(folder, teacher=str(teacher), methods=["ima"]))
    assert result.ok
    assert [(model.role, model.learning > 0) for model in result.models] == [
        ("student", True),
        ("teacher", False),
    ]
    assert result.matching is not None
    assert [level.teacher_channels for level in result.matching.levels] == [16, 16]
    assert any(str(teacher) in note for note in result.notes)


def test_inputs_and_classes_that_differ_are_told(folder: Path, tmp_path: Path, capsys: Any) -> None:
    section = {**STUDENT, "family": "fcos", "size": [128, 128], "strides": [16, 32, 64]}
    model = build_model(parse_recipe({"data": "digits", "student": section}).student, ["screw", "part"])
    save_model(model, tmp_path / "teacher.safetensors")
    student = {**STUDENT, "size": [64, 64]}
    teacher = str(tmp_path / "teacher.safetensors")
    result = check(recipe(folder, student=student, teacher=teacher, methods=["ima"]))
    assert result.ok
    print_check(result)
    printed = capsys.readouterr().out
    assert "short × long side 128 × 128" in printed
    assert "stride 32 (16 of the student's pixels)" in printed
    assert "known to the teacher alone, not used: screw" in printed
    refused = check(recipe(folder, student=student, teacher=teacher, methods=["kd"]))
    assert not refused.ok
    assert refused.matching == result.matching  # what meets is told all the same


def test_classes_that_the_teacher_does_not_know_are_told(folder: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        content = json.loads((folder / f"{name}.json").read_text())
        content["categories"].append({"id": 4, "name": "bolt"})
        (folder / f"{name}.json").write_text(json.dumps(content))
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    result = check(recipe(folder, teacher=str(teacher), methods=["kd"]))
    assert result.classes is not None
    assert result.classes.missing == ("bolt",)
    assert any("does not know bolt" in note for note in result.notes)


def test_what_would_be_inherited_is_told(folder: Path, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors", backbone="resnet18")
    result = check(recipe(folder, teacher=str(teacher), inherit=True))
    assert result.ok
    (told,) = (note for note in result.notes if note.startswith("inherited"))
    model = build_model(recipe(folder).student, ["part"])
    count = sum(not name.startswith("backbone.") for name in model.state_dict())
    assert f" {count} of {count} tensors of neck and head" in told
    plain = check(recipe(folder, teacher=str(teacher), methods=["ima"]))
    assert not any(note.startswith("inherited") for note in plain.notes)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"student": {**STUDENT, "backbone": "resnet_18"}}, "student: timm knows no backbone 'resnet_18'"),
        ({"teacher": "nowhere", "methods": ["ima"]}, "teacher: nowhere: no such weights file or run folder"),
        ({"data": "nowhere"}, "nowhere"),
        ({"teacher": "TEACHER", "inherit": True, "student": {**STUDENT, "channels": 16}}, "16 and 16 channels"),
    ],
)
def test_what_would_stop_the_run(folder: Path, tmp_path: Path, sections: Any, said: str) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    if sections.get("teacher") == "TEACHER":
        sections = {**sections, "teacher": str(teacher)}
    result = check(recipe(folder, **sections))
    assert not result.ok
    assert len(result.problems) == 1
    assert said in result.problems[0]


def test_several_problems_are_told_at_once(folder: Path) -> None:
    sections = {"student": {**STUDENT, "backbone": "no"}, "teacher": "nowhere", "methods": ["ima"]}
    assert [problem.split(":")[0] for problem in check(recipe(folder, **sections)).problems] == [
        "student",
        "teacher",
    ]


def test_a_missing_part_stops_the_run(folder: Path) -> None:
    (folder / "val.json").unlink()
    result = check(recipe(folder))
    assert not result.ok
    assert "no val split" in result.problems[0]


def test_a_broken_image_stops_the_run(folder: Path) -> None:
    (folder / "train.png").write_bytes((folder / "train.png").read_bytes()[:60])
    result = check(recipe(folder))
    assert not result.ok
    assert result.inspection is not None
    assert "train.png" in str(result.inspection.errors[0])


def test_a_recipe_file_with_overrides(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"data": str(folder), "student": STUDENT}))
    assert check(path, ["student.channels=4"]).models[0].levels == {16: 4, 32: 4}


def test_images_without_labels_are_counted_and_methods_that_cannot_use_them_refused(
    folder: Path, tmp_path: Path
) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors", channels=16)
    data = {"root": str(folder), "unlabeled": "train.json"}
    bf16 = {"precision": "bf16", "channels_last": True}
    result = checking.check(
        recipe(folder, data=data, teacher=str(teacher), methods=["ima", "fgd"], training=bf16)
    )
    assert result.ok
    assert result.step is not None
    assert result.inspection is not None
    assert "unlabeled: 1 images" in result.inspection.lines()
    assert "images without labels: ima teaches from them" in result.notes
    refused = check(recipe(folder, data=data, teacher=str(teacher), methods=["fgd"]))
    assert not refused.ok
    assert ["needs labels" in problem for problem in refused.problems] == [True]
    lost = check(recipe(folder, data={**data, "unlabeled": "nowhere"}))
    assert ["no such folder or file 'nowhere'" in problem for problem in lost.problems] == [True]


# --- the training step -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "images"), [(1, 1), (2, 2), (16, 2)])
def test_a_training_step_is_tried_and_leaves_no_trace(
    folder: Path, tmp_path: Path, capsys: Any, batch_size: int, images: int
) -> None:
    teacher = save_teacher(tmp_path / "teacher.safetensors", channels=16)
    states = torch.random.get_rng_state(), random.getstate()
    files = set(tmp_path.rglob("*"))
    pair = recipe(folder, teacher=str(teacher), methods=["ima"], training={"batch_size": batch_size})
    result = checking.check(pair)
    assert result.ok
    assert result.step is not None
    assert result.step.images == images
    assert result.step.losses.keys() == {"classification", "bbox_regression", "ima"}
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert set(tmp_path.rglob("*")) == files
    print_check(result)
    shown = capsys.readouterr().out
    assert f"training step: {images} image" in shown
    assert shown.count("training step") == 1


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (lambda *_: {}, "the student's loss has no gradient: what losses() gave is empty"),
        (lambda *_: {"a": torch.ones(())}, "loss has no gradient: what losses() gave was detached (a)"),
        (lambda *_: {"a": torch.tensor(torch.nan, requires_grad=True)}, "loss term a is not finite"),
        (lambda *_: {}["a\nb"], "KeyError: 'a"),
    ],
)
def test_what_fails_in_the_training_step_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, losses: Any, said: str
) -> None:
    monkeypatch.setattr(RetinaNet, "losses", losses)
    (problem,) = checking.check(recipe(folder)).problems
    assert problem.startswith("training step: ")
    assert said in problem
    assert "\n" not in problem
    assert check(recipe(folder)).ok


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"workers": 500}, "training.workers is 500 and this machine has"),
        ({"batch_size": 2}, "training.batch_size is 2 for 1 training image:"),
        ({"augment": {"multi_scale": [5, 6]}}, "up to 6 times as large: it takes factors"),
    ],
)
def test_settings_that_are_hardly_meant_are_warned_of(folder: Path, training: Any, said: str) -> None:
    plain = check(recipe(folder, training={"batch_size": 1}))
    assert not any(said in note for note in plain.notes)
    result = check(recipe(folder, training={"batch_size": 1, **training}))
    assert result.ok
    assert any(said in note and note.startswith("warning: ") for note in result.notes)


def test_no_training_step_is_tried_where_something_else_is_wrong(folder: Path, tmp_path: Path) -> None:
    result = checking.check(recipe(folder, teacher="nowhere", methods=["ima"]))
    assert result.step is None
    assert len(result.problems) == 1
    assert any("no training step was tried" in note for note in result.notes)
    (folder / "train.png").write_bytes(b"")
    assert checking.check(recipe(folder)).problems == []  # what is wrong is among the data's findings
