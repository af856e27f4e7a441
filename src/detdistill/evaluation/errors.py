"""What a detector's errors are: COCO's decomposition of precision (Figure 2 of the paper) and TIDE's kinds.

The decomposition forgives one kind of error after another and looks at how precision rises (Hoiem et al. 2012;
``COCOanalyze``, cocodataset.org/#detection-eval). With AP(kind) for the area under each curve::

    C75   overlap of at least 0.75 is a hit          Oth   confusions with any other class are forgiven
    C50   overlap of at least 0.50                   BG    false alarms on background are forgiven: 1 as far as
    Loc   of at least 0.10: places are forgiven            the recall goes
    Sim   confusions with a class of the same        FN    missed objects, too: 1
          supercategory are forgiven

so that ``AP(Loc) - AP(C50)`` is what places cost, ``AP(FN) - AP(BG)`` what missed objects cost, and so on. A
confusion is forgiven by making the other classes' objects crowd of the class at hand, as MMDetection's analysis
does: a detection that lies on one by a tenth of its own area is neither hit nor false alarm. (COCO's Matlab
code forgives one detection for each such object.)

TIDE (Bolya et al. 2020, arXiv:2008.08115) gives each false alarm and each missed object one reason, and
measures what AP50 would gain without it. hotcoco computes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detdistill.data.records import Split
from detdistill.errors import UserError
from detdistill.evaluation.coco import coco_rows, coco_truth
from detdistill.evaluation.coco_library import Backend, evaluated, load_library
from detdistill.evaluation.detections import finite_detections

KINDS = ("C75", "C50", "Loc", "Sim", "Oth", "BG", "FN")
AREAS = ("all", "small", "medium", "large")
RECALLS = np.linspace(0, 1, 101)
TIDE_KINDS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
LOOSE = 0.1  # overlap that is enough where places are forgiven


@dataclass(frozen=True)
class ErrorCurves:
    """Precision over recall with one kind of error after another forgiven.

    Attributes:
        classes: names, in the order of the split.
        precision_KAQR: by ``KINDS``, ``AREAS``, class and ``RECALLS``, in [0, 1]; NaN where a class has no
            object of an area.
        has_similar: whether classes were given supercategories; else the curves Sim and Loc are the same.
    """

    classes: tuple[str, ...]
    precision_KAQR: NDArray[np.float64]
    has_similar: bool

    def curve(self, kind: str, area: str = "all", name: str | None = None) -> NDArray[np.float64]:
        """(101,) of one class, or the mean over the classes that have objects of that area."""
        curves_QR = self.precision_KAQR[KINDS.index(kind), AREAS.index(area)]
        if name is not None:
            return curves_QR[self.classes.index(name)]
        present_QR = curves_QR[~np.isnan(curves_QR).any(axis=1)]
        return present_QR.mean(axis=0) if len(present_QR) else np.full(len(RECALLS), np.nan)

    def under(self, area: str = "all", name: str | None = None) -> dict[str, float]:
        """The area under each curve, AP(kind), in [0, 1]; NaN where there is no object."""
        return {kind: float(self.curve(kind, area, name).mean()) for kind in KINDS}


@dataclass(frozen=True)
class TideErrors:
    """What AP50 would gain without one kind of error.

    Attributes:
        AP50: as it is, by TIDE's own count (a mean over the classes with objects).
        dAP: gain by ``TIDE_KINDS``, as if only errors of that kind were fixed; they do not add up to 1 - AP50.
        counts: errors of each kind.
    """

    AP50: float
    dAP: dict[str, float]
    counts: dict[str, int]


def error_curves(
    split: Split,
    detections: Sequence[Mapping[str, Any]],
    supercategories: Mapping[str, str] | None = None,
    backend: Backend | None = None,
) -> ErrorCurves:
    """Decompose precision by kinds of error.

    Args:
        split, detections: as :func:`~detdistill.evaluation.coco.coco_ap` takes them.
        supercategories: by name of class, see :func:`supercategories_of`; without them Sim equals Loc.
        backend: hotcoco where it is installed, else pycocotools, unless said.

    Raises:
        UserError: an empty split, or no evaluator installed.
        ValueError: not one detections for each record, or labels outside the classes.
    """
    library, truth, rows_D7 = _prepare(split, detections, backend)
    matched = _precision(evaluated(library, truth, rows_D7, thresholds=(0.75, 0.5, LOOSE)))
    absent_QA = np.isnan(matched[0, :, :, 0])  # (classes, areas)
    curves_KQAR = np.full((len(KINDS), *matched.shape[1:]), np.nan)
    curves_KQAR[:3] = matched
    for q, name in enumerate(split.classes):
        alike = {
            p + 1
            for p, other in enumerate(split.classes)
            if supercategories and supercategories.get(other) == supercategories.get(name, name)
        }
        own_rows = rows_D7[rows_D7[:, 6] == q + 1]
        everything = set(range(1, len(split.classes) + 1))
        curves_KQAR[4, q] = _forgiven(library, truth, own_rows, q + 1, everything)
        if alike == everything:
            curves_KQAR[3, q] = curves_KQAR[4, q]
        elif alike - {q + 1}:
            curves_KQAR[3, q] = _forgiven(library, truth, own_rows, q + 1, alike)
        else:
            curves_KQAR[3, q] = curves_KQAR[2, q]
    curves_KQAR[5] = curves_KQAR[4] > 0
    curves_KQAR[6] = 1
    curves_KQAR[:, absent_QA] = np.nan
    return ErrorCurves(split.classes, curves_KQAR.transpose(0, 2, 1, 3), bool(supercategories))


def tide_errors(split: Split, detections: Sequence[Mapping[str, Any]]) -> TideErrors:
    """TIDE's kinds of error at overlap 0.5 (a hit) and 0.1 (background below).

    Raises:
        UserError: an empty split, or hotcoco is not installed: pycocotools has no TIDE.
        ValueError: not one detections for each record, or labels outside the classes.
    """
    library, truth, rows_D7 = _prepare(split, detections, "hotcoco")
    found = evaluated(library, truth, rows_D7).tide_errors(pos_thr=0.5, bg_thr=LOOSE)
    return TideErrors(
        float(found["ap_base"]),
        {kind: float(found["delta_ap"][kind]) for kind in TIDE_KINDS},
        {kind: int(found["counts"][kind]) for kind in TIDE_KINDS},
    )


def supercategories_of(split: Split) -> dict[str, str] | None:
    """The supercategory of each class, where the split was read from COCO annotations that group its classes.

    A file whose classes all have one supercategory, or each its own, says nothing of likeness: None.
    """
    categories = _categories(split.source)
    found = {c["name"]: c["supercategory"] for c in categories if c.get("supercategory")}
    found = {name: found[name] for name in split.classes if name in found}
    kinds = len(set(found.values()))
    return found if 1 < kinds < len(found) else None


def _categories(source: Path) -> list[dict[str, Any]]:
    if source.suffix != ".json":
        return []
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # the split was read from it before: not ours to complain
    return list(content.get("categories", [])) if isinstance(content, dict) else []


def _prepare(
    split: Split, detections: Sequence[Mapping[str, Any]], backend: Backend | None
) -> tuple[ModuleType, dict[str, Any], NDArray[np.float64]]:
    if not split.records:
        raise UserError(f"{split.source}: split {split.name!r} has no images to analyze; check its file")
    usable = finite_detections(split, detections)
    return load_library(backend), coco_truth(split), coco_rows(usable)


def _forgiven(
    library: ModuleType,
    truth: Mapping[str, Any],
    own_rows: NDArray[np.float64],
    category: int,
    others: set[int],
) -> NDArray[np.float64]:
    """(areas, recalls) of one class with the objects of others as crowd of its own."""
    annotations = [
        one if one["category_id"] == category else {**one, "category_id": category, "iscrowd": 1}
        for one in truth["annotations"]
        if one["category_id"] == category or one["category_id"] in others
    ]
    categories = [one for one in truth["categories"] if one["id"] == category]
    own = {**truth, "annotations": annotations, "categories": categories}
    return _precision(evaluated(library, own, own_rows, thresholds=(LOOSE,)))[0, 0]


def _precision(evaluator: Any) -> NDArray[np.float64]:
    """(thresholds, classes, areas, recalls); NaN where undefined."""
    precision = np.asarray(evaluator.eval["precision"])[..., 0].transpose(0, 2, 3, 1)
    return np.where(precision < 0, math.nan, precision)
