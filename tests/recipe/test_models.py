"""Sections of models by family: what is refused, what is kept, and families of other packages."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import detdistill
from detdistill.errors import UserError
from detdistill.recipe import ModelConfig, dump_recipe, model_config, parse_recipe
from detdistill.recipe import models as recipe_models
from detdistill.recipe.models import FAMILIES, FCOSConfig, SavedModelConfig, families

SMALL = {"backbone": "test_efficientnet.r160_in1k", "channels": 16, "head_depth": 1, "strides": (8, 16, 32)}


def test_a_model_built_in_python_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    model: Any = FCOSConfig(**SMALL, size=64).build(["cat", "dog"])
    model.score_threshold, model.max_detections = 0.3, 7  # what is saved is what one holds
    detdistill.save_model(model, tmp_path / "model.safetensors")
    loaded: Any = detdistill.load_model(tmp_path / "model.safetensors")
    assert loaded.classes == ("cat", "dog")
    assert (loaded.score_threshold, loaded.max_detections, loaded.preprocessor.size) == (0.3, 7, (64, 64))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    detdistill.export(tmp_path / "model.safetensors", size=(64, 64))
    assert next(tmp_path.glob("*.onnx")).is_file()


def test_a_name_or_a_section_or_a_class_build_the_same() -> None:
    built = []
    for build in (
        lambda: detdistill.build_model("fcos", 2, **SMALL),
        lambda: detdistill.build_model({"family": "fcos", **SMALL}, ["0", "1"]),
        lambda: FCOSConfig(**SMALL).build(2),
    ):
        torch.manual_seed(0)
        built.append(build())
    assert built[0].config == built[1].config == built[2].config
    for other in built[1:]:
        assert all(torch.equal(a, b) for a, b in zip(built[0].parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_section_comes_back_from_its_own_words(family: str) -> None:
    config = model_config(family=family)
    assert ModelConfig.model_validate(json.loads(config.model_dump_json())) == config
    recipe = parse_recipe({"data": "digits", "student": {"family": family}})
    again = parse_recipe(json.loads(recipe.model_dump_json()))
    assert again == recipe
    assert type(again.student) is FAMILIES[family]
    assert f"family: {family}" in dump_recipe(recipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_section_of_version_0_1_is_read(family: str) -> None:
    """It named every option of any family, none of them said."""
    assert model_config({"family": family, **recipe_models._OPTIONS_OF_0_1}).given.keys() <= {
        "family", "weights", "size", "keep_ratio", "window", *recipe_models._OPTIONS_OF_0_1
    }  # fmt: skip
    if "window" not in FAMILIES[family].model_fields:
        with pytest.raises(UserError, match=f"unknown key 'window' of {family}"):
            model_config({"family": family, **recipe_models._OPTIONS_OF_0_1, "window": (64, 32)})


def test_the_base_is_of_no_family() -> None:
    with pytest.raises(TypeError, match=r"call model_config\(\.\.\.\)"):
        ModelConfig(family="fcos")


def test_a_section_without_a_family_is_checked_against_all() -> None:
    section = model_config(weights="run", bins=20)
    assert isinstance(section, SavedModelConfig)
    assert section.given == {"weights": "run", "bins": 20}
    with pytest.raises(UserError, match="unknown key 'bin'; did you mean 'bins'"):
        model_config(weights="run", bin=20)
    with pytest.raises(UserError, match="bins: input should be greater"):
        model_config(weights="run", bins=1)


def test_what_is_no_section_is_refused_in_plain_words() -> None:
    for student, said in (
        ("runs/a", "student: must be a section, as {key: value} (got 'runs/a')"),
        ({"family": "saved"}, "student.family: no family 'saved'; known: "),
    ):
        with pytest.raises(UserError) as caught:
            parse_recipe({"data": "digits", "student": student})
        assert said in str(caught.value)


# --- families of other packages --------------------------------------------------------------------------


class TinyConfig(FCOSConfig):
    """An FCOS with a narrow head."""

    family: Literal["tiny"] = "tiny"  # type: ignore[assignment]
    channels: int = 8


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("tiny", f"{__name__}:TinyConfig", recipe_models.GROUP),
        EntryPoint("broken", "no_such_module:Config", recipe_models.GROUP),
    ]
    monkeypatch.setattr(recipe_models, "entry_points", lambda group: entries)
    monkeypatch.setattr(recipe_models, "_plugins_loaded", False)
    monkeypatch.setattr(recipe_models, "FAMILIES", dict(FAMILIES))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


@pytest.mark.usefixtures("installed")
def test_an_installed_package_brings_a_family(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "tiny" in families()
    assert "family 'broken' cannot be loaded" in caplog.text
    options = {name: value for name, value in SMALL.items() if name != "channels"}
    model = detdistill.build_model("tiny", ["a"], **options)
    detdistill.save_model(model, tmp_path / "tiny.safetensors")
    loaded = detdistill.load_model(tmp_path / "tiny.safetensors")
    assert type(loaded.config) is TinyConfig
    assert set(loaded.pyramid_channels.values()) == {8}


def test_recipes_and_families_are_read_without_torch() -> None:
    program = (
        "import sys; from detdistill.recipe import parse_recipe; "
        "parse_recipe({'data': 'digits', 'student': {'family': 'd_fine'}}); "
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("classes", [[1, 2], ["a", "a"], [], 0, -1, True, [""], [None, "b"], "ab", b"a"])
def test_classes_that_a_file_could_not_keep_are_refused(classes):
    with pytest.raises(UserError, match="classes"):
        detdistill.build_model("fcos", classes, backbone="mobilenetv3_small_050", channels=8)
