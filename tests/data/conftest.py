"""Small datasets of every layout, written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """``write_image(path, width=64, height=48)``: noise, so that every image is its own."""

    def write(path: Path, width: int = 64, height: int = 48) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(map(ord, f"{path.parent.name}/{path.name}"))
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture
def write_coco(write_image: Callable[..., Path]) -> Callable[..., Path]:
    """``write_coco(json_path, image_folder, images=2, annotations=[…])``: 64×48 images 1.png, 2.png, …"""

    def write(file: Path, folder: Path, images: int = 2, **changes: Any) -> Path:
        rows = []
        for i in range(1, images + 1):
            write_image(folder / f"{i}.png")
            rows.append({"id": i, "file_name": f"{i}.png", "height": 48, "width": 64})
        box = {"image_id": 1, "category_id": 7, "bbox": [4, 6, 10, 20], "area": 150, "iscrowd": 0, "id": 1}
        dataset = {
            "images": rows,
            "annotations": [box],
            "categories": [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}],
            **changes,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dataset))
        return file

    return write


@pytest.fixture
def write_voc(write_image: Callable[..., Path]) -> Callable[..., Path]:
    """``write_voc(root, {"train": {"a": "<object>…"}})``: 64×48 images, objects as XML text."""

    def write(root: Path, sets: dict[str, dict[str, str]]) -> Path:
        (root / "Annotations").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        for name, images in sets.items():
            (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(images) + "\n")
            for stem, objects in images.items():
                write_image(root / "JPEGImages" / f"{stem}.jpg")
                size = "<size><width>64</width><height>48</height></size>"
                (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        return root

    return write


@pytest.fixture
def voc_object() -> Callable[..., str]:
    """One object as VOC's XML."""

    def write(name: str, x1: float, y1: float, x2: float, y2: float, difficult: int = 0) -> str:
        box = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"

    return write


@pytest.fixture
def write_yolo(write_image: Callable[..., Path]) -> Callable[..., Path]:
    """``write_yolo(root, {"train": {"a": "0 .5 .5 .1 .1"}})``: images/train/a.jpg and its label file."""

    def write(root: Path, splits: dict[str, dict[str, str | None]]) -> Path:
        for split, images in splits.items():
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            for stem, rows in images.items():
                write_image(root / "images" / split / f"{stem}.jpg")
                if rows is not None:
                    (root / "labels" / split / f"{stem}.txt").write_text(rows)
        return root

    return write
