"""Verbs that train: one run, or many that are compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from detdistill.cli.app import USER_ERROR, Overrides, RecipeFile, app


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace a run that exists.")] = False,
) -> None:
    """Train a recipe, or resume its stopped run."""
    from detdistill.recipe import load_recipe

    settings = load_recipe(recipe, overrides or ())

    from detdistill.cli.printing import percent, say
    from detdistill.training.train import train as train_recipe

    result = train_recipe(settings, out=out, resume=not fresh)
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        say(
            f"{result.status}: "
            + "  ".join(f"{n} {percent(value)}" for n, value in list(result.metrics.items())[:3])
        )
        say(f"student: {result.student}")


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    step: Annotated[
        bool, typer.Option("--step/--no-step", help="Try one training step on at most two images.")
    ] = True,
) -> None:
    """Validate a recipe, its data and its models."""
    from detdistill.recipe import load_recipe

    settings = load_recipe(recipe, overrides or ())

    from detdistill.cli.printing import print_check
    from detdistill.commands.check import check as check_recipe

    result = check_recipe(settings, step=step)
    print_check(result)
    if not result.ok:
        raise typer.Exit(USER_ERROR)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs/demo"),
    seed: Annotated[list[int] | None, typer.Option(help="Seed of a comparison; may be repeated.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only, as a smoke test.")] = False,
) -> None:
    """Distill a small detector on synthetic digits."""
    from detdistill.commands.demo import demo as run_demo

    run_demo(out=out, seeds=seed or (0,), fast=fast)
