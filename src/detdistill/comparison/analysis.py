"""``analyze``: what kinds of error a teacher, a baseline and a distilled one make on the same images.

What a run detects on the images is kept in its folder (``detections.json``, COCO results, beside a stamp of the
weights and images they came from), so that a model is run once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detdistill.comparison.result import load_comparison
from detdistill.data.records import Split
from detdistill.data.text import read_file
from detdistill.errors import UserError
from detdistill.evaluation.coco import CocoResult, coco_ap, coco_results, ids_in_results
from detdistill.evaluation.detector import evaluate_detector
from detdistill.evaluation.difference import ImageDifference, counts, difference
from detdistill.evaluation.errors import (
    AREAS,
    KINDS,
    RECALLS,
    ErrorCurves,
    TideErrors,
    error_curves,
    supercategories_of,
    tide_errors,
)
from detdistill.evaluation.evaluate import as_detector, choose_device, open_split
from detdistill.models.checkpoints.weights import file_hash, find_weights
from detdistill.output import output_path
from detdistill.training.run_folder import RunFolder, write_atomically
from detdistill.visualization.gallery import save_differences
from detdistill.visualization.plots import plot_errors

Progress = Callable[[int, int], None]
Found = list[dict[str, NDArray[Any]]]
DRAWN_CLASSES = 12  # rows of the figure of classes; analysis.json has them all
DETECTIONS, STAMP = "detections.json", "detections.stamp.json"


@dataclass(frozen=True)
class ModelErrors:
    """One model's numbers on the split.

    Attributes:
        role: ``teacher``, ``baseline`` or ``distilled``; ``run`` where a single run was given.
        run: its folder.
        coco, curves, tide: AP, the decomposition of precision, TIDE's errors.
    """

    role: str
    run: Path
    coco: CocoResult
    curves: ErrorCurves
    tide: TideErrors


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyze` says; :meth:`as_dict` is the content of ``analysis.json`` (docs/analysis.md)."""

    split: Split
    models: tuple[ModelErrors, ...]
    differences: tuple[ImageDifference, ...] | None
    threshold: float

    @property
    def changes(self) -> dict[str, int]:
        """How many objects were found and lost, and false alarms are new and gone; empty without a pair."""
        return {} if self.differences is None else counts(self.differences)

    def as_dict(self) -> dict[str, Any]:
        split = self.split
        return {
            "format": 1,
            "split": {
                "name": split.name,
                "source": str(split.source),
                "images": len(split),
                "classes": list(split.classes),
            },
            "kinds": list(KINDS),
            "recalls": [round(float(recall), 2) for recall in RECALLS],
            "models": [_model_dict(model) for model in self.models],
            "difference": None if self.differences is None else self._difference_dict(self.differences),
        }

    def _difference_dict(self, differences: tuple[ImageDifference, ...]) -> dict[str, Any]:
        records = self.split.records
        images = []
        for image in differences:
            record = records[image.index]
            changes = [
                {
                    "kind": change.kind,
                    "class": self.split.classes[change.label],
                    "box": [round(value, 2) for value in change.box],
                    "score": _number(change.score),
                    "area": _number(change.area),
                }
                for change in image.changes
            ]
            images.append({
                "image_id": record.image_id, "path": str(record.path), "height": record.height,
                "width": record.width, "changes": changes,
            })  # fmt: skip
        return {"threshold": self.threshold, "iou": 0.5, "counts": self.changes, "images": images}


