"""The demo: a teacher, a baseline, and the same student with IMA, on generated digits.

Student and student-with-teacher share budget, initialization, data order and augmentation: they differ in one
thing. Nothing is stored beforehand; everything is trained while you wait.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from detdistill.comparison.compare import read_comparison
from detdistill.comparison.result import write_comparison
from detdistill.comparison.study import BASELINE, Study
from detdistill.data.loading import DetectionDataset, open_data
from detdistill.evaluation.detector import evaluate_detector
from detdistill.evaluation.evaluate import as_detector
from detdistill.models.checkpoints.io import load_model
from detdistill.output import output_path
from detdistill.recipe import Recipe, parse_recipe
from detdistill.report.report import try_report
from detdistill.report.source import DISTILLED
from detdistill.text import markdown_table
from detdistill.training.loop import TrainResult, train
from detdistill.training.run_folder import RunFolder, write_atomically
from detdistill.visualization.gallery import save_gallery
from detdistill.visualization.plots import plot_comparison

GALLERY_IMAGES = 6
COLUMNS = ("detector", "parameters", "AP", "AP50", "minutes")

TEACHER = {
    "family": "fcos", "backbone": "resnet18", "channels": 96, "head_depth": 2, "strides": [8, 16, 32],
}  # fmt: skip
STUDENT = {**TEACHER, "backbone": "mobilenetv3_small_050", "channels": 48}
TRAINING = {
    "batch_size": 8,
    "optimizer": {"name": "sgd", "nesterov": True},
    "schedule": {"name": "cosine", "warmup": 100},
    "augment": {"flip": 0.0, "photometric": True},  # a mirrored digit is another sign
    "precision": "auto",
    "workers": 0,
    "evaluate_every": 2,
}


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The three detectors of every seed.

    Attributes:
        teacher: the teacher's run.
        alone, distilled: the student's runs, by seed.
    """

    teacher: TrainResult
    baseline: dict[int, TrainResult]
    distilled: dict[int, TrainResult]

    @property
    def gains(self) -> list[float]:
        """Paired differences of AP, in points."""
        return [100 * (self.distilled[s].metrics["AP"] - self.baseline[s].metrics["AP"]) for s in self.baseline]


def demo(out: str | Path = "runs/demo", seeds: Sequence[int] = (0,), fast: bool = False) -> DemoResult:
    """Train teacher, baseline and distilled student, and write a table, curves and a gallery.

    Args:
        out: folder of the runs and pictures; an interrupted demo goes on where it stopped.
        seeds: the comparison is repeated with each.
        fast: a few steps only, to see that everything works; the numbers then mean nothing.
    """
    out = output_path(out)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print("1. A teacher: ResNet-18, trained on the digits")
    teacher = train(_recipe("teacher", TEACHER, epochs=12, lr=0.02, seed=0, fast=fast), out / "teacher")
    baseline, distilled = {}, {}
    for seed in seeds:
        console.print(f"2. The baseline (seed {seed})")
        recipe = _recipe("baseline", STUDENT, epochs=10, lr=0.04, seed=seed, fast=fast)
        baseline[seed] = train(recipe, out / BASELINE / str(seed))
        console.print(f"3. The same student with IMA (seed {seed})")
        taught = {"name": "distilled", "teacher": str(teacher.student), "methods": ["ima"]}
        distilled[seed] = train(
            parse_recipe({**recipe.model_dump(mode="json"), **taught}), out / DISTILLED / str(seed)
        )
    result = DemoResult(teacher, baseline, distilled)
    _show(console, result, out)
    _report(console, result, out)
    return result


def _recipe(name: str, model: dict[str, Any], *, epochs: int, lr: float, seed: int, fast: bool) -> Recipe:
    training = {**TRAINING, "epochs": epochs, "seed": seed, "optimizer": {**TRAINING["optimizer"], "lr": lr}}  # type: ignore[dict-item]
    data: dict[str, Any] = {"format": "digits"}
    if fast:
        training |= {"max_steps": 3, "evaluate_every": 0, "batch_size": 4}
        data |= {"train_size": 16, "val_size": 8, "image_size": 96}
    return parse_recipe({"name": name, "data": data, "student": model, "training": training})


def _rows(result: DemoResult) -> list[tuple[str, ...]]:
    runs = [("teacher", result.teacher)]
    for seed in result.baseline:
        runs.append((f"baseline, seed {seed}", result.baseline[seed]))
        runs.append((f"student + IMA, seed {seed}", result.distilled[seed]))
    rows: list[tuple[str, ...]] = []
    for name, run in runs:
        count = sum(p.numel() for p in load_model(run.student).parameters())
        m = run.metrics
        scores = (f"{100 * m['AP']:.1f}", f"{100 * m['AP50']:.1f}", f"{m['minutes']:.1f}")
        rows.append((name, f"{count / 1e6:.2f} M", *scores))
    return rows


def _show(console: Console, result: DemoResult, out: Path) -> None:
    first = next(iter(result.baseline))
    gains = result.gains
    verdict = f"IMA against the baseline, paired: {statistics.mean(gains):+.1f} AP" + (
        f" (seeds: {', '.join(f'{gain:+.1f}' for gain in gains)})" if len(gains) > 1 else ""
    )
    rows = _rows(result)
    write_atomically(out / "table.md", f"{markdown_table([COLUMNS, *rows])}\n\n{verdict}\n")
    runs = {"teacher": result.teacher, "baseline": result.baseline[first], "distilled": result.distilled[first]}
    plot_comparison({name: RunFolder(run.run).metrics() for name, run in runs.items()}, out / "curves.png")
    _gallery(runs, out / "gallery.png")

    table = Table(*COLUMNS)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    console.print(verdict)
    console.print(f"table.md, curves.png and gallery.png are in {out}", soft_wrap=True)


def _report(console: Console, result: DemoResult, out: Path) -> None:
    """``comparison.json``, as ``compare`` writes it, and the page made of it."""
    recipe = next(iter(result.baseline.values())).run / "recipe.yaml"
    taught = (f"teacher={result.teacher.student}", 'methods=["ima"]')
    study = Study(
        recipe, {BASELINE: ("teacher=null", "methods=[]"), DISTILLED: taught}, tuple(result.baseline), out
    )
    write_comparison(read_comparison(study))
    try_report(out, lambda line: console.print(line, soft_wrap=True))


def _gallery(runs: dict[str, TrainResult], out: Path) -> None:
    recipe = RunFolder(runs["teacher"].run).recipe()
    split = open_data(recipe.data)["val"]
    evaluations = {
        name: evaluate_detector(as_detector(run.student, "demo"), split, limit=GALLERY_IMAGES)
        for name, run in runs.items()
    }
    shown = next(iter(evaluations.values())).split
    images = DetectionDataset(shown, None)
    rows = []
    for i in range(len(shown)):
        image, target = images[i]
        row = {"ground truth": (image, target)}
        row |= {name: (image, evaluation.detections[i]) for name, evaluation in evaluations.items()}
        rows.append(row)
    save_gallery(rows, shown.classes, out)
