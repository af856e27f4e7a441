"""What watches a run without being part of it: pictures, experiment trackers, a user's own.

A callback is called in the main process alone. One that fails is reported and costs the run nothing, since days
of training weigh more than a picture or a tracker's server.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from detdistill.errors import UserError, nearest
from detdistill.evaluation.measure import Evaluation
from detdistill.recipe import Recipe
from detdistill.training.run_folder import Row, RunFolder
from detdistill.visualization.gallery import save_samples
from detdistill.visualization.plots import plot_curves

logger = logging.getLogger(__name__)

GROUP = "detdistill.callbacks"
TRACKERS = (
    "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio",
)  # fmt: skip
"""Accelerate's names, which are those of the packages, too."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a callback may know of its run.

    Attributes:
        recipe: what is trained.
        folder: the run folder.
        step: that it starts at; above 0 in a resumed run.
        total_steps: that it ends at.
        note: prints a line.
    """

    recipe: Recipe
    folder: Path
    step: int
    total_steps: int
    note: Callable[[str], None]


class Callback:
    """Watches a run: override what you need. Numbers are floats by name, as in ``metrics.jsonl``."""

    def on_start(self, run: Run) -> None:
        """Before the first step of this process; again in a resumed run."""

    def on_log(self, run: Run, row: Row) -> None:
        """Every 20 steps: ``step``, ``epoch``, ``lr``, ``loss``, ``loss/NAME``, ``images_per_second``, …"""

    def on_evaluate(self, run: Run, row: Row, evaluation: Evaluation) -> None:
        """After an evaluation: ``step``, ``epoch`` and its numbers, in [0, 1]."""

    def on_end(self, run: Run, status: str, metrics: Row, evaluation: Evaluation) -> None:
        """When the student is written; not of a run that is stopped and goes on later."""


class Callbacks:
    """Several callbacks as one; each fault is reported once."""

    def __init__(self, callbacks: Sequence[Callback], enabled: bool) -> None:
        self._callbacks = list(callbacks) if enabled else []
        self._failed: set[tuple[int, str]] = set()

    def call(self, event: str, run: Run, *args: Any) -> None:
        for place, callback in enumerate(self._callbacks):
            self._call(place, callback, event, run, *args)

    def _call(self, place: int, callback: Callback, event: str, run: Run, *args: Any) -> None:
        try:
            getattr(callback, event)(run, *args)
        except Exception as error:  # it watches, and must not stop what it watches
            if (place, event) not in self._failed:
                self._failed.add((place, event))
                run.note(f"warning: callback {type(callback).__name__}.{event} failed ({error!r})")


class Pictures(Callback):
    """``curves.png`` after each evaluation, ``samples.png`` at the end."""

    def on_evaluate(self, run: Run, row: Row, evaluation: Evaluation) -> None:
        self._draw(run, "curves.png", partial(plot_curves, RunFolder(run.folder).metrics()))

    def on_end(self, run: Run, status: str, metrics: Row, evaluation: Evaluation) -> None:
        self._draw(run, "samples.png", partial(save_samples, evaluation))

    def _draw(self, run: Run, name: str, draw: Callable[[Path], None]) -> None:
        try:
            draw(run.folder / name)
        except Exception as error:  # as above
            run.note(f"warning: {run.folder / name} was not drawn ({error!r})")


class Trackers(Callback):
    """Experiment trackers, by Accelerate; the loop ends them, with the group of processes."""

    def __init__(self, accelerator: Accelerator, names: Sequence[str]) -> None:
        self.accelerator, self.names = accelerator, names

    def on_start(self, run: Run) -> None:
        if list(self.names) == ["tensorboard"]:  # its files lie in RUN/tensorboard
            self.accelerator.init_trackers("tensorboard")
            return
        wandb = {"name": run.recipe.name, "dir": str(run.folder)}
        options = {"wandb": wandb} if "wandb" in self.names else {}
        config = dict(_flat(run.recipe.model_dump(mode="json")))
        self.accelerator.init_trackers("detdistill", config, options)

    def on_log(self, run: Run, row: Row) -> None:
        numbers = {key: value for key, value in row.items() if key != "step" and math.isfinite(value)}
        self.accelerator.log(numbers, step=int(row["step"]))

    def on_evaluate(self, run: Run, row: Row, evaluation: Evaluation) -> None:
        self.on_log(run, row)


def trackers_of(names: Sequence[str] | None) -> list[str]:
    """The trackers of ``training.trackers``: those, or TensorBoard where it is installed.

    Raises:
        UserError: there is none of that name, or its package is not installed.
    """
    if names is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"training.trackers: no tracker {name!r}; {nearest(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"training.trackers: {name} is not installed: pip install {name}")
    return list(names)


def installed_callbacks(names: Sequence[str]) -> list[Callback]:
    """The callbacks of ``training.callbacks``, which installed packages bring by entry points.

    Raises:
        UserError: there is none of that name, or it cannot be made.
    """
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    found = []
    for name in names:
        if name not in known:
            hint = nearest(name, known) if known else f"no package brings any (entry point group {GROUP})"
            raise UserError(f"training.callbacks: no callback {name!r}; {hint}")
        found.append(_made(known[name]))
    return found


def _made(entry: EntryPoint) -> Callback:
    try:
        made: Callback = entry.load()()
        return made
    except Exception as error:  # it is not our code
        raise UserError(f"training.callbacks: {entry.name} cannot be made ({error!r})") from error


def _flat(tree: Mapping[str, Any], at: str = "") -> list[tuple[str, Any]]:
    """``training.epochs: 12`` for each value of nested sections; what is no plain value as text."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{at}{key}.")
        else:
            rows.append((f"{at}{key}", value if isinstance(value, str | int | float) else str(value)))
    return rows