def analyze(
    run: Path | str,
    *,
    baseline: Path | str | None = None,
    teacher: Path | str | None = None,
    out: Path | str | None = None,
    threshold: float = 0.3,
    batch_size: int = 8,
    workers: int = 2,
    device: str = "auto",
    progress: Progress | None = None,
) -> Analysis:
    """Take the errors of finished runs apart, on the validation images of the first.

    Args:
        run: a run's folder, or that of a comparison: then its baseline and, of the first seed that both have
            finished, its best arm are taken.
        baseline: the run of the student without distillation: what changed from it is listed image by image.
        teacher: the teacher's run.
        out: where ``analysis.json``, ``errors.png``, ``errors_by_class.png`` and ``difference.png`` go;
            ``RUN/analysis`` by default.
        threshold: least score of the detections that are compared image by image.
        batch_size, workers, device: of the detection, for runs whose detections are not kept yet.
        progress: called after each batch with (images done, images in all), for each such run.

    Raises:
        UserError: a folder is no finished run, the runs have other images or classes, or there are no images.
    """
    run = Path(run)
    folder = output_path(out) if out is not None else run / "analysis"
    if (run / "comparison.json").is_file():
        of_comparison, run = _from_comparison(run)
        baseline = baseline or of_comparison
    runs = {
        "teacher": teacher and Path(teacher),
        "baseline": baseline and Path(baseline),
        "distilled" if baseline or teacher else "run": run,
    }
    given = {role: path for role, path in runs.items() if path}
    for path in given.values():
        _require_finished(path)
    split = open_split(run, "val")
    if not split.records:
        raise UserError(f"{split.source}: split {split.name!r} has no images to analyze; check its file")
    if baseline:
        _require_same(split, open_split(Path(baseline), "val"), run, Path(baseline))
    found = {
        role: detections_of(
            path, split, batch_size=batch_size, workers=workers, device=device, progress=progress
        )
        for role, path in given.items()
    }
    groups = supercategories_of(split)
    models = tuple(
        ModelErrors(
            role,
            path,
            coco_ap(split, found[role]),
            error_curves(split, found[role], groups),
            tide_errors(split, found[role]),
        )
        for role, path in given.items()
    )
    changed = None
    if baseline:
        changed = tuple(difference(split, found["baseline"], found["distilled"], threshold=threshold))
    analysis = Analysis(split, models, changed, threshold)
    folder.mkdir(parents=True, exist_ok=True)
    _draw(analysis, folder)
    if changed:
        save_differences(split, changed, folder / "difference.png")
    write_atomically(folder / "analysis.json", json.dumps(analysis.as_dict(), allow_nan=False) + "\n")
    return analysis


def _draw(analysis: Analysis, folder: Path) -> None:
    """The models side by side: over all classes, and for each of those with the most objects."""
    curves = {model.role: model.curves for model in analysis.models}
    objects = np.zeros(len(analysis.split.classes), dtype=np.int64)
    for record in analysis.split.records:
        np.add.at(objects, np.asarray(record.labels_K), 1)
    most = [int(label) for label in np.argsort(-objects, kind="stable")[:DRAWN_CLASSES] if objects[label]]
    if not most:
        return
    plot_errors(curves, folder / "errors.png")
    plot_errors(curves, folder / "errors_by_class.png", [analysis.split.classes[label] for label in most])


def detections_of(
    run: Path,
    split: Split,
    *,
    batch_size: int = 8,
    workers: int = 2,
    device: str = "auto",
    progress: Progress | None = None,
) -> Found:
    """What a run's student detects on a split, from its folder where it is kept there, else computed and kept.

    Raises:
        UserError: no such weights, or no class in common.
    """
    stamp = {"weights": file_hash(find_weights(run)), "images": _images_hash(split)}
    kept = _kept(run, split, stamp)
    if kept is not None:
        return kept
    evaluation = evaluate_detector(
        as_detector(run, "analyze"), split, batch_size=batch_size, workers=workers,
        device=choose_device(device), progress=progress,
    )  # fmt: skip
    found = [{name: value.numpy() for name, value in one.items()} for one in evaluation.detections]
    text = json.dumps(coco_results(split, evaluation.detections))
    (run / STAMP).unlink(missing_ok=True)  # from here on, until it is written anew, nothing is kept
    write_atomically(run / DETECTIONS, text)
    stamp["detections"] = hashlib.sha256(text.encode()).hexdigest()
    write_atomically(run / STAMP, json.dumps(stamp, indent=1) + "\n")
    return found


