"""The command line. Each verb parses, calls one function of :mod:`detdistill.experiments`, and prints.

Exit codes: 0 done; 2 something that the user can mend, in one line; 1 a bug, with its traceback; 75 preempted
and saved, start again; 130 interrupted.

Verbs import what they need when they run, so that ``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from detdistill.data.records import Finding
    from detdistill.evaluation.detector import Evaluation
    from detdistill.experiments.check import Check

ISSUES = "This is a bug in detdistill. Please report it with the lines above and the output of `detdistill --version`."
SHOWN_OF_A_KIND = 10
_UsageError: Any = typer.BadParameter.__base__  # click's own, wherever this release of typer keeps it

app = typer.Typer(
    name="detdistill",
    help="Teach a small object detector with a big one.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file, see docs/recipes.md.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings over the recipe's own.")
]
Weights = Annotated[Path, typer.Argument(metavar="WEIGHTS", help="A run folder or a .safetensors file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]


class Metric(str, Enum):
    """Ways to measure detections."""

    coco = "coco"
    voc = "voc"


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the versions in use and end.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        names = ("detdistill", "torch", "torchvision", "timm")
        print("  ".join(f"{name} {version_of(name)}" for name in names), f" python {sys.version.split()[0]}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


# --- verbs -----------------------------------------------------------------------------------------------


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME unless given.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over where a run is already there.")] = False,
) -> None:
    """Train a recipe: a student alone, or with its teacher. The same command resumes a stopped run."""
    from detdistill.experiments.train import train as train_recipe

    result = train_recipe(recipe, overrides or (), out=out, resume=not fresh)
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        numbers = "  ".join(f"{name} {_percent(result.metrics[name])}" for name in ("AP", "AP50", "AP75"))
        _console().print(f"{result.status}: {numbers}\nstudent: {result.student}", markup=False, soft_wrap=True)


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Look a recipe over before it runs: its data, its models, and how teacher and student meet."""
    from detdistill.experiments.check import check as check_recipe

    result = check_recipe(recipe, overrides or ())
    _print_check(_console(), result)
    if not result.ok:
        raise typer.Exit(2)


@app.command()
def evaluate(
    weights: Weights,
    data: Annotated[str, typer.Option(metavar="FOLDER_OR_RECIPE", help="The dataset, or a recipe with one.")],
    split: Annotated[str, typer.Option(help="Which part of the dataset.")] = "val",
    metric: Annotated[Metric, typer.Option(help="COCO's 12 numbers, or VOC's AP at IoU 0.5.")] = Metric.coco,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 2,
    device: Device = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, too.")] = None,
) -> None:
    """Measure a detector on a dataset."""
    from detdistill.experiments.evaluate import evaluate as evaluate_model

    with _progress("evaluating") as progress:
        evaluation = evaluate_model(
            weights, data, split=split, batch_size=batch_size, workers=workers, device=device, progress=progress
        )
    numbers, per_class = _numbers(evaluation, metric)
    _print_evaluation(_console(), evaluation, numbers, per_class)
    if json_file is not None:
        _write_json(json_file, {**numbers, "per_class": per_class})


@app.command()
def predict(
    weights: Weights,
    images: Annotated[Path, typer.Argument(metavar="IMAGE_OR_FOLDER")],
    out: Annotated[Path, typer.Option(help="Folder for pictures and predictions.json.")] = Path("runs/predict"),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least score.")] = 0.3,
    teacher: Annotated[
        Path | None, typer.Option(help="Draw what this model finds beside it, on the right.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Detect objects in images, draw them, and list them in predictions.json."""
    from detdistill.experiments.predict import predict as predict_images

    with _progress("detecting") as progress:
        predictions = predict_images(
            weights, images, out=out, threshold=threshold, teacher=teacher, device=device, progress=progress
        )
    found = Counter(name for prediction in predictions for name in prediction.names)
    listed = ", ".join(f"{count} {name}" for name, count in found.most_common(10))
    console = _console()
    console.print(f"{len(predictions)} images, {found.total()} objects" + (f": {listed}" if listed else ""))
    console.print(f"pictures and predictions.json: {out}", markup=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs/demo"),
    seed: Annotated[list[int] | None, typer.Option(help="Repeat the comparison; may be given often.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only, to see that all works.")] = False,
) -> None:
    """Teach a student on drawn digits, beside the same student alone, with the same budget."""
    from detdistill.experiments.demo import demo as run_demo

    run_demo(out=out, seeds=seed or (0,), fast=fast)


@app.command()
def methods() -> None:
    """List the distillation methods."""
    from importlib import import_module

    from detdistill.distillation.methods import METHODS

    rows = [
        (name, _first_line(import_module(f"detdistill.distillation.methods.{name}").__doc__)) for name in METHODS
    ]
    _console().print(_table(("method", "what it compares"), rows))


@app.command()
def models(
    backbones: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="List timm's names instead, as 'resnet*' or '*mobile*'.")
    ] = None,
) -> None:
    """List the detector families, or the backbones that they can stand on."""
    if backbones is not None:
        import timm

        print("\n".join(timm.list_models(backbones)))
        return
    import inspect

    from detdistill.models import faster_rcnn, fcos, retinanet

    rows = []
    for build in (retinanet, fcos, faster_rcnn):
        strides = inspect.signature(build).parameters["strides"].default
        rows.append((build.__name__, " ".join(map(str, strides)), _first_line(sys.modules[build.__module__].__doc__)))
    console = _console()
    console.print(_table(("family", "strides", "what it is"), rows))
    console.print(
        "Any timm model with feature maps is a backbone (`detdistill models --backbones 'resnet*'`)", markup=False
    )


# --- printing --------------------------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    # A file or pipe has no width; tables are not to be cut at 80 columns there.
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]], numbers_from: int = 99) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i >= numbers_from else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]


def _percent(value: float) -> str:
    """A number in [0, 1] as papers print it; NaN, where there was nothing to measure, as a dash."""
    return "–" if math.isnan(value) else f"{value * 100:.1f}"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
