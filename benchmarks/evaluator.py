"""COCO AP by hotcoco against pycocotools on a generated result set of the size of COCO val2017.

    python benchmarks/evaluator.py                 # 5,000 images, some minutes, nearly all of them pycocotools'
    python benchmarks/evaluator.py --images 300

Objects and detections are as many as a detector gives on COCO: about 7 objects an image, ``--dets`` detections,
some of them displaced objects and the others anywhere.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np

from detdistill.data.records import Record, Split
from detdistill.evaluation.coco import coco_ap


def generate(images: int, dets: int, classes: int, seed: int = 0) -> tuple[Split, list[dict[str, np.ndarray]]]:
    rng = np.random.default_rng(seed)
    records, detections = [], []
    for i in range(images):
        count = rng.poisson(7.2)
        boxes, labels = random_boxes(rng, count), rng.integers(classes, size=count)
        sides = boxes[:, 2:] - boxes[:, :2]
        records.append(
            Record(i, Path(f"{i}.jpg"), 480, 640, boxes, labels, rng.random(count) < 0.01, sides.prod(axis=1))
        )
        near = boxes + (rng.normal(0, 0.08, boxes.shape) * np.tile(sides, 2)).astype(np.float32)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        detections.append({
            "boxes": np.concatenate([near, random_boxes(rng, max(0, dets - count))])[:dets],
            "labels": np.concatenate([labels, rng.integers(classes, size=max(0, dets - count))])[:dets],
            "scores": rng.random(dets),
        })  # fmt: skip
    names = tuple(f"class {q}" for q in range(classes))
    return Split("val", records, names, tuple(range(classes)), Path("generated")), detections


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    side = np.exp(rng.uniform(math.log(8), math.log(320), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([640, 480]) - side)
    return np.concatenate([corner, corner + side], axis=1).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--dets", type=int, default=100)
    parser.add_argument("--classes", type=int, default=80)
    args = parser.parse_args()
    split, detections = generate(args.images, args.dets, args.classes)
    objects = sum(len(record.labels_K) for record in split.records)
    print(f"{args.images} images, {objects} objects, {args.images * args.dets} detections\n", flush=True)
    seconds, numbers = {}, {}
    for backend in ("hotcoco", "pycocotools"):
        start = time.perf_counter()
        numbers[backend] = coco_ap(split, detections, backend=backend).as_dict()
        seconds[backend] = time.perf_counter() - start
    worst = max(abs(numbers["hotcoco"][key] - numbers["pycocotools"][key]) for key in numbers["hotcoco"])
    print("| evaluator | seconds | ratio |\n|---|---|---|")
    for backend, value in seconds.items():
        print(f"| {backend} | {value:.2f} | {value / seconds['hotcoco']:.1f} |")
    print(f"\nlargest difference of the 12 numbers: {worst:.1e}")


if __name__ == "__main__":
    main()
