"""The costs of teacher and student from the command line."""

from __future__ import annotations

import json

import pytest
import torch

from detdistill.cli import main
from detdistill.commands.benchmark import benchmark
from detdistill.errors import UserError
from detdistill.models import build_model, save_model
from detdistill.recipe import model_config

RECIPE = """
data: {format: digits}
student: {family: fcos, backbone: mobilenetv3_small_050, channels: 16, head_depth: 1, strides: [8, 16]}
teacher: TEACHER
methods: [ima]
"""


def test_teacher_and_student_of_a_recipe(tmp_path, capsys):
    torch.manual_seed(0)
    config = model_config(family="fcos", backbone="resnet18", channels=32, strides=(8, 16), size=64)
    teacher = build_model(config, ("a", "b"))
    save_model(teacher, tmp_path / "teacher.safetensors")
    recipe = tmp_path / "pair.yaml"
    recipe.write_text(RECIPE.replace("TEACHER", str(tmp_path / "teacher.safetensors")))
    out = tmp_path / "costs.json"
    assert main(["benchmark", str(recipe), "--runs", "2", "--device", "cpu", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "pair teacher" in printed
    assert "64 × 64 pixels" in printed
    costs = json.loads(out.read_text())
    assert costs["pair teacher"]["parameters"] == sum(p.numel() for p in teacher.parameters())
    assert costs["pair student"]["macs"] < costs["pair teacher"]["macs"]


def test_a_recipes_models_are_what_it_makes_of_their_files(tmp_path):
    """A student that starts from a file has its architecture; a teacher has the size that the recipe gives."""
    torch.manual_seed(0)
    config = model_config(family="fcos", backbone="resnet18", channels=32, strides=(8, 16), size=64)
    start, file = build_model(config, ("a", "b")), str(tmp_path / "start.safetensors")
    save_model(start, file)
    recipe = tmp_path / "pair.yaml"
    recipe.write_text(
        f"data: {{format: digits, classes: [a, b]}}\nstudent: {{weights: {file}}}\n"
        f"teacher: {{weights: {file}, size: 128}}\nmethods: [ima]\n"
    )
    costs = benchmark([recipe], runs=1, warmup=0, device="cpu")
    assert costs["pair student"].parameters == sum(p.numel() for p in start.parameters())
    assert costs["pair student"].size == (128, 128)


def test_nothing_and_the_same_twice(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        benchmark([])
    model = build_model(model_config(family="fcos", backbone="mobilenetv3_small_050", channels=16), ("a",))
    with pytest.raises(UserError, match="twice"):
        benchmark([model, model], size=(64, 64), runs=1)
