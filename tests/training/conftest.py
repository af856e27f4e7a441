from __future__ import annotations

import pytest
import torch

from detdistill.models import build_model
from detdistill.models.checkpoints.io import save_model
from detdistill.recipe import parse_recipe

DATA = {"format": "digits", "train_size": 24, "val_size": 6, "image_size": 64}
STUDENT = {
    "family": "retinanet", "backbone": "mobilenetv3_small_050", "channels": 16, "head_depth": 1,
    "strides": [8, 16, 32], "norm": "frozen",
}  # fmt: skip
TRAINING = {
    "max_steps": 7, "epochs": 100, "batch_size": 8, "workers": 0, "evaluate_every": 0, "ema": 0.9,
    "optimizer": {"lr": 0.01}, "schedule": {"name": "cosine", "warmup": 0}, "device": "cpu", "pictures": False,
    "augment": {"photometric": True, "multi_scale": [0.8, 1.2]},
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _digits_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def make_recipe():
    """A small recipe; keyword arguments are laid over its sections."""

    def make(student=(), training=(), **sections):
        return parse_recipe({
            "data": DATA, "student": {**STUDENT, **dict(student)},
            "training": {**TRAINING, **dict(training)}, **sections,
        })  # fmt: skip

    return make


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """An untrained teacher of another width, saved as a student file would be."""
    torch.manual_seed(0)
    config = parse_recipe({"data": DATA, "student": {**STUDENT, "channels": 24}}).student
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_model(build_model(config, [str(digit) for digit in range(10)]), path)
    return path
