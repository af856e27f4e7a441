"""``report``: a comparison or a run as one HTML file, to be read by people (docs/report.md).

What is in the folders is told; what needs the models (kinds of error, pictures, cost) is computed where they
and the data are still there. What is missing is said in its place, and the rest is shown.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detdistill import __version__
from detdistill.comparison.result import Arm, Comparison
from detdistill.data.text import read_text
from detdistill.errors import UserError
from detdistill.evaluation.paired import Paired
from detdistill.output import output_file
from detdistill.report.charts import Chart, interval_chart, signed
from detdistill.report.models import model_sections
from detdistill.report.page import Cell, Code, Page, Section, Table, write_page
from detdistill.report.runs import class_section, curve_section
from detdistill.report.source import Subject, json_of, read_subject, result_of, rows_of

FOLDED_FROM = 12  # lines of commands

Progress = Callable[[int, int], None]


def write_report(
    folder: Path | str,
    *,
    baseline: Path | str | None = None,
    teacher: Path | str | None = None,
    out: Path | str | None = None,
    models: bool = True,
    threshold: float = 0.3,
    batch_size: int = 8,
    workers: int = 2,
    device: str = "auto",
    progress: Progress | None = None,
) -> Path:
    """Write what is known of a comparison or a run as one HTML file that needs nothing else.

    Args:
        folder: a comparison's (``compare``, ``sweep``, ``ablate``, ``demo``), or a run's.
        baseline: the run of the student without distillation, to compare a single run with.
        teacher: the teacher's run; default: the one that the recipes name.
        out: the file, which ends in .html; default: ``FOLDER/report.html``.
        models: run the models where their detections are not kept yet, and measure what they cost. Without, the
            report has neither kinds of error nor pictures of detections.
        threshold: least score of the detections that are drawn and compared.
        batch_size, workers, device: of the detection.
        progress: called after each batch with (images done, images in all).

    Returns:
        The file.

    Raises:
        UserError: the folder is neither, a run that was named is none, or the file is not .html.
    """
    folder = Path(folder)
    file = folder / "report.html" if out is None else output_file(out)
    if file.suffix.lower() not in (".html", ".htm") and not (file.exists() and not file.is_file()):
        raise UserError(f"{file}: give the report a name that ends in .html")
    subject = read_subject(
        folder, None if baseline is None else Path(baseline), None if teacher is None else Path(teacher)
    )
    sections = [*_result_sections(subject), curve_section(subject), class_section(subject)]
    if models:
        sections += model_sections(
            subject, folder, threshold=threshold, batch_size=batch_size, workers=workers, device=device,
            progress=progress,
        )  # fmt: skip
    sections += [_recipe_section(subject), _machine_section(subject), _commands_section(subject, folder)]
    headline, findings = _verdict(subject)
    page = Page(
        title=folder.resolve().name,
        headline=headline,
        findings=findings,
        warnings=_warnings(subject),
        notes=subject.notes,
        sections=[section for section in sections if section is not None],
        foot=f"Written by detdistill {__version__}. docs/report.md says how to read it.",
    )
    write_page(page, file)
    return file


def try_report(folder: Path, say: Callable[[str], None], **options: Any) -> None:
    """Write the report of what has just been finished; whatever goes wrong is a warning, in one line."""
    try:
        say(f"report: {write_report(folder, **options)}")
    except Exception as error:  # the runs are finished: nothing here may make them fail
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"warning: no report ({reason}); try `detdistill report {shlex.quote(str(folder))}`")


def _verdict(subject: Subject) -> tuple[str, tuple[str, ...]]:
    """The result in a sentence, and what there is to add."""
    comparison, best = subject.comparison, subject.best
    base, metric = comparison.arms[0], comparison.metric
    if len(comparison.arms) == 1:
        value = base.mean(metric)
        if math.isnan(value):
            return f"{base.name} has no result yet", _last_evaluation(subject)
        return f"{base.name}: {value:.1f} {metric}", _teacher_gap(subject, base, None)
    if best is None or best.paired is None:
        return "Nothing to compare yet: no seed has been finished by the baseline and another arm", ()
    seeds = best.paired.differences
    before, after = (statistics.fmean(arm.points(metric)[seed] for seed in seeds) for arm in (base, best))
    gain = f"{signed(best.paired.mean)} {metric}, from {before:.1f} to {after:.1f}"
    if comparison.unfair:
        other = "under another budget" if comparison.study.unequal else "with another teacher"
        headline = f"Not a fair comparison: {best.name} has {gain}, {other}"
    else:
        headline = {
            "better": f"{best.name} is better than {base.name}: {gain}",
            "worse": f"{best.name} is worse than {base.name}: {gain}",
            "no measurable gain": f"No measurable gain: {best.name} has {gain}; chance explains that, too",
            "two seeds cannot tell": f"Two seeds cannot tell: {best.name} has {gain}",
            "one seed: no verdict": f"One seed, no verdict: {best.name} has {gain}",
        }[best.paired.verdict]
    findings = [_finding(arm, arm.paired, base.name, metric) for arm in comparison.arms if arm.paired]
    others = sum(arm.paired is not None for arm in comparison.arms)
    if others > 1:
        findings.append(
            f"{best.name} was chosen from {others} arms after the fact: expect a little less of it next time."
        )
    return headline, (*findings, *_teacher_gap(subject, best, base))


def _last_evaluation(subject: Subject) -> tuple[str, ...]:
    """How far a run has come that is not finished."""
    rows = [row for run in subject.shown.values() for row in rows_of(run)]
    scores = [(row["step"], name, row[name]) for row in rows for name in ("AP", "mIoU") if name in row]
    if scores:
        step, name, value = scores[-1]
        return (f"Its last evaluation, at step {step:g}: {100 * value:.1f} {name}.",)
    return (f"It has come to step {rows[-1]['step']:g}, without an evaluation.",) if rows else ()


def _finding(arm: Arm, against: Paired, base: str, metric: str) -> str:
    said = f"{against.verdict} than {base}" if against.verdict in ("better", "worse") else against.verdict
    count = len(against.differences)
    seeds = f"{count} seed{'s' * (count > 1)}"
    if against.interval is None:
        return f"{arm.name}: {said}; {signed(against.mean)} {metric}."
    low, high = against.interval
    between = f"95% interval {signed(low)} to {signed(high)}"
    return f"{arm.name}: {said}; {signed(against.mean)} {metric}, {between}, {seeds}."


def _teacher_gap(subject: Subject, arm: Arm, base: Arm | None) -> tuple[str, ...]:
    """Where the teacher is, and how much of the way to it was made."""
    metric = subject.comparison.metric
    result = result_of(subject.teacher) if subject.teacher is not None else None
    taught = 100 * result["metrics"].get(metric, math.nan) if result is not None else math.nan
    if math.isnan(taught):
        return ()
    said = f"The teacher has {taught:.1f} {metric}"
    if base is not None:
        gap = taught - base.mean(metric)
        if gap > 0:
            part = (arm.mean(metric) - base.mean(metric)) / gap
            return (f"{said}: {arm.name} goes {part:.0%} of the way to it from {base.name}.",)
    return (f"{said}.",)


def _warnings(subject: Subject) -> tuple[str, ...]:
    comparison = subject.comparison
    start = comparison.study.unequal_start
    told = [*comparison.unfair, *([start] if start else [])]
    return tuple(
        f"{why[:1].upper()}{why[1:]}: a difference between the arms need not be the method's." for why in told
    )


def _result_sections(subject: Subject) -> list[Section]:
    comparison = subject.comparison
    metric, seeds = comparison.metric, comparison.study.seeds
    if len(comparison.arms) == 1:
        table = _metrics_table(subject, folded=False)
        return [Section("Results", tables=(table,))] if table.rows else []
    rows = []
    for arm in comparison.arms:
        points = arm.points(metric)
        cells = [_cell(points.get(seed), "failed" if seed in arm.failed else "") for seed in seeds]
        minutes = arm.mean("minutes") / 100  # means are in points
        cells += [_cell(arm.mean(metric)), *_paired_cells(arm), _cell(minutes)]
        rows.append((Cell(arm.name), *cells))
    columns = (
        "arm", *(f"seed {seed}" for seed in seeds), "mean", "difference", "95% interval", "wins", "verdict",
        "minutes",
    )  # fmt: skip
    table = Table(
        f"{metric} by arm and seed", columns, tuple(rows),
        f"{metric} × 100 of each run's last weights. The difference is the mean over the seeds of arm − "
        f"{comparison.arms[0].name}, with its 95% interval (Student's t); minutes are of training.",
    )  # fmt: skip
    compared = [
        (arm.name, arm.paired.mean, arm.paired.interval) for arm in comparison.arms if arm.paired is not None
    ]
    charts: tuple[Chart, ...] = ()
    if compared:
        said = "; ".join(f"{name} {signed(mean)}" for name, mean, _ in compared)
        charts = (
            Chart(
                f"Difference in {metric} from {comparison.arms[0].name}, × 100",
                interval_chart(compared, f"Paired differences in {metric}: {said}"),
                caption="Mean and 95% interval. An interval that reaches 0 claims nothing.",
            ),
        )
    return [Section("Results", charts=charts, tables=(table, _metrics_table(subject, folded=True)))]


def _paired_cells(arm: Arm) -> list[Cell]:
    if arm.paired is None:
        return [Cell("")] * 4
    won, of = sum(d > 0 for d in arm.paired.differences.values()), len(arm.paired.differences)
    ends = arm.paired.interval
    between = Cell("") if ends is None else Cell(f"{signed(ends[0])} to {signed(ends[1])}", ends[0])
    mean = Cell(signed(arm.paired.mean), arm.paired.mean)
    return [mean, between, Cell(f"{won}/{of}", won / of), Cell(arm.paired.verdict)]


def _metrics_table(subject: Subject, folded: bool) -> Table:
    """Every metric of the results, mean over the seeds; the teacher's as a last row."""
    comparison = subject.comparison
    names = list(
        dict.fromkeys(name for arm in comparison.arms for numbers in arm.metrics.values() for name in numbers)
    )
    names = [
        name for name in names if name not in ("minutes", "steps")
        and not all(math.isnan(arm.mean(name)) for arm in comparison.arms)
    ]  # fmt: skip
    rows = [
        (Cell(arm.name), *(_cell(arm.mean(name)) for name in names)) for arm in comparison.arms if arm.metrics
    ]
    result = result_of(subject.teacher) if subject.teacher is not None else None
    if result is not None:
        numbers = result["metrics"]
        rows.append((Cell("teacher"), *(_cell(100 * numbers.get(name, math.nan)) for name in names)))
    return Table("Every metric, × 100, mean over the seeds", ("arm", *names), tuple(rows), folded=folded)