def _kept(run: Path, split: Split, stamp: Mapping[str, str]) -> Found | None:
    """The detections in a run's folder, if they are of these weights and images and as they were written."""
    try:
        of_kept = json.loads(read_file(run / STAMP))
        content = read_file(run / DETECTIONS)
    except (UserError, ValueError, RecursionError):
        return None
    if of_kept != {**stamp, "detections": hashlib.sha256(content).hexdigest()}:
        return None
    label = {category: i for i, category in enumerate(ids_in_results(split.classes, split.category_ids))}
    by_image: dict[int | str, list[Any]] = {record.image_id: [] for record in split.records}
    for row in json.loads(content):
        by_image[row["image_id"]].append(row)
    found: Found = []
    for rows in by_image.values():
        boxes_K4 = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        boxes_K4[:, 2:] += boxes_K4[:, :2]
        found.append({
            "boxes": boxes_K4.astype(np.float32),
            "labels": np.array([label[row["category_id"]] for row in rows], dtype=np.int64),
            "scores": np.array([row["score"] for row in rows], dtype=np.float32),
        })  # fmt: skip
    return found


def _from_comparison(folder: Path) -> tuple[Path, Path]:
    """The baseline's run and the best arm's, of the first seed that it and another arm have finished."""
    comparison, runs = load_comparison(folder)
    base, *others = comparison.arms
    for seed in comparison.study.seeds:
        values = {arm.name: arm.points(comparison.metric).get(seed, math.nan) for arm in others}
        finished = {name: value for name, value in values.items() if math.isfinite(value)}
        if seed in runs[base.name] and finished:
            best = max(finished, key=finished.__getitem__)
            return runs[base.name][seed], runs[best][seed]
    raise UserError(f"{folder}: no seed was finished by {base.name!r} and another arm; go on with it")


def _require_finished(run: Path) -> None:
    result = RunFolder(run).result()
    if not RunFolder(run).recipe_file.is_file():
        raise UserError(f"{run}: no run folder (it has no recipe.yaml); give the folder that `train` wrote")
    if result is None:
        raise UserError(f"{run}: not finished (it has no result.json); go on with `detdistill train`")


def _require_same(split: Split, other: Split, run: Path, baseline: Path) -> None:
    if split.classes != other.classes:
        raise UserError(f"{run} and {baseline} have other classes: give runs of one dataset")
    if [record.path.resolve() for record in split.records] != [r.path.resolve() for r in other.records]:
        raise UserError(f"{run} and {baseline} have other validation images: give runs of one dataset")


def _images_hash(split: Split) -> str:
    """Of what detections depend on: classes, ids, and the images' files (name, size, time of change)."""
    told: list[Any] = [split.classes, split.category_ids]
    for record in split.records:
        state = record.path.stat()
        told.append([record.image_id, record.path.name, state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _model_dict(model: ModelErrors) -> dict[str, Any]:
    curves = model.curves
    return {
        "role": model.role,
        "run": str(model.run),
        "numbers": {name: _number(value) for name, value in model.coco.as_dict().items()},
        "per_class": {name: _number(value) for name, value in model.coco.per_class.items()},
        "tide": asdict(model.tide),
        "similar": curves.has_similar,
        "curves": {
            "all": {area: _curves(curves, area) for area in AREAS},
            "per_class": {name: _curves(curves, "all", name) for name in curves.classes},
        },
        "under": {
            "all": {area: _numbers(curves.under(area)) for area in AREAS},
            "per_class": {
                name: {area: _numbers(curves.under(area, name)) for area in AREAS} for name in curves.classes
            },
        },
    }


def _curves(curves: ErrorCurves, area: str, name: str | None = None) -> dict[str, list[float]] | None:
    """Precision at each recall, by kind; None where there is no object."""
    values = {kind: curves.curve(kind, area, name) for kind in KINDS}
    if np.isnan(values["FN"]).any():
        return None
    return {kind: [round(float(precision), 4) for precision in curve] for kind, curve in values.items()}


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: float) -> float | None:
    """As JSON has it: NaN, where there was nothing to measure, as null."""
    return round(float(value), 5) if math.isfinite(value) else None
