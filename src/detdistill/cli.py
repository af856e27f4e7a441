"""The command line. Each verb parses, calls one function of :mod:`detdistill.experiments`, and prints.

Exit codes: 0 done; 2 something that the user can mend, in one line; 1 a bug, with its traceback; 75 preempted
and saved, start again; 130 interrupted.

Verbs import what they need when they run, torch after the recipe is read, so that ``--help`` and mistakes are
answered at once.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from detdistill.experiments.compare import Study

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130
ISSUES = (
    "This is a bug in detdistill: please report it, with the lines above and what `detdistill --version` says."
)
_UsageError: Any = typer.BadParameter.__base__  # click's own, wherever this release of typer keeps it
_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)

app = typer.Typer(
    name="detdistill",
    help="Teach a small object detector with a big one: knowledge distillation.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file, see docs/recipes.md.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings over the recipe's own.")
]
Weights = Annotated[Path, typer.Argument(metavar="WEIGHTS", help="A run folder or a .safetensors file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Devices = Annotated[
    list[str] | None, typer.Option("--device", help="Spread the runs: --device cuda:0 --device cuda:1.")
]
Seeds = Annotated[int, typer.Option(min=1, help="Repeat with seeds 0, 1, …; a verdict needs at least 2.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time.")]
AllowUnequal = Annotated[
    bool, typer.Option("--allow-unequal", help="Let the arms' budgets differ, and say so.")
]
TableOnly = Annotated[bool, typer.Option("--table", help="Train nothing: tell what is there.")]


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
    """Train a recipe; the same command resumes a run that was stopped."""
    from detdistill.config import load_recipe

    settings = load_recipe(recipe, overrides or ())

    from detdistill.experiments.train import train as train_recipe
    from detdistill.printing import percent, say

    result = train_recipe(settings, out=out, resume=not fresh)
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        say(
            f"{result.status}: "
            + "  ".join(f"{n} {percent(result.metrics[n])}" for n in ("AP", "AP50", "AP75"))
        )
        say(f"student: {result.student}")


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Look over a recipe's data, models and levels before it runs."""
    from detdistill.config import load_recipe

    settings = load_recipe(recipe, overrides or ())

    from detdistill.experiments.check import check as check_recipe
    from detdistill.printing import print_check

    result = check_recipe(settings)
    print_check(result)
    if not result.ok:
        raise typer.Exit(USER_ERROR)


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe with a teacher, or a study file.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[METHOD]... [KEY=VALUE]...", help="More methods, and settings for all arms."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Arms: none (the student alone) and methods, as --methods none mimic ima."),
    ] = None,
    seeds: Seeds = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/compare/RECIPE unless given.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Instead of the recipe's: a run, a file, or a recipe to train first.")
    ] = None,
    metric: Annotated[str, typer.Option(help="Of the runs' results.")] = "AP",
    jobs: Jobs = 1,
    device: Devices = None,
    allow_unequal: AllowUnequal = False,
    table: TableOnly = False,
) -> None:
    """Train arms that differ in the method alone, over seeds, and say what the difference is worth."""
    from detdistill.config import UserError
    from detdistill.experiments import compare as engine

    overrides = [word for word in words or [] if "=" in word]
    names = [*(methods or []), *(word for word in words or [] if "=" not in word)]
    if engine.is_study(recipe):
        if names or teacher is not None:
            raise UserError(f"{recipe} is a study and names its own arms and teacher: leave them out")
        study = engine.read_study(recipe, overrides, out)
    else:
        out = out or Path("runs/compare") / recipe.stem
        if teacher is not None:
            overrides.append(f"teacher={engine.trained_teacher(teacher, out)}")
        study = engine.plan_methods(recipe, names or ["none", "ima"], overrides, range(seeds), out)
    _run_study(study, metric, jobs, device, allow_unequal, table)


@app.command()
def sweep(
    recipe: RecipeFile,
    setting: Annotated[
        str,
        typer.Argument(metavar="KEY=A,B,C", help="As distill.weight=0.1,1,10 or methods.ima.options.alpha=…"),
    ],
    overrides: Overrides = None,
    seeds: Seeds = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/sweep/RECIPE unless given.")
    ] = None,
    jobs: Jobs = 1,
    device: Devices = None,
    allow_unequal: AllowUnequal = False,
    table: TableOnly = False,
) -> None:
    """Compare the values of one setting with the student alone (Table 8 of the paper)."""
    from detdistill.experiments import compare as engine

    key, _, values = setting.partition("=")
    folder = out or Path("runs/sweep") / f"{recipe.stem}-{key}"
    study = engine.plan_sweep(
        recipe, key, [v for v in values.split(",") if v], overrides or (), range(seeds), folder
    )
    _run_study(study, "AP", jobs, device, allow_unequal, table)


@app.command()
def ablate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    seeds: Seeds = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/ablate/RECIPE unless given.")
    ] = None,
    jobs: Jobs = 1,
    device: Devices = None,
    table: TableOnly = False,
) -> None:
    """IMA's parts, one after another (Table 5 of the paper)."""
    from detdistill.experiments import compare as engine

    folder = out or Path("runs/ablate") / recipe.stem
    study = engine.plan_ablation(recipe, overrides or (), range(seeds), folder)
    _run_study(study, "AP", jobs, device, False, table)


