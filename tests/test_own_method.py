"""A method that is not ours: from a program, and from an installed package (docs/your-own-method.md)."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import detdistill
from detdistill.cli import main
from detdistill.errors import UserError
from detdistill.recipe import methods as room
from detdistill.recipe import model_config
from detdistill.recipe.methods import GROUP, METHODS

from .test_docs import FENCE, ROOT

PAGE = (ROOT / "docs" / "your-own-method.md").read_text(encoding="utf-8")
(CODE,) = (block for language, block in FENCE.findall(PAGE) if language == "python")


OLD = """
from detdistill import Method


class Old(Method):
    def forward(self, signals):
        return 0
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's module, as a package brings it, and one as version 0.1 had it."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "moments.py").write_text(CODE.partition("pair = ")[0], encoding="utf-8")
    (tmp_path / "my_package" / "old.py").write_text(OLD, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(room, "METHODS", dict(METHODS))
    monkeypatch.setattr(room, "_plugins_loaded", False)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def installed(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(room, "entry_points", lambda group: [EntryPoint(name, value, group)])


def test_a_package_brings_a_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    toml = re.search(r'entry-points\."(.+)"\]\n(\w+) = "(.+)"', PAGE)
    assert toml is not None
    assert toml[1] == GROUP
    installed(monkeypatch, toml[2], toml[3])
    assert main(["methods"]) == 0
    assert "mean and spread of each channel" in capsys.readouterr().out
    assert main(["methods", "moments"]) == 0
    said = capsys.readouterr().out
    assert "two_stage" in said
    assert "factor on the spreads' term" in said
    assert room.methods()["moments"] is sys.modules["my_package.moments"].MomentsOptions


def test_its_parts_learn_and_its_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "moments", "my_package.moments:MomentsOptions")
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
    with pytest.raises(UserError, match=r"moments: unknown key 'spred' of moments; did you mean 'spread'"):
        detdistill.Pair(student, teacher, [{"moments": {"spred": 2.0}}])
    with pytest.raises(UserError, match=r"moments: spread: input should be a valid number"):
        detdistill.Pair(student, teacher, [{"moments": {"spread": "wide"}}])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ima", "my_package.moments:MomentsOptions", "method 'ima' exists already"),
        ("lost", "no_such_package:Lost", "method 'lost' cannot be loaded"),
        ("old", "my_package.old:Old", "method 'old' is left out: name the class of its options there"),
    ],
)
def test_what_cannot_be_added_is_left_out(
    name: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = dict(METHODS)
    with caplog.at_level(logging.WARNING, "detdistill"):
        installed(monkeypatch, name, value)
        assert room.methods() == before
    (line,) = caplog.messages
    assert message in line


def test_a_method_class_in_the_table_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As programs did with version 0.1."""
    monkeypatch.setitem(room.METHODS, "moments", detdistill.Method)
    with pytest.raises(UserError, match=r"give the method's options a class, with @register\('moments'"):
        room.read_options("moments", {})
