"""What watches a run: called in order, never in the way, from Python, by name, and as trackers."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import detdistill
from detdistill.commands.check import check
from detdistill.errors import UserError
from detdistill.recipe import dump_recipe
from detdistill.training import callbacks
from detdistill.training.loop import train


class Recorder(detdistill.Callback):
    """Records each call; perhaps fails each time."""

    def __init__(self, fails=False):
        self.events, self.fails = [], fails

    def _note(self, event, run, step):
        self.events.append((event, step, run.folder.name, run.total_steps))
        if self.fails:
            raise RuntimeError("no server")

    def on_start(self, run):
        self._note("start", run, run.step)

    def on_log(self, run, row):
        assert row["loss"] > 0
        self._note("log", run, row["step"])

    def on_evaluate(self, run, row, evaluation):
        assert row["AP"] == evaluation.numbers()["AP"]
        self._note("evaluate", run, row["step"])

    def on_end(self, run, status, metrics, evaluation):
        assert status == "finished"
        assert (run.folder / "student.safetensors").is_file()
        self._note("end", run, metrics["steps"])


def test_callbacks_are_called_in_order_and_change_nothing(make_recipe, tmp_path, capsys):
    recipe = make_recipe(training={"max_steps": 4, "evaluate_every": 1, "trackers": []})
    told, broken = Recorder(), Recorder(fails=True)
    train(recipe, tmp_path / "watched", callbacks=[broken, told])
    # 24 images in batches of 8: an epoch is 3 steps
    expected = [("start", 0), ("log", 3), ("evaluate", 3), ("log", 4), ("evaluate", 4), ("end", 4)]
    assert told.events == [(event, step, "watched", 4) for event, step in expected]
    assert broken.events == told.events
    said = capsys.readouterr().out
    for event in ("on_start", "on_log", "on_evaluate", "on_end"):
        assert said.count(f"warning: callback Recorder.{event} failed (RuntimeError('no server'))") == 1
    train(recipe, tmp_path / "alone")
    watched, alone = (load_file(tmp_path / run / "student.safetensors") for run in ("watched", "alone"))
    assert all(torch.equal(watched[name], value) for name, value in alone.items())


def test_without_pictures_and_trackers_there_are_none(make_recipe, tmp_path):
    train(make_recipe(training={"max_steps": 1, "trackers": []}), tmp_path / "bare")
    names = {path.name for path in (tmp_path / "bare").iterdir()}
    assert "metrics.csv" in names
    assert not names & {"curves.png", "samples.png", "tensorboard"}


@pytest.fixture
def installed(monkeypatch):
    entries = [
        EntryPoint("recorder", f"{__name__}:Recorder", callbacks.GROUP),
        EntryPoint("broken", "no_such_module:Callback", callbacks.GROUP),
    ]
    monkeypatch.setattr(callbacks, "entry_points", lambda group: entries)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


@pytest.mark.usefixtures("installed")
def test_a_package_brings_a_callback():
    (made,) = callbacks.installed_callbacks(["recorder"])
    assert isinstance(made, Recorder)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"callbacks": ["recrder"]}, "no callback 'recrder'; did you mean 'recorder'?"),
        ({"callbacks": ["broken"]}, "broken cannot be made"),
        ({"trackers": ["wandbb"]}, "no tracker 'wandbb'; did you mean 'wandb'?"),
        ({"trackers": ["nowhere"]}, "nowhere is not installed: pip install nowhere"),
    ],
)
def test_what_is_not_there_is_refused_by_check_and_train(make_recipe, tmp_path, monkeypatch, training, said):
    monkeypatch.setattr(callbacks, "TRACKERS", (*callbacks.TRACKERS, "nowhere"))
    recipe = make_recipe(training=training)
    with pytest.raises(UserError) as caught:
        train(recipe, tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert any(said in problem for problem in check(recipe, step=False).problems)


def test_a_tracker_gets_the_recipe_and_the_numbers(make_recipe, tmp_path):
    class Accelerator:
        def __init__(self):
            self.calls = []

        def init_trackers(self, *args):
            self.calls.append(args)

        def log(self, values, step):
            self.calls.append((values, step))

    accelerator, recipe = Accelerator(), make_recipe()
    run = callbacks.Run(recipe, tmp_path, 0, 7, print)
    trackers = callbacks.Trackers(accelerator, ["wandb", "mlflow"])
    trackers.on_start(run)
    trackers.on_log(run, {"step": 3, "loss": 1.5, "APL": float("nan")})
    (project, config, options), logged = accelerator.calls
    assert (project, options) == ("detdistill", {"wandb": {"name": recipe.name, "dir": str(tmp_path)}})
    assert config["training.max_steps"] == 7
    assert config["student.family"] == "retinanet"
    assert all(isinstance(value, str | int | float) for value in config.values())
    assert logged == ({"loss": 1.5}, 3)


def test_the_documented_callback_works(make_recipe, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?Callback.*?)```", page, re.DOTALL)
    recipe = make_recipe(training={"max_steps": 1, "trackers": []})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "recipes.md", "exec"), {})
    assert "best AP so far: " in capsys.readouterr().out
