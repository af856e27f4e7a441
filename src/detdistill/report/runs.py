"""The parts of a report that are in the runs' folders: curves, and the main number by class."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from detdistill.report.charts import Chart, Key, Line, bar_chart, key_of, line_chart, signed
from detdistill.report.page import Cell, Section, Table
from detdistill.report.source import TEACHER_COLOR, Subject, result_of, rows_of
from detdistill.training.run_folder import Row
from detdistill.visualization.plots import COLORS

BINS = 60  # points of a curve with a value for each step, each the mean of the steps in between
DOTTED = 40  # points that can be marked
CLASSES = 24  # that are drawn; the table has them all

Curve = tuple[list[float], list[float]]
"""Steps and values."""


def curve_section(subject: Subject) -> Section:
    """How the runs went: of a comparison the arms side by side, of one run all its terms."""
    rows = {
        name: {seed: found for seed, run in runs.items() if (found := rows_of(run))}
        for name, runs in subject.runs.items()
    }
    if len(rows) == 1:
        own = next((found for seeds in rows.values() for found in seeds.values()), [])
        charts = _charts_of_one(own, subject.comparison.metric)
    else:
        charts = _charts_of_arms(rows, subject)
    notes = () if charts else ("no run has metrics to draw",)
    return Section("Training", notes=notes, charts=tuple(charts))


def _charts_of_one(rows: Sequence[Row], metric: str) -> list[Chart]:
    names = dict.fromkeys(name for row in rows for name in row)
    losses = {n.removeprefix("loss/"): _binned(_curve(rows, n)) for n in names if n.split("/")[0] == "loss"}
    scores = {n: _curve(rows, n, 100) for n in dict.fromkeys((metric, "AP50", "AP75"))}
    share = {"share": _binned(_curve(rows, "distill_share", 100))}
    charts = []
    for title, curves in (
        ("Loss", losses),
        (_title(metric), scores),
        ("Distillation's share of the loss, %", share),
    ):
        there = {name: curve for name, curve in curves.items() if any(curve[1])}
        lines = [
            Line(name, *curve, i % len(COLORS), dashed=i >= len(COLORS), dots=_few(curve))
            for i, (name, curve) in enumerate(there.items())
        ]
        if any(len(line.x) > 1 for line in lines):
            charts.append(_chart(title, lines, log=curves is losses))
    return charts


def _charts_of_arms(rows: Mapping[str, Mapping[int, list[Row]]], subject: Subject) -> list[Chart]:
    """The mean over the seeds, strong, and each seed, thin."""
    metric, baseline = subject.comparison.metric, subject.comparison.arms[0].name
    logged = {name for found in rows[baseline].values() for row in found for name in row}
    terms = {name for name in logged if name.startswith("loss/")}
    scores = {n: [_curve(found, metric, 100) for found in seeds.values()] for n, seeds in rows.items()}
    losses = {n: [_binned(_task_loss(found, terms)) for found in seeds.values()] for n, seeds in rows.items()}
    charts = []
    for title, arms, caption in (
        (_title(metric), scores, "Strong: the mean over the seeds, with its last value. Thin: each seed."),
        ("Loss of the task", losses, "Without the methods' own terms, so that the arms can be compared."),
    ):
        thin, strong = [], []
        for name, all_curves in arms.items():
            color, dashed = subject.colors[name]
            curves = [curve for curve in all_curves if curve[0]]
            if len(curves) > 1:
                thin += [Line(f"{name}, one seed", *curve, color, thin=True) for curve in curves]
            if curves:
                mean = _mean_curve(curves)
                strong.append(Line(name, *mean, color, dashed=dashed, dots=arms is scores and _few(mean)))
        if any(len(line.x) > 1 for line in strong):  # one evaluation is no curve, and is in the table
            charts.append(_chart(title, strong, thin, log=arms is losses, caption=caption))
    return charts


def _title(metric: str) -> str:
    return f"{metric} on the validation images, × 100"


def _chart(
    title: str, lines: Sequence[Line], thin: Sequence[Line] = (), *, log: bool = False, caption: str = ""
) -> Chart:
    last = [f"{line.y[-1]:.3g}" if log else f"{line.y[-1]:.1f}" for line in lines]
    said = ", ".join(f"{line.name} {value}" for line, value in zip(lines, last, strict=True))
    keys = tuple(key_of(line, value) for line, value in zip(lines, last, strict=True))
    svg = line_chart([*thin, *lines], f"{title}, over the steps; last: {said}", log=log)
    return Chart(title, svg, keys, caption)


def _curve(rows: Sequence[Row], name: str, factor: float = 1.0) -> Curve:
    pairs = [(row["step"], factor * row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [float(step) for step, _ in pairs], [value for _, value in pairs]


def _task_loss(rows: Sequence[Row], terms: set[str]) -> Curve:
    """The sum of the baseline's terms; of a baseline without any, the loss."""
    sums = [{"step": row["step"], "loss": sum(row[t] for t in terms)} for row in rows if terms <= row.keys()]
    return _curve(sums if terms else rows, "loss")


