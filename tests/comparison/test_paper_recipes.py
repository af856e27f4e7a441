"""Every row of the paper's tables: its pair is built at reduced size, with its own method, and takes a step."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from detdistill.distillation.pair import Pair
from detdistill.models import build_model
from detdistill.recipe import load_recipe, model_config

ROWS = sorted((Path(__file__).parents[2] / "recipes" / "paper").glob("table*/*.yaml"))
TEACHERS = {  # the checkpoints of the paper's teachers, by the names that the recipes give them
    "fcos-r101": "fcos",
    "faster-r101": "faster_rcnn",
    "voc-faster-r101": "faster_rcnn",
    "retinanet-r101": "retinanet",
    "retinanet-x101": "retinanet",
    "cascade-mask-x101": "cascade_mask_rcnn",
    "reppoints-x101": "reppoints",
    "gfl-r101": "gfl",
    "deeplabv3-r101": "deeplabv3",
}
CLASSES = ("a", "b", "c")


@functools.cache
def small(family: str, channels: int) -> torch.nn.Module:
    torch.manual_seed(channels)
    return build_model(
        model_config(family=family, backbone="mobilenetv3_small_050", channels=channels), CLASSES
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", ROWS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_row_takes_a_step(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.teacher is not None
    teacher = small(TEACHERS[Path(str(recipe.teacher.weights)).stem], 24)
    student = small(recipe.student.family, 16).train()
    pair = Pair(student, teacher, recipe.methods).train()
    torch.manual_seed(0)
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[4.0, 6.0, 50.0, 40.0]]), "labels": torch.tensor([1])} for _ in images]
    if student.task == "segmentation":
        targets = [{"semantic": torch.randint(0, 3, (64, 64), dtype=torch.uint8)} for _ in images]
    losses = pair(images, targets)
    for method in recipe.methods:
        assert losses[method.name].isfinite()
        assert losses[method.name] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    student.zero_grad()


def test_every_head_says_the_published_number() -> None:
    assert len(ROWS) == 55
    for path in ROWS:
        head = path.read_text(encoding="utf-8").partition("\n")[0]
        assert f"Table {path.parent.name.removeprefix('table')}" in head, path
        assert "Published: " in head, path
