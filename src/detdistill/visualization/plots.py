"""Curves of one run, AP of several, and kinds of error, as PNG files."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from detdistill.errors import UserError
from detdistill.evaluation.errors import KINDS, RECALLS, ErrorCurves
from detdistill.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]
"""Rows with ``step`` and any of ``lr``, ``loss``, ``loss/TERM``, ``distill_share``, ``AP``, ``AP50``, …"""

INK, MUTED, GRID = "#22252b", "#6b7280", "#e5e7eb"
# Okabe and Ito's colors, that color-blind people tell apart, without the yellow that white paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F3C8D", "#4D4D4D")
# What each kind of error costs: pale where the detection was nearly right, strong where it was not there.
ERROR_COLORS = dict(
    zip(KINDS, ("#cbd5e1", "#94a3b8", "#56B4E9", "#E69F00", "#CC79A7", "#7F3C8D", "#D55E00"), strict=True)
)


def plot_curves(metrics: Metrics | Path | str, out: Path | str) -> None:
    """Draw loss terms, learning rate, the distillation's share of the loss and AP over the steps of a run.

    A panel without data is left out: that of the share, for example, where nothing is distilled.

    Args:
        metrics: the rows of a run, or its ``metrics.csv``; cells may be missing.
        out: a PNG (or PDF, SVG) file; its folder is made.

    Raises:
        UserError: the file cannot be read, or there is nothing to draw.
    """
    rows = _rows(metrics)
    panels: list[tuple[str, Callable[[Axes, Metrics], None]]] = []
    if _columns(rows, "loss"):
        panels.append(("Loss", _draw_losses))
    if _columns(rows, "AP"):
        panels.append(("Average precision on the validation images, %", _draw_ap))
    if _columns(rows, "mIoU"):
        panels.append(("Segmentation of the validation images, %", _draw_miou))
    if np.any(_series(rows, "distill_share")[1] > 0):
        panels.append(("Distillation's share of the loss, %", _draw_share))
    if _columns(rows, "lr"):
        panels.append(("Learning rate", _draw_lr))
    if not panels:
        raise UserError(f"{_name(metrics)}: no losses or AP to draw; train for longer")
    columns = min(2, len(panels))
    figure, axes = _figure(-(-len(panels) // columns), columns)
    for ax, (title, draw) in zip(axes, panels, strict=False):
        draw(ax, rows)
        _finish(ax, title)
    for ax in axes[len(panels) :]:
        ax.remove()
    _save(figure, out)


def plot_comparison(runs: Mapping[str, Metrics | Path | str], out: Path | str, metric: str = "AP") -> None:
    """Draw one metric of several runs over their steps; the legend says each run's last value.

    Args:
        runs: rows or ``metrics.csv`` by the run's name.
        metric: the column, in [0, 1].

    Raises:
        UserError: a file cannot be read, or no run was evaluated.
    """
    figure, (ax,) = _figure(1, 1)
    for i, (name, metrics) in enumerate(runs.items()):
        steps, values = _series(_rows(metrics), metric)
        if len(steps):
            label = f"{name}  {100 * values[-1]:.1f}"
            ax.plot(steps, 100 * values, "o-", color=_color(i), label=label, markersize=3.5, linewidth=1.8)
    if not ax.lines:
        raise UserError(f"no run of {', '.join(runs) or 'none'} has {metric}; evaluate at least once")
    ax.set_ylim(bottom=0)
    _legend(ax)
    _finish(ax, f"{metric} on the validation images, %")
    _save(figure, out)


def plot_errors(
    curves: Mapping[str, ErrorCurves], out: Path | str, classes: Sequence[str | None] = (None,)
) -> None:
    """Draw precision over recall with one kind of error after another forgiven (Figure 2 of the paper).

    A colored area is what its kind of error costs; the legend gives the area under each curve, in percent.

    Args:
        curves: by the model's name: a column each.
        out: a PNG (or PDF, SVG) file; its folder is made.
        classes: a row each; None is the mean over all.

    Raises:
        UserError: none of these classes has an object.
    """
    shown = [
        name for name in classes if not np.isnan(next(iter(curves.values())).curve("FN", "all", name)).any()
    ]
    if not shown:
        raise UserError("no class has objects, so there are no errors to draw; check the annotations")
    figure, axes = _figure(len(shown), len(curves))
    panels = [(name, model, curve) for name in shown for model, curve in curves.items()]
    for ax, (name, model, curve) in zip(axes, panels, strict=True):
        _draw_errors(ax, curve, name)
        _finish(ax, model if name is None else f"{name}, {model}", xlabel="recall, %")
    _save(figure, out)


def _draw_errors(ax: Axes, curves: ErrorCurves, name: str | None) -> None:
    recall, under = 100 * RECALLS, curves.under("all", name)
    below = np.zeros_like(recall)
    for kind in KINDS:
        above = 100 * curves.curve(kind, "all", name)
        # Loosening the overlap can take a hit away, so that a curve dips under the one before it.
        ax.fill_between(
            recall, below, np.maximum(above, below), label=f"{kind}  {100 * under[kind]:.1f}",
            facecolor=ERROR_COLORS[kind], linewidth=0,
        )  # fmt: skip
        below = np.maximum(above, below)
    ax.plot(recall, 100 * curves.curve("C50", "all", name), color=INK, linewidth=1.2)
    ax.set(xlim=(0, 100), ylim=(0, 100), ylabel="precision, %")
    ax.yaxis.label.set(color=MUTED, size=9)
    ax.legend(fontsize=9, labelcolor=INK, loc="lower left", framealpha=0.85, edgecolor="none")


def _draw_losses(ax: Axes, rows: Metrics) -> None:
    terms = [name for name in _columns(rows, "loss") if name != "loss"]
    for name in _columns(rows, "loss"):
        total = name == "loss"
        steps, values = _series(rows, name)
        color = INK if total else _color(terms.index(name))
        label = "total" if total else name.removeprefix("loss/")
        if len(steps) > 2 * _window(steps):
            ax.plot(steps, values, color=color, linewidth=0.6, alpha=0.25)
        ax.plot(steps, _running_mean(values), color=color, label=label, linewidth=2 if total else 1.4)
    lowest = min(_series(rows, name)[1].min() for name in _columns(rows, "loss"))
    if lowest > 0:  # terms differ by orders of magnitude
        ax.set_yscale("log")
        _plain_log_ticks(ax)
    _legend(ax)


def _draw_ap(ax: Axes, rows: Metrics) -> None:
    _draw_numbers(ax, rows, ("AP", "AP50", "AP75"))


def _draw_miou(ax: Axes, rows: Metrics) -> None:
    _draw_numbers(ax, rows, ("mIoU", "mean_accuracy", "pixel_accuracy"))


def _draw_numbers(ax: Axes, rows: Metrics, names: Sequence[str]) -> None:
    """Each over the steps; the best of the first is marked."""
    for i, name in enumerate(name for name in names if _columns(rows, name)):
        steps, values = _series(rows, name)
        ax.plot(
            steps,
            100 * values,
            "o-",
            color=_color(i),
            label=name.replace("_", " "),
            markersize=3.5,
            linewidth=1.8,
        )
        if name == names[0] and len(values):
            best = int(values.argmax())
            ax.annotate(
                f"best {100 * values[best]:.1f}", (steps[best], 100 * values[best]), (0, 7),
                textcoords="offset points", ha="center", color=_color(i), fontsize=9,
            )  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.margins(y=0.12)
    _legend(ax)


def _draw_share(ax: Axes, rows: Metrics) -> None:
    steps, values = _series(rows, "distill_share")
    if len(steps) > 2 * _window(steps):
        ax.plot(steps, 100 * values, color=COLORS[1], linewidth=0.6, alpha=0.25)
    ax.plot(steps, 100 * _running_mean(values), color=COLORS[1], linewidth=1.8)
    ax.set_ylim(0, 100)


def _draw_lr(ax: Axes, rows: Metrics) -> None:
    steps, values = _series(rows, "lr")
    ax.plot(steps, values, color=COLORS[0], linewidth=1.8)
    ax.set_ylim(bottom=0)


def _rows(metrics: Metrics | Path | str) -> Metrics:
    if not isinstance(metrics, Path | str):
        return metrics
    try:
        with Path(metrics).open(newline="", encoding="utf-8") as file:
            return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{metrics}: cannot be read as metrics ({error}); give a run's metrics.csv") from error


def _name(metrics: Metrics | Path | str) -> str:
    return str(metrics) if isinstance(metrics, Path | str) else "metrics"


def _columns(rows: Metrics, prefix: str) -> list[str]:
    """The columns ``prefix`` and ``prefix/…`` with a finite number in some row, in order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name.split("/")[0] == prefix and len(_series(rows, name)[0])]


def _series(rows: Metrics, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of the rows in which a column has a finite number."""
    pairs = [(row["step"], row[name]) for row in rows if _finite(row.get(name)) and _finite(row.get("step"))]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _window(values: NDArray[np.float64]) -> int:
    return max(1, len(values) // 40)


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the last few values; at the start, of as many as there are."""
    window = _window(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _figure(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # and not pyplot: no global state, no display

    figure = Figure(figsize=(6.2 * columns, 3.9 * rows), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _legend(ax: Axes) -> None:
    columns = 1 if len(ax.get_legend_handles_labels()[1]) <= 5 else 2
    ax.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=columns)


def _plain_log_ticks(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _finish(ax: Axes, title: str, xlabel: str = "step") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    ax.set_xlabel(xlabel, color=MUTED, fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    ax.tick_params(colors=MUTED, labelsize=9, which="both", length=0)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GRID)


def _save(figure: Figure, out: Path | str) -> None:
    save_figure(figure, out, dpi=130)


def save_figure(figure: Figure, out: Path | str, dpi: int) -> None:
    """Write a figure; its folder is made. Text is drawn as it is, also with a ``$``, which starts a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(printable(text.get_text()))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=dpi)