def _cell(value: float | None, otherwise: str = "") -> Cell:
    if value is None or math.isnan(value):
        return Cell(otherwise)
    return Cell(f"{value:.1f}", round(value, 4))


def _recipe_section(subject: Subject) -> Section:
    codes = []
    study = subject.comparison.study
    for role, run in subject.shown.items():
        try:
            text = read_text(run / "recipe.yaml")
        except UserError:
            continue
        codes.append(Code(f"{run}/recipe.yaml ({role})", text, folded=True))
    laid = "\n".join(f"{name}: {shlex.join(changes)}" for name, changes in study.arms.items() if changes)
    if laid:
        codes.insert(0, Code(f"Each arm is {study.recipe} with these settings", laid))
    notes = () if codes else ("no recipe.yaml could be read",)
    return Section(
        "Recipe", ("Every setting, defaults spelled out.",) if codes else (), notes, codes=tuple(codes)
    )


def _machine_section(subject: Subject) -> Section:
    run = next(iter(reversed(subject.shown.values())), None)
    told = json_of(run / "environment.json") if run is not None else {}
    packages = told.pop("packages", None)
    told.pop("command", None)
    facts = {key: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in told.items() if v}
    if isinstance(packages, dict):
        facts |= {str(name): str(version) for name, version in packages.items()}
    if not facts:
        return Section("Machine", notes=("no environment.json could be read",))
    rows = tuple((Cell(key), Cell(value)) for key, value in facts.items())
    return Section("Machine", tables=(Table(f"Where {run} ran", ("what", "value"), rows),))


