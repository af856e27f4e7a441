"""docs/pairs.md: which methods run on which pair of families, found out by building every pair.

python -m tests.distillation.table_of_pairs
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models import Preprocess, wrap
from detdistill.models.build import build_model
from detdistill.recipe.models import FAMILIES

from ..models.foreign_models import YoloLike, yolo_decode, yolo_losses
from .pairs import DETECTION

PAGE = Path(__file__).parents[2] / "docs" / "pairs.md"
SEGMENTERS = ("pspnet", "deeplabv3")
NAMES = (*(name for name in FAMILIES if name not in SEGMENTERS), "wrapped")
CLASSES = ("a", "b", "c")
SIZE = (64, 64)
QUERIES = ("rtdetr_v2", "d_fine")  # their widths are multiples of 32

HEAD = """\
# Who can teach whom

*Made by building every pair; `python -m tests.distillation.table_of_pairs` writes this page, a test checks it.*

Every ordered pair of families, student and teacher with the same classes and input size, each with its own
levels. `wrapped` is a foreign module with taps (`detdistill.wrap`); torchvision's RetinaNet and FCOS objects
count as `retinanet` and `fcos`. Two detectors may differ in more:

- **Input sizes.** Levels then meet by the part of the image that a cell covers, and maps are aligned with each
  other image by image. Regions of two-stage detectors (`kd`, `dist`, `defeat`) and `crosskd` follow. One-stage
  `kd` and `dist`, `ld`, `gid` and the scores of `frs` go cell by cell and want equal inputs.
- **Classes.** They meet by name, in any order. The teacher's other classes are left out, and those that it does
  not know are reported. Methods that compare classes need one that is shared.

`detdistill check` says of a recipe which levels meet, through what, and which classes are shared. Below, ✓ is a
pair that runs; a number is the line with which it is refused, in which … stands for a detector.
"""


def build(family, channels, size=SIZE, classes=CLASSES, seed=0, **options):
    """A small detector of a family, or of a foreign module."""
    torch.manual_seed(seed)
    preprocess = Preprocess(size)
    if family == "wrapped":
        model = YoloLike(channels, len(classes))
        taps = {8: "model.5", 16: "model.6", 32: "model.7"}
        return wrap(model, taps, preprocess, classes, losses=yolo_losses, decode=yolo_decode)
    if family in QUERIES:
        channels, options = 32 if channels <= 16 else 64, {"num_queries": 10, "head_depth": 1, **options}
    else:
        options = {"head_depth": 2, **options}
    model = build_model(family, classes, backbone="mobilenetv3_small_050", channels=channels, **options)
    model.preprocessor = preprocess
    return model


def refusal(method, student, teacher):
    """The line that refuses the pair, with … for the names of the two; None where it runs."""
    try:
        Pair(student, teacher, [method])
    except UserError as error:
        return re.sub(rf"\b({type(student).__name__}|{type(teacher).__name__})\b", "…", str(error))
    return None


def outcomes(students, teachers):
    """{method: {(student's family, teacher's): a refusal, or None}}."""
    return {
        method: {
            (s, t): refusal(method, student, teacher)
            for s, student in students.items()
            for t, teacher in teachers.items()
        }
        for method in DETECTION
    }


def page(found):
    """docs/pairs.md."""
    everywhere = [f"`{method}`" for method, cells in found.items() if not any(cells.values())]
    parts = [HEAD, f"## On every pair\n\n{', '.join(everywhere)}.\n"]
    for method, cells in found.items():
        lines = list(dict.fromkeys(line for line in cells.values() if line))
        if not lines:
            continue
        rows = [
            [f"`{s}`", *("✓" if cells[s, t] is None else str(1 + lines.index(cells[s, t])) for t in NAMES)]
            for s in NAMES
        ]
        table = [["student \\ teacher", *(f"`{name}`" for name in NAMES)], ["---"] * (len(NAMES) + 1), *rows]
        parts.append(
            f"## {method}\n\n"
            + "\n".join(f"| {' | '.join(row)} |" for row in table)
            + "\n\n"
            + "\n".join(f"{i}. {line}" for i, line in enumerate(lines, start=1))
            + "\n"
        )
    return "\n".join(parts)


def all_models():
    """Every family as a student, and as a wider teacher."""
    return tuple(
        {name: build(name, channels, seed=seed) for name in NAMES} for channels, seed in ((16, 0), (24, 1))
    )


if __name__ == "__main__":
    PAGE.write_text(page(outcomes(*all_models())), encoding="utf-8")
    print(PAGE)
