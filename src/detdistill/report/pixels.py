"""What a report shows of segmenters: which class is taken for which, and label maps side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from detdistill.comparison.study import BASELINE
from detdistill.data.loading import DetectionDataset
from detdistill.evaluation.segmentation import SegmentationEvaluation, evaluate_segmenter
from detdistill.models.base import Segmenter
from detdistill.report.page import Cell, Section, Slide, Table, number
from detdistill.report.pictures import draw_pairs
from detdistill.visualization.drawing import class_color

MISTAKES = 15
TRUTH, FOUND = "ground truth", "found"


def mistakes_section(found: Mapping[str, SegmentationEvaluation], notes: tuple[str, ...]) -> Section:
    """Which class is taken for which, and how much of each class is found.

    Args:
        found: by role, of one split; the last is the one that the report is about.
        notes: what is missing.
    """
    subject = list(found.values())[-1] if BASELINE not in found else found[BASELINE]
    split = subject.split
    shares = {role: _shares(one.confusion) for role, one in found.items()}
    names = (*split.classes, "a class that the data do not have")
    rows = []
    for true, given in _commonest_mistakes(subject.confusion):
        own = (number(100 * float(of[true, given])) for of in shares.values())
        rows.append((Cell(f"{split.classes[true]} as {names[given]}"), *own))
    per_class = []
    for q, name in enumerate(split.classes):
        recalls = (number(100 * float(of[q, q])) for of in shares.values())
        precisions = (number(100 * _precision(one.confusion, q)) for one in found.values())
        per_class.append(
            (Cell(name), *(cell for both in zip(recalls, precisions, strict=True) for cell in both))
        )
    return Section(
        "Kinds of error",
        (
            f"On {len(split)} validation images. Of the pixels of a class, so many in a hundred are taken for "
            f"another one: the {len(rows)} mistakes of which {'the baseline' if BASELINE in found else 'it'} "
            "makes most, by pixels.",
        ),
        notes,
        tables=(
            Table("Which class is taken for which, % of its pixels", ("mistake", *found), tuple(rows)),
            Table(
                "Of each class, % of its pixels found, and % of those found that are right",
                ("class", *(f"{role}, {what}" for role in found for what in ("found", "right"))),
                tuple(per_class),
                folded=True,
            ),
        ),
    )


def label_map_section(
    models: Mapping[str, Segmenter],
    found: Mapping[str, SegmentationEvaluation],
    *,
    most: int,
    batch_size: int,
    workers: int,
) -> Section:
    """Pictures of the baseline and the distilled one, or of truth and answer.

    Args:
        models, found: by role, without the teacher: what answers, and how it did on the split.
        most: number of images.
        batch_size, workers: for the images to show, which are looked at once more.
    """
    split = next(iter(found.values())).split
    accuracies = [100 * one.image_accuracies for one in found.values()]
    chosen = _most_telling(accuracies, most)
    part = replace(split, records=split.records.take(chosen))
    maps = [
        evaluate_segmenter(model, part, batch_size=batch_size, workers=workers, keep=len(chosen)).label_maps
        for model in models.values()
    ]
    sides = (TRUTH, FOUND) if len(maps) == 1 else tuple(models)
    drawn = []
    images = DetectionDataset(part, None)
    for i in range(len(part)):
        image, truth = images[i]
        answers = [{"semantic": of[i]} for of in maps]
        drawn.append((image, truth if len(maps) == 1 else answers[0], answers[-1]))
    slides = tuple(
        Slide(record.path.name, _caption([float(of[i]) for of in accuracies]), pair)
        for record, i, pair in zip(part.records, chosen, draw_pairs(drawn, split.classes), strict=False)
    )
    first = "those on which the two differ most" if len(maps) > 1 else "the worst"
    text = f"{len(slides)} of {len(split)} validation images, {first} first, by the share of right pixels."
    swatches = tuple((class_color(label), name) for label, name in enumerate(split.classes))
    return Section("Pictures", (text,), sides=(sides[0], sides[-1]), slides=slides, swatches=swatches)


def _commonest_mistakes(confusion: Tensor) -> list[tuple[int, int]]:
    """(true, given) of the most pixels first, as far as there are any."""
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    columns = wrong.shape[1]
    order = wrong.flatten().argsort(descending=True, stable=True)[:MISTAKES].tolist()
    return [divmod(place, columns) for place in order if wrong.flatten()[place] > 0]


def _shares(confusion: Tensor) -> Tensor:
    """Of each true class's pixels, the share given to each class; NaN where there are none."""
    return confusion.double() / confusion.sum(dim=1, keepdim=True)


def _precision(confusion: Tensor, label: int) -> float:
    given = int(confusion[:, label].sum())
    return int(confusion[label, label]) / given if given else math.nan


def _most_telling(accuracies: Sequence[Tensor], most: int) -> list[int]:
    """Places of images: where the two differ most, or where the one is worst; unlabeled images last."""
    merit_N = (accuracies[-1] - accuracies[0]).abs() if len(accuracies) > 1 else -accuracies[0]
    merit_N = torch.where(merit_N.isnan(), -math.inf, merit_N)
    order: list[int] = merit_N.argsort(descending=True, stable=True)[:most].tolist()
    return order


def _caption(accuracies: Sequence[float]) -> str:
    if any(map(math.isnan, accuracies)):
        return "no pixel has a label"
    return " → ".join(f"{value:.1f}" for value in accuracies) + "% of the pixels right"