def _binned(curve: Curve) -> Curve:
    bins = min(BINS, len(curve[0]))
    if not bins:
        return curve
    steps, values = ([float(part.mean()) for part in np.array_split(of, bins)] for of in curve)
    return steps, values


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over the seeds at the steps that all have; the first seed where there are none."""
    tables = [dict(zip(*curve, strict=True)) for curve in curves]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    if not common:
        return curves[0]
    return common, [statistics.fmean(table[step] for table in tables) for step in common]


def _few(curve: Curve) -> bool:
    return len(curve[0]) <= DOTTED


def class_section(subject: Subject) -> Section:
    """The main number by class: the baseline, distilled, and the teacher."""
    base, best = subject.comparison.arms[0], subject.best
    sides = {base.name: (0, _by_class(subject.runs[base.name].values()))}
    if best is not None:
        sides[best.name] = (1, _by_class(subject.runs[best.name].values()))
    if subject.teacher is not None:
        sides["teacher"] = (TEACHER_COLOR, _by_class([subject.teacher]))
    notes = tuple(f"{name}: no result by class" for name, (_, values) in sides.items() if not values)
    sides = {name: side for name, side in sides.items() if side[1]}
    names = list(dict.fromkeys(name for _, values in sides.values() for name in values))
    if not names:
        return Section("By class", notes=notes)
    values = {side: [own.get(name, math.nan) for name in names] for side, (_, own) in sides.items()}
    changes = [math.nan] * len(names)
    if best is not None and {base.name, best.name} <= sides.keys():
        changes = [after - before for before, after in zip(values[base.name], values[best.name], strict=True)]
    main = next((result["main"] for run in subject.shown.values() if (result := result_of(run))), "AP")
    title = f"{main.removeprefix('m')} by class, × 100"  # a class has no mean over classes
    compared = any(map(math.isfinite, changes))
    drawn = _largest(changes if compared else values[next(iter(values))])
    chart = bar_chart(
        [names[i] for i in drawn],
        [(side, color, [values[side][i] for i in drawn]) for side, (color, _) in sides.items()],
        f"{title}: {', '.join(sides)}",
    )
    keys = tuple(Key(f"c{color}", side) for side, (color, _) in sides.items())
    which = "that change most" if compared else f"with the highest {main.removeprefix('m')}"
    order = ["Bars stand in the order of the legend."] if len(sides) > 1 else []
    some = [] if len(drawn) == len(names) else [f"The {len(drawn)} of {len(names)} classes {which}."]
    caption = " ".join([*some, *order])
    rows = tuple(
        (Cell(name), *(_cell(of[i]) for of in values.values()), _cell(changes[i], signs=True))
        for i, name in enumerate(names)
    )
    table = Table("All classes", ("class", *sides, "change"), rows, folded=True)
    text = () if best is None else (f"Means over the seeds of {base.name} and {best.name}.",)
    return Section("By class", text, notes, charts=(Chart(title, chart, keys, caption),), tables=(table,))


def _by_class(runs: Iterable[Path]) -> dict[str, float]:
    """In points, the mean over runs."""
    found: dict[str, list[float]] = {}
    for run in runs:
        result = result_of(run)
        for name, value in ((result or {}).get("per_class") or {}).items():
            found.setdefault(name, []).append(math.nan if value is None else 100 * value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _largest(values: Sequence[float]) -> list[int]:
    """Places of the classes to draw, in their own order."""
    sizes = [-abs(value) if math.isfinite(value) else 0.0 for value in values]
    return sorted(sorted(range(len(sizes)), key=sizes.__getitem__)[:CLASSES])


def _cell(value: float, signs: bool = False) -> Cell:
    if math.isnan(value):
        return Cell("")
    return Cell(signed(value) if signs else f"{value:.1f}", round(value, 4))