def _run_study(
    study: Study, metric: str, jobs: int, devices: Sequence[str] | None, allow_unequal: bool, table: bool
) -> None:
    from detdistill.experiments.compare import run_study
    from detdistill.printing import print_comparison, say

    comparison = run_study(
        study,
        jobs=jobs,
        devices=devices or (),
        metric=metric,
        allow_unequal=allow_unequal,
        train=not table,
        say=say,
    )
    print_comparison(comparison)
    if any(arm.failed for arm in comparison.arms):
        raise typer.Exit(USER_ERROR)


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
    from detdistill.printing import print_evaluation, progress_bar, write_json

    with progress_bar("evaluating") as progress:
        evaluation = evaluate_model(
            weights, data, split=split, batch_size=batch_size, workers=workers, device=device, progress=progress
        )
    if metric is Metric.voc:
        from detdistill.evaluation.voc import voc_ap

        voc = voc_ap(evaluation.split, evaluation.detections)
        numbers, per_class = {"mAP50": voc.mAP}, voc.per_class
    else:
        numbers, per_class = evaluation.coco.as_dict(), evaluation.coco.per_class
    print_evaluation(evaluation, numbers, per_class)
    if json_file is not None:
        write_json(json_file, {**numbers, "per_class": per_class})


@app.command()
def benchmark(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Run folders, weights files, recipes.")
    ],
    size: Annotated[tuple[int, int] | None, typer.Option(help="Height and width of the image.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of throughput and memory.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each model.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before them that are not timed.")] = 3,
    device: Device = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, too.")] = None,
) -> None:
    """Parameters, FLOPs, latency, throughput and memory, side by side (Table 6 of the paper)."""
    from dataclasses import asdict

    from detdistill.experiments.benchmark import benchmark as measure
    from detdistill.printing import print_efficiency, write_json

    costs = measure(models, size=size, runs=runs, warmup=warmup, batch_size=batch_size, device=device)
    print_efficiency(costs, runs, warmup)
    if json_file is not None:
        write_json(json_file, {name: asdict(cost) for name, cost in costs.items()})


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
    """Detect objects in images: pictures and predictions.json."""
    from detdistill.experiments.predict import predict as predict_images
    from detdistill.printing import progress_bar, say

    with progress_bar("detecting") as progress:
        predictions = predict_images(
            weights, images, out=out, threshold=threshold, teacher=teacher, device=device, progress=progress
        )
    found = Counter(name for prediction in predictions for name in prediction.names)
    listed = ", ".join(f"{count} {name}" for name, count in found.most_common(10))
    say(f"{len(predictions)} images, {found.total()} objects" + (f": {listed}" if listed else ""))
    say(f"pictures and predictions.json: {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs/demo"),
    seed: Annotated[list[int] | None, typer.Option(help="Repeat the comparison; may be given often.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only, to see that all works.")] = False,
) -> None:
    """Distil a detector of drawn digits, beside the student alone."""
    from detdistill.experiments.demo import demo as run_demo

    run_demo(out=out, seeds=seed or (0,), fast=fast)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Say all of this one: equation, options, presets.")] = None,
) -> None:
    """List the distillation methods, or describe one."""
    from importlib import import_module

    from detdistill.distillation.methods import METHODS, option_table
    from detdistill.printing import first_line, say, show

    if name is not None:
        columns, rows = option_table(name)
        say((import_module(f"detdistill.distillation.methods.{name}").__doc__ or "").strip() + "\n")
        show(columns, rows, text_columns=len(columns))
        return
    files = {name: import_module(f"detdistill.distillation.methods.{name}") for name in METHODS}
    show(
        ("method", "what it is"),
        [(name, first_line(file.__doc__)) for name, file in files.items()],
        text_columns=2,
    )


@app.command()
def models(
    backbones: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="List timm's names instead, as 'resnet*' or '*mobile*'."),
    ] = None,
) -> None:
    """List the detector families, or names of backbones."""
    if backbones is not None:
        import timm

        print("\n".join(timm.list_models(backbones)))
        return
    import inspect

    from detdistill.models.build import FAMILIES
    from detdistill.printing import first_line, say, show

    rows = []
    for name, build in FAMILIES.items():
        strides = inspect.signature(build).parameters["strides"].default
        rows.append((name, " ".join(map(str, strides)), first_line(build.__doc__)))
    show(("family", "strides", "what it is"), rows, text_columns=3)
    say("backbone: any timm model with feature maps; `detdistill models --backbones 'resnet*'` lists names")


# --- the way in ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see the head of this file)."""
    command = typer.main.get_command(app)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = command.main(arguments, prog_name="detdistill", standalone_mode=False)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            code = _explain(error)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return int(code or 0)


def _explain(error: Exception) -> int:
    """Say on stderr what went wrong; returns the exit code."""
    message = _message_for_user(error)
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
        return USER_ERROR
    traceback.print_exception(error)
    print(ISSUES, file=sys.stderr)
    return BUG


def _message_for_user(error: Exception) -> str | None:
    """One line for what the user can mend, None for a bug."""
    from pydantic import ValidationError

    from detdistill.config import UserError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "detdistill"
        return f"{' '.join(error.format_message().split())} (see `{path} --help`)"
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return "the accelerator's memory is full: lower training.batch_size, or raise training.accumulate"
    return None


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """This package's warnings in one line, others as Python prints them."""
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    text = (
        f"warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    )
    print(text, end="", file=file or sys.stderr)
