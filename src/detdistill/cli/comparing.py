"""Verbs that compare: methods, values of a setting, parts of IMA, teachers, costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detdistill.cli.app import (
    USER_ERROR,
    AllowUnequal,
    Device,
    Devices,
    Jobs,
    Overrides,
    RecipeFile,
    Seeds,
    TableOnly,
    WriteReport,
    app,
)

if TYPE_CHECKING:
    from detdistill.comparison.result import Comparison
    from detdistill.comparison.study import Study


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe with a teacher, or a study file.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[METHOD]... [KEY=VALUE]...", help="More methods, and settings for all arms."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Arms: none (the baseline) and methods, as --methods none mimic ima."),
    ] = None,
    seeds: Seeds = 3,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. Default: runs/compare/RECIPE.")] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Overrides the recipe's teacher: a run, a file, or a recipe to train first."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric to compare. Default: AP, or mIoU for segmentation.")
    ] = None,
    jobs: Jobs = 1,
    device: Devices = None,
    allow_unequal: AllowUnequal = False,
    table: TableOnly = False,
    report: WriteReport = True,
) -> None:
    """Compare methods with the baseline over several seeds."""
    from detdistill.cli.printing import say
    from detdistill.comparison.compare import compare as compare_methods

    words = words or []
    comparison = compare_methods(
        recipe,
        [*(methods or []), *(word for word in words if "=" not in word)],
        seeds=seeds,
        overrides=[word for word in words if "=" in word],
        teacher=teacher,
        out=out,
        jobs=jobs,
        devices=device or (),
        metric=metric,
        allow_unequal=allow_unequal,
        train=not table,
        say=say,
    )
    _tell(comparison, report and not table, device)


@app.command()
def sweep(
    recipe: RecipeFile,
    context: Annotated[
        str,
        typer.Argument(metavar="KEY=A,B,C", help="As distill.weight=0.1,1,10 or methods.ima.options.alpha=…"),
    ],
    overrides: Overrides = None,
    seeds: Seeds = 3,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. Default: runs/sweep/RECIPE.")] = None,
    jobs: Jobs = 1,
    device: Devices = None,
    allow_unequal: AllowUnequal = False,
    table: TableOnly = False,
    report: WriteReport = True,
) -> None:
    """Compare values of one setting, as a loss weight."""
    from detdistill.comparison import study as studies

    key, _, values = context.partition("=")
    folder = out or Path("runs/sweep") / f"{recipe.stem}-{key}"
    study = studies.plan_sweep(
        recipe, key, [v for v in values.split(",") if v], overrides or (), range(seeds), folder
    )
    _run_study(study, jobs, device, allow_unequal, table, report)


@app.command()
def ablate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    seeds: Seeds = 3,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. Default: runs/ablate/RECIPE.")] = None,
    jobs: Jobs = 1,
    device: Devices = None,
    table: TableOnly = False,
    report: WriteReport = True,
) -> None:
    """Compare IMA with parts of it switched off."""
    from detdistill.comparison import study as studies

    folder = out or Path("runs/ablate") / recipe.stem
    study = studies.plan_ablation(recipe, overrides or (), range(seeds), folder)
    _run_study(study, jobs, device, False, table, report)


def _run_study(
    study: Study, jobs: int, devices: Sequence[str] | None, allow_unequal: bool, table: bool, report: bool
) -> None:
    from detdistill.cli.printing import say
    from detdistill.comparison.compare import run_study

    comparison = run_study(
        study, jobs=jobs, devices=devices or (), allow_unequal=allow_unequal, train=not table, say=say
    )
    _tell(comparison, report and not table, devices)


def _tell(comparison: Comparison, report: bool, devices: Sequence[str] | None) -> None:
    from detdistill.cli.printing import print_comparison, say
    from detdistill.report.report import try_report

    print_comparison(comparison)
    if report:
        try_report(comparison.study.out, say, device=devices[0].partition(",")[0] if devices else "auto")
    if any(arm.failed for arm in comparison.arms):
        raise typer.Exit(USER_ERROR)


@app.command()
def analyze(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, or a comparison's folder.")],
    baseline: Annotated[Path | None, typer.Option(help="The baseline run, to show what changed.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="The teacher's run.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for analysis.json. Default: RUN/analysis.")] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum score for the comparison of single images.")
    ] = 0.3,
    batch_size: Annotated[int, typer.Option(min=1, max=65536)] = 8,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Data loading processes.")] = 2,
    device: Device = "auto",
) -> None:
    """Show error types, and what distillation changed."""
    from detdistill.cli.printing import print_analysis, progress_bar, say
    from detdistill.comparison.analysis import analyze as analyze_runs

    with progress_bar("detecting") as progress:
        analysis = analyze_runs(
            run, baseline=baseline, teacher=teacher, out=out, threshold=threshold, batch_size=batch_size,
            workers=workers, device=device, progress=progress,
        )  # fmt: skip
    print_analysis(analysis)
    say(f"analysis.json: {out or run / 'analysis'}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a comparison or a run.")],
    baseline: Annotated[Path | None, typer.Option(help="For a run: its baseline run.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="The teacher's run. Default: the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output file. Default: FOLDER/report.html.")] = None,
    models: Annotated[
        bool, typer.Option("--models/--no-models", help="Run the models for error types, pictures and cost.")
    ] = True,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Minimum score of detections shown.")] = 0.3,
    batch_size: Annotated[int, typer.Option(min=1, max=65536)] = 8,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Data loading processes.")] = 2,
    device: Device = "auto",
) -> None:
    """Write an HTML report of a comparison or a run."""
    from detdistill.cli.printing import progress_bar, say
    from detdistill.report.report import write_report

    with progress_bar("detecting") as progress:
        file = write_report(
            folder, baseline=baseline, teacher=teacher, out=out, models=models, threshold=threshold,
            batch_size=batch_size, workers=workers, device=device, progress=progress,
        )  # fmt: skip
    say(f"report: {file}")


@app.command()
def rank_teachers(
    recipe: RecipeFile,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEACHER]... [KEY=VALUE]...", help="Run folders or weights files, and settings."
        ),
    ] = None,
    teachers: Annotated[list[str] | None, typer.Option(help="Candidates, as --teachers A B C.")] = None,
    student: Annotated[Path | None, typer.Option(help="The recipe's trained baseline, if any.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Validation images for the feature comparison.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate on this many images only.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=10**6, help="Timed steps for each teacher.")] = 5,
    device: Device = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers to this JSON file.")
    ] = None,
) -> None:
    """Rank candidate teachers before a long run."""
    from dataclasses import asdict

    from detdistill.recipe import load_recipe

    settings = load_recipe(recipe, [word for word in words or [] if "=" in word])

    from detdistill.cli.printing import print_ranking, say, write_json
    from detdistill.commands.rank_teachers import rank_teachers as rank
    from detdistill.output import output_json

    if json_file is not None:
        output_json(json_file, "--json", dict)
    names = [*(teachers or []), *(word for word in words or [] if "=" not in word)]
    ranking = rank(
        settings, names, student=student, images=images, limit=limit, rounds=rounds, device=device, say=say
    )
    if json_file is not None:
        write_json(json_file, {**asdict(ranking), "recommendation": ranking.recommendation})
    print_ranking(ranking)
    if ranking.refused:
        raise typer.Exit(USER_ERROR)


@app.command()
def benchmark(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Run folders, weights files, recipes.")
    ],
    size: Annotated[tuple[int, int] | None, typer.Option(help="Image height and width.")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=65536, help="Batch size for throughput and memory.")
    ] = 1,
    runs: Annotated[int, typer.Option(min=1, max=10**6, help="Timed runs for each model.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, max=10**6, help="Warmup runs, not timed.")] = 3,
    device: Device = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers to this JSON file.")
    ] = None,
) -> None:
    """Measure parameters, FLOPs, latency and memory of models."""
    from dataclasses import asdict

    from detdistill.cli.printing import print_efficiency, write_json
    from detdistill.commands.benchmark import benchmark as measure
    from detdistill.output import output_json

    if json_file is not None:
        output_json(json_file, "--json", dict)
    costs = measure(models, size=size, runs=runs, warmup=warmup, batch_size=batch_size, device=device)
    if json_file is not None:
        write_json(json_file, {name: asdict(cost) for name, cost in costs.items()})
    print_efficiency(costs, runs, warmup)
