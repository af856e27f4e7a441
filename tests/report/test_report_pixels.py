"""The report of segmenters: mistakes between classes, and label maps side by side."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

import detdistill
from detdistill.data.records import Split
from detdistill.evaluation.evaluate import open_split
from detdistill.evaluation.segmentation import SegmentationEvaluation
from detdistill.models import load_model
from detdistill.recipe import parse_recipe
from detdistill.report.pixels import mistakes_section
from detdistill.training.loop import train

CLASSES = ["road", "<b>sky</b>", "tree"]
HOW = {"device": "cpu", "workers": 0}


def write_data(root: Path, classes: list[str], split: str = "val", count: int = 3) -> Path:
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True)
    for i in range(count):
        labels_HW = rng.integers(0, 3, (6, 8), np.uint8).repeat(8, 0).repeat(8, 1)
        labels_HW[:5] = 255
        image = rng.integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(image).save(root / "images" / split / f"{i}.png")
        Image.fromarray(labels_HW).save(root / "labels" / split / f"{i}.png")
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    return root


def make_run(folder: Path, data: Path, seed: int = 0) -> Path:
    student = {"family": "pspnet", "backbone": "mobilenetv3_small_050", "channels": 8}
    training = {"max_steps": 1, "batch_size": 2, "evaluate_every": 0, "seed": seed, **HOW}
    train(parse_recipe({"data": str(data), "student": student, "training": training}), folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("segmenters")
    data = write_data(write_data(root / "data", CLASSES), CLASSES, "train")
    return make_run(root / "baseline", data, seed=0), make_run(root / "distilled", data, seed=1)


def section(page: str, anchor: str) -> str:
    return page[page.index(f'<section id="{anchor}"') :].partition("</section>")[0]


def rows_of(html: str) -> list[list[str]]:
    return [
        [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", html, flags=re.S)
    ]


def test_mistakes_are_those_of_the_models(runs: tuple[Path, Path], tmp_path: Path) -> None:
    baseline, distilled = runs
    file = detdistill.write_report(distilled, baseline=baseline, out=tmp_path / "report.html", **HOW)
    page = file.read_text(encoding="utf-8")
    found: dict[str, np.ndarray] = {}
    for run in runs:
        model, total = load_model(run).eval(), np.zeros((3, 3))
        for record in open_split(run, "val").records:
            image = torch.from_numpy(np.asarray(Image.open(record.path)).copy()).permute(2, 0, 1)
            true = np.asarray(Image.open(Path(str(record.path).replace("images", "labels"))))
            with torch.no_grad():
                given = model([image])[0]["semantic"].numpy()
            keep = true != 255
            total += confusion_matrix(true[keep], given[keep], labels=[0, 1, 2])
        found[run.name] = total
    rows = {row[0]: row[1:] for row in rows_of(section(page, "kinds-of-error"))}
    assert rows["mistake"] == ["baseline", "distilled"]
    mistakes = {name: row for name, row in rows.items() if " as " in name}
    wrong = found["baseline"] * (1 - np.eye(3))
    assert len(mistakes) == (wrong > 0).sum()
    pixels = []
    for name, row in mistakes.items():
        true, given = map(CLASSES.index, name.split(" as "))
        pixels.append(wrong[true, given])
        for said, of in zip(row, found.values(), strict=True):
            assert float(said) == pytest.approx(100 * of[true, given] / of[true].sum(), abs=0.06)
    assert pixels == sorted(pixels, reverse=True)


def test_label_maps_side_by_side(runs: tuple[Path, Path], tmp_path: Path) -> None:
    baseline, distilled = runs
    file = detdistill.write_report(distilled, baseline=baseline, out=tmp_path / "report.html", **HOW)
    pictures = section(file.read_text(encoding="utf-8"), "pictures")
    assert pictures.count('<figure class="slide">') == 3
    assert pictures.count("<span>baseline</span>") == pictures.count("<span>distilled</span>") == 3
    assert "&lt;b&gt;sky&lt;/b&gt;" in pictures
    assert "<b>sky" not in pictures
    changes = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) → ([\d.]+)% of the pixels", pictures)]
    assert len(changes) == 3
    assert [abs(a - b) for a, b in changes] == sorted((abs(a - b) for a, b in changes), reverse=True)


def test_a_single_run_is_held_against_the_truth(runs: tuple[Path, Path], tmp_path: Path) -> None:
    file = detdistill.write_report(runs[0], out=tmp_path / "report.html", **HOW)
    page = file.read_text(encoding="utf-8")
    assert "the worst first" in section(page, "pictures")
    assert section(page, "pictures").count("<span>ground truth</span>") == 3
    assert "of which it makes most" in section(page, "kinds-of-error")


def test_a_teacher_of_other_classes_is_missing_and_the_rest_is_there(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_data(write_data(tmp_path / "other", ["a", "b", "c"]), ["a", "b", "c"], "train")
    teacher = make_run(tmp_path / "teacher", other)
    file = detdistill.write_report(runs[0], teacher=teacher, out=tmp_path / "report.html", **HOW)
    errors = section(file.read_text(encoding="utf-8"), "kinds-of-error")
    assert "Missing" in errors
    assert "mistake" in errors


def test_without_data_the_samples_are_shown(runs: tuple[Path, Path], tmp_path: Path) -> None:
    data = write_data(write_data(tmp_path / "data", CLASSES), CLASSES, "train")
    run = make_run(tmp_path / "run", data)
    data.rename(tmp_path / "gone")
    page = detdistill.write_report(run, out=tmp_path / "report.html", **HOW).read_text(encoding="utf-8")
    assert "Missing" in section(page, "kinds-of-error")
    assert '<figure class="picture">' in section(page, "pictures")


def evaluation(confusion: list[list[int]]) -> SegmentationEvaluation:
    return SegmentationEvaluation(
        confusion=torch.tensor(confusion), label_maps={}, image_accuracies=torch.zeros(0),
        split=Split("val", [], ("a", "b"), (0, 1), Path("labels")), seconds=1.0, images_per_second=1.0,
    )  # fmt: skip


def test_classes_by_hand() -> None:
    """10 pixels of a: 6 right, 1 as b, 3 as a class that the data do not have; none of b."""
    mistakes, by_class = mistakes_section({"run": evaluation([[6, 1, 3], [0, 0, 0]])}, ()).tables
    assert [[cell.text for cell in row] for row in mistakes.rows] == [
        ["a as a class that the data do not have", "30.0"],
        ["a as b", "10.0"],
    ]
    assert [[cell.text for cell in row] for row in by_class.rows] == [["a", "60.0", "100.0"], ["b", "", "0.0"]]


def test_accuracy_of_each_image(runs: tuple[Path, Path]) -> None:
    found = detdistill.evaluate(runs[0], runs[0], workers=0)
    assert isinstance(found, SegmentationEvaluation)
    assert float(found.image_accuracies.mean()) == pytest.approx(found.numbers()["pixel_accuracy"])  # as large
    assert not any(map(math.isnan, found.image_accuracies.tolist()))
