"""What the commands print: tables and a bar on a terminal, the same as plain text elsewhere."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from detdistill.errors import UserError
from detdistill.output import output_file
from detdistill.text import printable

if TYPE_CHECKING:
    from detdistill.commands.check import Check
    from detdistill.commands.rank_teachers import TeacherRanking, TeacherScore
    from detdistill.comparison.analysis import Analysis
    from detdistill.comparison.result import Comparison
    from detdistill.evaluation.efficiency import Efficiency
    from detdistill.evaluation.measure import Evaluation

SHOWN_OF_A_KIND = 10
STYLES = {"error": "red", "warning": "yellow"}


def say(text: str, style: str | None = None) -> None:
    """A line of text, never cut or wrapped: it may be a path to copy."""
    Console(highlight=False, markup=False, emoji=False).print(
        printable(text, sys.stdout), style=style, soft_wrap=True
    )


def show(
    columns: Iterable[str], rows: Iterable[Iterable[Any]], text_columns: int = 1, whole: str | None = None
) -> None:
    """A table whose first columns are text, whose others are numbers; ``whole`` is one that is not wrapped."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=whole is not None)
    for i, column in enumerate(columns):
        side: Literal["left", "right"] = "left" if i < text_columns else "right"
        table.add_column(_cell(column), justify=side, overflow="fold", no_wrap=column == whole)
    for row in rows:
        table.add_row(*map(_cell, row))
    # A file or a pipe has no width, and a table there is not to be squeezed into 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cell(value: Any) -> Text:
    return Text(printable(str(value), sys.stdout))  # and not a string, which rich would search for markup


def first_line(docstring: str | None) -> str:
    """What a docstring says in short."""
    return (docstring or "").strip().partition("\n")[0]


def ratio(value: float | None, base: float | None) -> float:
    """``value / base``; NaN where either was not measured."""
    return math.nan if not value or not base else value / base


def percent(value: float) -> str:
    """A number in [0, 1] as papers print it; NaN, where there was nothing to measure, as a dash."""
    return "–" if math.isnan(value) else f"{value * 100:.1f}"


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, nothing elsewhere. Yields what takes (done, total)."""
    if not sys.stderr.isatty():
        yield None
        return
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(what, sys.stderr), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_evaluation(
    evaluation: Evaluation, numbers: Mapping[str, float], by_class: Mapping[str, float]
) -> None:
    """The numbers, the main one by class, and how fast it was."""
    from detdistill.evaluation.detector import DetectionEvaluation

    split = evaluation.split
    say(f"{split.name} of {split.source}: {len(split)} images")
    for kind, count in split.warning_counts().items():
        say(f"dropped or changed: {count} × {kind} (see `detdistill check`)")
    masks = {n.removeprefix("mask_"): value for n, value in numbers.items() if n.startswith("mask_")}
    boxes = {n: value for n, value in numbers.items() if n.removeprefix("mask_") == n}
    if masks and isinstance(evaluation, DetectionEvaluation) and evaluation.coco_masks is not None:
        rows = [(what, *map(percent, table.values())) for what, table in (("boxes", boxes), ("masks", masks))]
        show(("of", *boxes), rows)
        of_masks = evaluation.coco_masks.per_class
        show(("class", "AP", "mask AP"), [(n, percent(ap), percent(of_masks[n])) for n, ap in by_class.items()])
    else:
        show(boxes, [[percent(value) for value in boxes.values()]], text_columns=0)
        number = evaluation.main.removeprefix("m")  # a class has no mean over classes
        show(("class", number), [(n, percent(value)) for n, value in by_class.items()])
    for warning in evaluation.warnings():
        say(warning, style=STYLES["warning"])
    say(f"{evaluation.seconds:.1f} s, {evaluation.images_per_second:.1f} images/s with loading")


def print_check(result: Check) -> None:
    """What `check` found: data, models, levels, and the verdict."""
    for line in result.inspection.lines(SHOWN_OF_A_KIND) if result.inspection is not None else ():
        say(line, style=STYLES.get(line.partition(":")[0]))
    for note in result.notes:
        say(note)
    if result.models:
        rows = [
            (
                model.role,
                model.what,
                model.input,
                _levels(model.levels),
                f"{model.parameters / 1e6:.2f}",
                f"{model.learning / 1e6:.2f}",
            )
            for model in result.models
        ]
        columns = ("model", "what", "input", "channels at stride", "M parameters", "M learning")
        show(columns, rows, text_columns=4)
    if result.matching is not None:
        show(("student", "teacher", "between"), result.matching.rows(), text_columns=3)
    if result.classes is not None:
        for line in result.classes.lines():
            say(line)
    if result.step is not None:
        say(str(result.step))
    for problem in result.problems:
        say(f"error: {problem}", style=STYLES["error"])
    if result.ok:
        say("this recipe can run")
    else:
        count = len(result.problems) + (0 if result.inspection is None else len(result.inspection.errors))
        say(f"Found {count} error{'s' * (count != 1)}. Fix {'them' if count != 1 else 'it'} before training.")


def print_comparison(comparison: Comparison) -> None:
    """Arms by seeds, what each is worth against the baseline, and the verdict."""
    columns = list(comparison.columns())
    difference = len(columns) - 3
    columns[difference] = columns[difference].replace(" in ", "\nin ")  # as narrow as what stands below it
    show(columns, comparison.rows(), whole=columns[difference])
    say(
        f"{comparison.metric} × 100 of each run's last weights; difference: the mean over the seeds of arm - "
        f"{comparison.study.baseline}"
    )
    say(comparison.verdict)
    if any(arm.metrics for arm in comparison.arms):
        say(f"runs, table.md and comparison.json: {comparison.study.out}")


def print_analysis(analysis: Analysis) -> None:
    """AP, the kinds of error by COCO's decomposition and by TIDE, and what changed, all in points."""
    models = analysis.models
    numbers = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR100")
    rows = [(model.role, *(percent(getattr(model.coco, name)) for name in numbers)) for model in models]
    show(("model", *numbers), rows)
    under = [model.curves.under() for model in models]
    rows = [(m.role, *map(percent, areas.values())) for m, areas in zip(models, under, strict=True)]
    show(("area under precision", *under[0]), rows)
    rows = [(model.role, *map(percent, model.tide.dAP.values())) for model in models]
    show(("AP50 gained without", *models[0].tide.dAP), rows)
    if not models[0].curves.has_similar:
        say("the classes have no supercategories: Sim is Loc")
    if analysis.differences is not None:
        changed = [(kind, str(count)) for kind, count in analysis.changes.items()]
        show((f"distilled against the baseline, score ≥ {analysis.threshold:g}", "count"), changed)
        say(f"{len(analysis.differences)} of {len(analysis.split)} images differ")


