"""The parts of a report for which models are run: kinds of error, pictures, cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detdistill.comparison.analysis import Analysis, ModelErrors, analyze, detections_of
from detdistill.comparison.result import DAMAGED
from detdistill.comparison.study import BASELINE
from detdistill.data.loading import DetectionDataset
from detdistill.data.records import Split
from detdistill.errors import UserError
from detdistill.evaluation.efficiency import efficiency
from detdistill.evaluation.errors import KINDS, RECALLS, TideErrors
from detdistill.evaluation.evaluate import as_model, choose_device, open_split
from detdistill.evaluation.measure import device_of
from detdistill.evaluation.segmentation import SegmentationEvaluation, evaluate_segmenter
from detdistill.models.base import Detections, Model, Segmenter, eval_mode
from detdistill.report.charts import Chart, Key, Line, error_chart, key_of, line_chart
from detdistill.report.page import Cell, Picture, Section, Slide, Table, number
from detdistill.report.pictures import draw_pairs, shrunk
from detdistill.report.pixels import label_map_section, mistakes_section
from detdistill.report.source import DISTILLED, TEACHER_COLOR, Subject

PICTURES = 24
COLORS_OF = {BASELINE: 0, "run": 0, DISTILLED: 1, "teacher": TEACHER_COLOR}
TIMED_RUNS, WARMUP = 5, 1
COSTS = "costs.json"  # of `detdistill benchmark --json`, beside the runs
FAILURES = (UserError, RuntimeError, *DAMAGED)
"""What is raised where a model, its data or a picture is gone or damaged: told as a note."""
MEANING = {
    "C75": "overlap ≥ 0.75", "C50": "overlap ≥ 0.50", "Loc": "inexact places", "Sim": "alike classes",
    "Oth": "other classes", "BG": "false alarms", "FN": "missed objects",
}  # fmt: skip

Progress = Callable[[int, int], None]


def model_sections(
    subject: Subject,
    folder: Path,
    *,
    threshold: float,
    batch_size: int,
    workers: int,
    device: str,
    progress: Progress | None,
) -> list[Section]:
    """Kinds of error and pictures of the runs shown, and what teacher and student cost."""
    shown = subject.shown
    if not shown:
        return [Section("Kinds of error", notes=("there is no finished run to look into",))]
    detecting: dict[str, Any] = {
        "batch_size": batch_size, "workers": workers, "device": device, "progress": progress,
    }  # fmt: skip
    run, baseline = next(reversed(shown.values())), shown.get(BASELINE)
    if _is_segmenter(run):
        return [*_pixel_sections(subject, detecting), _cost_section(subject, folder, run, device)]
    notes: tuple[str, ...] = ()
    analysis = None
    # The teacher may be of other classes, or its weights may be gone: then without it.
    for teacher in dict.fromkeys((subject.teacher, None)):
        try:
            analysis = analyze(
                run,
                baseline=baseline,
                teacher=teacher,
                out=folder / "analysis",
                threshold=threshold,
                **detecting,
            )
            break
        except FAILURES as error:
            notes = (_why(error),)
    sections = [Section("Kinds of error", notes=notes)]
    if analysis is not None:
        sections[0] = _error_section(analysis, notes)
    sections.append(_picture_section(analysis, shown, threshold, detecting))
    sections.append(_cost_section(subject, folder, run, device))
    return sections


def _is_segmenter(run: Path) -> bool:
    try:
        return isinstance(as_model(run), Segmenter)
    except FAILURES:  # told where the model is used
        return False


def _as_segmenter(run: Path) -> Segmenter:
    model = as_model(run)
    if not isinstance(model, Segmenter):
        raise UserError(f"{run}: is for {model.task}, and this report for segmentation")
    return model


def _pixel_sections(subject: Subject, detecting: dict[str, Any]) -> list[Section]:
    """Of segmenters: which classes are mistaken, and pictures of label maps."""
    how = {"batch_size": detecting["batch_size"], "workers": detecting["workers"]}
    models: dict[str, Segmenter] = {}
    found: dict[str, SegmentationEvaluation] = {}
    notes: tuple[str, ...] = ()
    try:
        device = choose_device(detecting["device"])
        split = open_split(next(reversed(subject.shown.values())), "val")
        for role, run in subject.shown.items():
            models[role] = _as_segmenter(run).to(device)
            found[role] = evaluate_segmenter(models[role], split, progress=detecting["progress"], **how)
    except FAILURES as error:
        return [Section("Kinds of error", notes=(_why(error),)), _samples_section(subject.shown)]
    told = dict(found)
    try:
        if subject.teacher is not None:
            teacher = _as_segmenter(subject.teacher).to(device)
            told = {
                "teacher": evaluate_segmenter(teacher, split, progress=detecting["progress"], **how),
                **found,
            }
    except FAILURES as error:  # it may be of other classes, or its weights may be gone
        notes = (_why(error),)
    return [mistakes_section(told, notes), label_map_section(models, found, most=PICTURES, **how)]


def _error_section(analysis: Analysis, notes: tuple[str, ...]) -> Section:
    models = analysis.models
    if np.isnan(models[0].curves.curve("FN")).any():
        nothing = "the validation images have no objects, so there are no errors to tell apart"
        return Section("Kinds of error", notes=(*notes, nothing))
    # Without supercategories no class is like another, and "Sim" has nothing to say.
    kinds = [kind for kind in KINDS if kind != "Sim" or models[0].curves.has_similar]
    costs = {model.role: _costs(model.curves.under()) for model in models}
    charts = [_precision_chart(models)]
    for model in models:
        own = {kind: f"{costs[model.role][kind]:.1f}" for kind in kinds}
        said = ", ".join(f"{MEANING[kind]} {value}" for kind, value in own.items())
        keys = tuple(Key(f"k{KINDS.index(kind)}", MEANING[kind], value) for kind, value in own.items())
        charts.append(Chart(f"What the errors cost: {model.role}", error_chart(model.curves, said), keys))
    told = kinds[2:]  # the first two are precision itself
    tables = (
        Table(
            "What each kind of error costs, in points of AP50",
            ("model", *(MEANING[kind] for kind in told)),
            tuple((Cell(role), *(number(own[kind]) for kind in told)) for role, own in costs.items()),
        ),
        Table(
            "TIDE: AP50 gained without one kind of error, and how many there are",
            ("model", *(name for kind in models[0].tide.dAP for name in (kind, f"{kind}, count"))),
            tuple((Cell(model.role), *_tide_cells(model.tide)) for model in models),
            folded=True,
        ),
    )
    text = [
        f"On {len(analysis.split)} validation images. "
        + "; ".join(f"{model.role} is {model.run}" for model in models)
        + ".",
        "Each area is what AP50 would gain if that kind of error were forgiven, after those below it; the "
        "legend names them from the bottom up, and the line is precision as it is.",
    ]
    if analysis.differences is not None:
        changes = analysis.changes
        text.append(
            f"From a score of {analysis.threshold:g} on, the distilled student finds {changes['found']} "
            f"objects that the baseline misses, and loses {changes['lost']}. Of false alarms, "
            f"{changes['new false alarm']} are new and {changes['gone false alarm']} are gone."
        )
    return Section("Kinds of error", tuple(text), notes, tuple(charts), tables)


def _precision_chart(models: Sequence[ModelErrors]) -> Chart:
    recall = (100 * RECALLS).tolist()
    lines = [
        Line(
            f"{model.role}, {MEANING[kind]}", recall, (100 * model.curves.curve(kind)).tolist(),
            COLORS_OF[model.role], dashed=kind == "C75",
        )
        for model in models for kind in ("C50", "C75")
    ]  # fmt: skip
    keys = tuple(key_of(line, f"{np.mean(line.y):.1f}") for line in lines)
    said = ", ".join(f"{key.name} {key.value}" for key in keys)
    svg = line_chart(lines, f"Areas: {said}", x_title="recall, %", limits=(0, 100, 0, 100))
    return Chart(
        "Precision over recall, %", svg, keys, "The number is the area under the line: AP at that overlap."
    )


def _tide_cells(tide: TideErrors) -> list[Cell]:
    """Gain and count of each kind."""
    return [
        cell
        for kind, gain in tide.dAP.items()
        for cell in (number(100 * gain), Cell(str(tide.counts[kind]), tide.counts[kind]))
    ]


def _costs(under: dict[str, float]) -> dict[str, float]:
    """The step of each area over the one before, in points; the first two are areas themselves."""
    points = [100 * value for value in under.values()]
    steps = [points[0], *(after - before for before, after in pairwise(points))]
    return dict(zip(under, steps, strict=True))


def _picture_section(
    analysis: Analysis | None, shown: dict[str, Path], threshold: float, detecting: dict[str, Any]
) -> Section:
    if analysis is None:
        return _samples_section(shown)
    split = analysis.split
    try:
        runs = {model.role: model.run for model in analysis.models if model.role != "teacher"}
        found = {role: detections_of(run, split, **detecting) for role, run in runs.items()}
        captions = _chosen(analysis)
        models = {role: as_model(run) for role, run in runs.items()}
        with_masks = all(model.needs_masks for model in models.values())
        if with_masks:
            split = open_split(analysis.models[-1].run, "val", with_masks=True)
        dataset = DetectionDataset(split, None, with_masks=with_masks)
        images, truths = zip(*(dataset[i] for i in captions), strict=True)
        if with_masks:  # which what was kept does not have
            device = choose_device(detecting["device"])
            answers = [_found_with_masks(model.to(device), images, threshold) for model in models.values()]
        else:
            answers = [
                [{name: torch.from_numpy(value) for name, value in of[i].items()} for i in captions]
                for of in found.values()
            ]
        sides = (BASELINE, DISTILLED) if analysis.differences is not None else ("ground truth", "found")
        first = answers[0] if BASELINE in sides else truths
        pairs = draw_pairs(zip(images, first, answers[-1], strict=True), split.classes, threshold=threshold)
        names = [split.records[i].path.name for i in captions]
    except FAILURES as error:
        return Section("Pictures", notes=(_why(error),))
    slides = tuple(
        Slide(name, caption, pair) for name, caption, pair in zip(names, captions.values(), pairs, strict=False)
    )
    differ = " that differ" if analysis.differences is not None else ""
    text = (
        f"{len(slides)} of {len(split)} validation images, those with the smallest objects{differ} first; "
        f"boxes from a score of {threshold:g} on."
    )
    nothing = all(not (one["scores"] >= threshold).any() for of in found.values() for one in of)
    notes = (f"nothing is detected with a score of {threshold:g}",) if nothing else ()
    return Section("Pictures", (text,), notes, sides=sides, slides=slides)


def _found_with_masks(model: Model, images: Sequence[Tensor], threshold: float) -> list[Detections]:
    """What a detector finds in each image, from this score on."""
    answers = []
    with eval_mode(model), torch.inference_mode():
        for image in images:
            (found,) = model([image.to(device_of(model))])
            kept_K = found["scores"] >= threshold
            answers.append({name: value[kept_K].cpu() for name, value in found.items()})
    return answers


def _chosen(analysis: Analysis) -> dict[int, str]:
    """Places of the images to show, with their captions: those that differ, then those with small objects."""
    chosen: dict[int, str] = {}
    for one in (analysis.differences or ())[:PICTURES]:
        counts = Counter(change.kind for change in one.changes)
        chosen[one.index] = ", ".join(f"{count} {_plural(kind, count)}" for kind, count in counts.items())
    records = analysis.split.records
    by_size = sorted(range(len(records)), key=lambda i: float(min(records[i].areas_K, default=math.inf)))
    for i in by_size:
        if len(chosen) == min(PICTURES, len(records)):
            break
        count = len(records[i].labels_K)
        same = "no difference" if analysis.differences is not None else f"{count} object{'s' * (count != 1)}"
        chosen.setdefault(i, same)
    return chosen


def _plural(kind: str, count: int) -> str:
    if "alarm" in kind:
        return kind + "s" * (count > 1)
    return f"object{'s' * (count > 1)} {'more' if kind == 'found' else 'lost'}"


def _samples_section(shown: dict[str, Path]) -> Section:
    """Where nothing can be detected any more, the pictures that the run has left."""
    for role, run in reversed(shown.items()):
        try:
            drawing = shrunk(run / "samples.png")
        except (OSError, ValueError):
            continue
        name = f"{role}: what the run has drawn when it was finished"
        return Section("Pictures", pictures=(Picture(name, drawing),))
    return Section("Pictures", notes=("the runs have no pictures",))


def _cost_section(subject: Subject, folder: Path, run: Path, device: str) -> Section:
    try:
        costs = _kept_costs(folder / COSTS) or _measured(subject, run, device)
    except FAILURES as error:
        return Section("Cost", notes=(_why(error),))
    columns = ("model", "M parameters", "G multiply-adds", "MB", "ms, median", "ms, 90%", "images/s")
    rows = tuple(
        (
            Cell(name),
            *(number(value, digits) for value, digits in zip(_cost_row(cost), (2, 2, 1, 1, 1, 1), strict=True)),
        )
        for name, cost in costs.items()
    )
    first = next(iter(costs.values()))
    height, width = first["size"]
    caption = (
        f"Of an image of {height} × {width} pixels, preprocessing and suppression included; {first['device']}. "
        "A busy machine is slower: `detdistill benchmark` measures with care."
    )
    text: tuple[str, ...] = ()
    if {"teacher", "student"} <= costs.keys():
        big, small = _cost_row(costs["teacher"]), _cost_row(costs["student"])
        text = (
            f"The student has {_times(big[0], small[0])} fewer parameters than its teacher, needs "
            f"{_times(big[1], small[1])} fewer multiply-adds, and answers {_times(big[3], small[3])} faster.",
        )
    return Section("Cost", text, tables=(Table("Cost of detecting", columns, rows, caption),))


def _measured(subject: Subject, run: Path, device: str) -> dict[str, Any]:
    where = choose_device(device)
    models = {"student": as_model(run).to(where)}
    if subject.teacher is not None:
        models = {"teacher": as_model(subject.teacher).to(where), **models}
    size = _image_size(open_split(run, "val"))
    return {
        name: asdict(cost) for name, cost in efficiency(models, size, runs=TIMED_RUNS, warmup=WARMUP).items()
    }


def _image_size(split: Split) -> tuple[int, int]:
    """(height, width) of the first image."""
    if not split.records:
        raise UserError(f"{split.source}: no images, so no size to measure the cost at")
    return split.records[0].height, split.records[0].width


def _kept_costs(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    costs: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for cost in costs.values():
        _cost_row(cost)  # raises where it is something else
    return costs


def _cost_row(cost: dict[str, Any]) -> list[float]:
    """NaN where an exported file, which keeps it to itself, was measured."""
    latency = {int(percentile): float(seconds) for percentile, seconds in cost["latency"].items()}
    counts = (
        math.nan if cost[name] is None else cost[name] / unit
        for name, unit in (("parameters", 1e6), ("macs", 1e9), ("checkpoint_bytes", 1e6))
    )
    return [*counts, 1000 * latency[50], 1000 * latency[90], cost["images_per_second"]]


def _times(big: float, small: float) -> str:
    return f"{big / small:.1f} times" if small > 0 else "many times"


def _why(error: BaseException) -> str:
    """An error in a line."""
    said: Sequence[str] = str(error).split()
    return " ".join(said) if isinstance(error, UserError) else f"{type(error).__name__}: {' '.join(said)}"