def _commands_section(subject: Subject, folder: Path) -> Section:
    comparison, runs = subject.comparison, subject.runs
    study = comparison.study
    lines = []
    for name, changes in study.arms.items():
        for seed, run in runs[name].items():
            recipe = str(study.recipe if changes else run / "recipe.yaml")
            told = [*changes, f"training.seed={seed}"] if changes else []
            again = run.with_name(f"{run.name}-again")
            lines.append(shlex.join(["detdistill", "train", recipe, *told, "--out", str(again)]))
    codes = [Code("Every run, into a folder beside it", "\n".join(lines), folded=len(lines) > FOLDED_FROM)]
    if comparison.command is not None:
        codes.insert(0, Code("All of it, with the teachers above", comparison.command))
    taught = dict.fromkeys(teacher.run for teacher in comparison.teachers if teacher.run is not None)
    if taught:
        trainings = (["detdistill", "train", f"{of}/recipe.yaml", "--out", f"{of}-again"] for of in taught)
        codes.insert(0, Code("The teacher", "\n".join(map(shlex.join, trainings))))
    command = ["detdistill", "report", str(folder)]
    if len(comparison.arms) == 2 and not any(study.arms.values()):
        command += ["--baseline", str(subject.shown["baseline"])] if "baseline" in subject.shown else []
    if subject.teacher is not None:
        command += ["--teacher", str(subject.teacher)]
    codes.append(Code("This page", shlex.join(command)))
    text = (
        "With the versions above, on the same kind of machine, these commands give these numbers again. Paths "
        "are those of the folder in which the comparison was started.",
    )
    tables = (_teachers_table(comparison),) if comparison.teachers else ()
    return Section("Reproduce", text, tables=tables, codes=tuple(codes))


def _teachers_table(comparison: Comparison) -> Table:
    metric = comparison.metric
    rows = tuple(
        (
            Cell(teacher.weights),
            Cell(", ".join(teacher.arms)),
            _cell(100 * teacher.metrics.get(metric, math.nan), "?"),
            Cell(teacher.sha256 or "?"),
        )
        for teacher in comparison.teachers
    )
    caption = "The numbers of a teacher are those of its run, where that is still here with the same weights."
    return Table(
        "Teachers", ("weights", "of the arms", f"{metric} × 100", "SHA-256 of the file"), rows, caption
    )
