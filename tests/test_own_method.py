"""A method that is not ours: from a program, and from an installed package (docs/your-own-method.md)."""

from __future__ import annotations

import logging
import re
import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest
import torch

import detdistill
from detdistill.cli import main
from detdistill.distillation import methods as room
from detdistill.distillation.methods import METHODS, PLUGINS, add_installed_methods
from detdistill.errors import UserError
from detdistill.recipe import model_config

from .test_docs import FENCE, ROOT

PAGE = (ROOT / "docs" / "your-own-method.md").read_text(encoding="utf-8")
(CODE,) = (block for language, block in FENCE.findall(PAGE) if language == "python")


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's module, as a package would bring it."""
    module = ModuleType("my_package.moments")
    monkeypatch.setitem(sys.modules, "my_package.moments", module)
    definition = CODE.partition("METHODS[")[0]
    exec(compile(definition, "my_package/moments.py", "exec"), module.__dict__)
    monkeypatch.setattr(room, "METHODS", dict(METHODS))
    return module


def installed(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(room, "entry_points", lambda group: [EntryPoint(name, value, group)])
    add_installed_methods()


def test_a_package_brings_a_method(
    moments: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = re.search(r'entry-points\."(.+)"\]\n(\w+) = "(.+)"', PAGE)
    assert toml is not None
    assert toml[1] == PLUGINS
    installed(monkeypatch, toml[2], toml[3])
    assert room.METHODS["moments"] is moments.Moments
    assert main(["methods"]) == 0
    assert "mean and spread of each channel" in capsys.readouterr().out
    assert main(["methods", "moments"]) == 0
    said = capsys.readouterr().out
    assert "two_stage" in said
    assert "spread" in said


def test_its_parts_learn_and_its_options_are_checked(
    moments: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "moments", "my_package.moments:Moments")
    section = {"backbone": "resnet10t", "head_depth": 1, "strides": [16, 32]}
    student, teacher = (
        detdistill.build_model(model_config(channels=channels, **section), ["a"]) for channels in (8, 16)
    )
    pair = detdistill.Pair(student, teacher, [{"moments": {"spread": 2.0}}])
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([0])}
    pair([torch.rand(3, 64, 64)], [target])["moments"].backward()
    adapters = dict(pair.methods.named_parameters())
    assert adapters
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters.values())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())
    with pytest.raises(UserError, match=r"moments has no option 'spred'.*spread"):
        detdistill.Pair(student, teacher, [{"moments": {"spred": 2.0}}])
    with pytest.raises(UserError, match=r"moments\.spread"):
        detdistill.Pair(student, teacher, [{"moments": {"spread": "wide"}}])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ima", "my_package.moments:Moments", "method 'ima' is ours already"),
        ("lost", "no_such_package:Lost", "method 'lost' cannot be loaded"),
    ],
)
def test_what_cannot_be_added_is_left_out(
    name: str,
    value: str,
    message: str,
    moments: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = dict(METHODS)
    with caplog.at_level(logging.WARNING, "detdistill"):
        installed(monkeypatch, name, value)
    assert message in caplog.text
    assert before == room.METHODS
