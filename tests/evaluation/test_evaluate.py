"""``evaluate``: the ways to name a model and a dataset, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from detdistill.errors import UserError
from detdistill.evaluation.evaluate import choose_device, evaluate, open_split
from detdistill.models import Detector, build_model, save_model
from detdistill.recipe import DataConfig, parse_recipe

DATA = {"format": "digits", "train_size": 4, "val_size": 3, "image_size": 64}
STUDENT = {"backbone": "resnet10t", "channels": 8, "head_depth": 1, "strides": [16, 32]}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def model() -> Detector:
    section = parse_recipe({"data": DATA, "student": STUDENT}).student
    return build_model(section, [str(digit) for digit in range(10)])


def test_every_way_to_name_model_and_data_gives_the_same(model: Detector, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save_model(model, run / "student.safetensors")
    text = f"data: {DATA}\nstudent: {STUDENT}\n".replace("'", "")
    (run / "recipe.yaml").write_text(text)
    recipe = parse_recipe({"data": DATA, "student": STUDENT})
    options: dict[str, Any] = {"workers": 0, "device": "cpu"}
    first = evaluate(model, recipe, **options)
    for which, data in (
        (run, run),
        (run / "student.safetensors", run / "recipe.yaml"),
        (model, DataConfig(**DATA)),
    ):
        again = evaluate(which, data, **options)
        assert str(again.coco) == str(first.coco)
        for a, b in zip(first.detections, again.detections, strict=True):
            torch.testing.assert_close(a["scores"], b["scores"])


def test_splits(model: Detector) -> None:
    config = DataConfig(**DATA)
    assert len(open_split(config, "train")) == 4
    assert len(open_split(config, "val")) == 3
    with pytest.raises(UserError, match="no split 'vla'; did you mean 'val'"):
        open_split(config, "vla")
    with pytest.raises(UserError, match="nowhere"):
        open_split("nowhere", "val")


def test_limit_and_progress(model: Detector) -> None:
    seen: list[tuple[int, int]] = []
    config = DataConfig(**DATA)
    evaluate(
        model, config, workers=0, device="cpu", limit=2, batch_size=1, progress=lambda *at: seen.append(at)
    )  # fmt: skip
    assert seen == [(1, 2), (2, 2)]


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert (choose_device("auto").type == "cpu") == (not torch.accelerator.is_available())
    for wrong in ("gpu", "cuda:99", ""):
        with pytest.raises(UserError, match="cannot be used here"):
            choose_device(wrong)
