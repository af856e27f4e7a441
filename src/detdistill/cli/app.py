"""The application, and the arguments that several commands take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130

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
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that override the recipe's.")
]
Weights = Annotated[
    Path, typer.Argument(metavar="WEIGHTS", help="A run folder, a .safetensors or an .onnx file.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        help="Devices for the runs, as --device cuda:0 --device cuda:1; cuda:0,1 is one run on both.",
    ),
]
Seeds = Annotated[int, typer.Option(min=1, max=1000, help="Number of seeds; a verdict needs at least 2.")]
Jobs = Annotated[int, typer.Option(min=1, max=1024, help="Parallel runs.")]
AllowUnequal = Annotated[
    bool, typer.Option("--allow-unequal", help="Allow arms with different budgets; the report says so.")
]
WriteReport = Annotated[
    bool, typer.Option("--report/--no-report", help="Write report.html, which runs up to three models.")
]
TableOnly = Annotated[bool, typer.Option("--table", help="Print finished results without training.")]


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
