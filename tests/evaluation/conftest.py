"""A split of plain images, and a detector that knows the answer from an image's gray value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from detdistill.data.records import Record, Split
from detdistill.models.base import Batch, DenseOutputs, Detections, Detector, HeadOutputs, Preprocess, Pyramid

CLASSES = ("ball", "box", "cone")


def _record(
    image_id: int | str,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    ignore: Sequence[bool] | None = None,
    path: Path = Path("none.png"),
    size: tuple[int, int] = (200, 300),
) -> Record:
    boxes_K4 = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    areas = (boxes_K4[:, 2] - boxes_K4[:, 0]) * (boxes_K4[:, 3] - boxes_K4[:, 1])
    flags = np.zeros(len(boxes_K4), dtype=bool) if ignore is None else np.asarray(ignore, dtype=bool)
    return Record(image_id, path, *size, boxes_K4, np.asarray(labels, dtype=np.int64), flags, areas)


def _split(records: list[Record], classes: tuple[str, ...] = CLASSES) -> Split:
    ids = tuple(range(1, len(classes) + 1))
    return Split("val", records, classes, ids, Path("annotations.json"))


def _random_split(seed: int, images: int = 12, crowds: bool = True) -> Split:
    rng = np.random.default_rng(seed)
    records = []
    for i in range(images):
        count = int(rng.integers(0, 7))  # some images are empty
        corner, size = rng.uniform(0, 150, (count, 2)), rng.uniform(4, 140, (count, 2))
        boxes = np.concatenate([corner, corner + size], axis=1)
        ignore = rng.random(count) < (0.2 if crowds else 0)
        records.append(_record(f"image-{i}", boxes, rng.integers(0, 2, count), ignore))
    return _split(records)  # the third class never occurs


def _random_detections(split: Split, seed: int) -> list[dict[str, np.ndarray]]:
    """Jittered truth and false alarms, with many equal scores."""
    rng = np.random.default_rng(seed)
    found = []
    for record in split.records:
        near = record.boxes_K4.repeat(2, axis=0) + rng.normal(0, 4, (2 * len(record.boxes_K4), 4))
        corner = rng.uniform(0, 150, (int(rng.integers(0, 5)), 2))
        far = np.concatenate([corner, corner + rng.uniform(5, 100, corner.shape)], axis=1)
        labels = [record.labels_K.repeat(2), rng.integers(0, 3, len(far))]
        boxes = np.concatenate([near, far])
        scores = rng.integers(1, 6, len(boxes)) / 5
        found.append({"boxes": boxes, "labels": np.concatenate(labels), "scores": scores})
    return found


class OracleDetector(Detector):
    """Looks an image's gray value up in a table of detections; otherwise a detector like any other."""

    def __init__(self, answers: dict[int, Detections], classes: tuple[str, ...] = CLASSES) -> None:
        super().__init__()
        self.answers = answers
        self.classes = classes
        self.preprocessor = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.pyramid_channels = {32: 3}
        self.pool = nn.Conv2d(3, 3, 32, stride=32, groups=3, bias=False)
        nn.init.constant_(self.pool.weight, 1 / 32**2)
        self.norm = nn.BatchNorm2d(3)

    def forward_features(self, batch: Batch) -> Pyramid:
        return {32: self.norm(self.pool(batch.images_N3HW))}

    def forward_head(self, pyramid: Pyramid, batch: Batch) -> HeadOutputs:
        return DenseOutputs(cls=pyramid, box=pyramid)

    def losses(self, outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        return {}

    def decode(self, outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert isinstance(outputs, DenseOutputs)
        grays = (outputs.cls[32][:, 0, 0, 0] * 255).round().int().tolist()
        return [self.answers[gray] for gray in grays]


def build_oracle(folder: Path, images: int) -> tuple[OracleDetector, Split]:
    records, answers = [], {}
    for i, record in enumerate(_random_split(0, images, crowds=False).records):
        path = folder / f"{i}.png"
        gray = 10 * i
        Image.new("RGB", (record.width, record.height), (gray, gray, gray)).save(path)
        records.append(_record(i, record.boxes_K4, record.labels_K, path=path))
        answers[gray] = {
            "boxes": torch.from_numpy(record.boxes_K4),
            "labels": torch.from_numpy(record.labels_K),
            "scores": torch.linspace(0.9, 0.5, len(record.labels_K)),
        }
    return OracleDetector(answers), _split(records)


@pytest.fixture
def make_record() -> Callable[..., Record]:
    return _record


@pytest.fixture
def make_split() -> Callable[..., Split]:
    return _split


@pytest.fixture
def random_split() -> Callable[..., Split]:
    return _random_split


@pytest.fixture
def random_detections() -> Callable[..., list[dict[str, np.ndarray]]]:
    return _random_detections


@pytest.fixture
def oracle(tmp_path: Path) -> Callable[[int], tuple[OracleDetector, Split]]:
    """A function of a number of images: a split of so many images on disk and a detector perfect on it."""
    return partial(build_oracle, tmp_path)