def print_ranking(ranking: TeacherRanking) -> None:
    """Candidate teachers, best first, then those that cannot be used, and why; what is recommended."""
    columns: dict[str, Callable[[TeacherScore], str]] = {
        "what": lambda score: score.what,
        ranking.metric: lambda score: percent(score.quality),
        "over the student": lambda score: "–" if score.gap is None else f"{100 * score.gap:+.1f}",
        "CKA at the start": lambda score: _mean(score.cka_start),
        "CKA, trained": lambda score: _mean(score.cka_trained),
        "step": lambda score: f"× {score.step_cost:.2f}",
        "M parameters": lambda score: f"{score.parameters / 1e6:.2f}",
        "of the student's": lambda score: f"× {score.parameter_ratio:.1f}",
    }
    if ranking.student_quality is None:
        del columns["over the student"], columns["CKA, trained"]
    rows = [(score.teacher, *(cell(score) for cell in columns.values())) for score in ranking.scores]
    rows += [(teacher, "cannot be used", *"–" * (len(columns) - 1)) for teacher, _ in ranking.refused]
    show(("teacher", *columns), rows, text_columns=2)
    for teacher, why in ranking.refused:
        say(f"error: {why if teacher in why else f'{teacher}: {why}'}", style=STYLES["error"])
    say(f"CKA on {ranking.images} images; steps with {' + '.join(ranking.methods)}, over the baseline's")
    say(ranking.recommendation)


def print_efficiency(costs: Mapping[str, Efficiency], runs: int, warmup: int) -> None:
    """A row for each model; below each number its ratio to the first model's."""
    first = next(iter(costs.values()))
    rows: list[tuple[str, ...]] = []
    for name, cost in costs.items():
        rows.append((
            name, _in(1e6, cost.parameters, 2), _in(1e9, cost.macs, 2), _in(2**20, cost.peak_memory_bytes, 0),
            f"{1000 * cost.latency[50]:.1f}", f"{1000 * cost.latency[90]:.1f}", f"{cost.images_per_second:.1f}",
        ))  # fmt: skip
        if cost is not first:
            ratios = (
                ratio(cost.parameters, first.parameters), ratio(cost.macs, first.macs),
                ratio(cost.peak_memory_bytes, first.peak_memory_bytes),
                ratio(cost.latency[50], first.latency[50]),
                ratio(cost.latency[90], first.latency[90]),
                ratio(cost.images_per_second, first.images_per_second),
            )  # fmt: skip
            rows.append(("", *("–" if math.isnan(r) else f"× {r:.2f}" for r in ratios)))
    show(("model", "M parameters", "G multiply-adds", "peak MiB", "ms, median", "ms, 90%", "images/s"), rows)
    height, width = first.size
    say(
        f"{height} × {width} pixels, {first.device}; {runs} timed runs in turns after {warmup}; "
        f"images/s and memory with batches of {first.batch_size}"
    )


def _in(unit: float, value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"


def _mean(by_level: Mapping[int, float] | None) -> str:
    return "–" if by_level is None else f"{mean(by_level.values()):.3f}"


def _levels(levels: Mapping[int, int]) -> str:
    return "  ".join(f"{channels}@{stride}" for stride, channels in levels.items())


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """JSON for other programs; NaN, which JSON lacks, becomes null."""
    try:
        output_file(path).write_text(json.dumps(_without_nan(content), indent=1) + "\n", encoding="utf-8")
    except OSError as error:  # a full disk names no file
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
