"""What it costs to open a large COCO data set, against ``json.load`` of the same file.

    python benchmarks/opening.py                         # as many images and objects as COCO train2017
    python benchmarks/opening.py --images 20000 --objects 150000
    python benchmarks/opening.py --folder somewhere      # keep the generated files for the next run

The set is generated: boxes anywhere, polygons of about 25 corners, images that are hard links to a few files.
Each measurement is a process of its own and counts from after its imports; the faster of two runs counts. Exits
with 1 where an aim is missed. Needs Linux: memory is read from ``/proc``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 480, 640
BATCHES, BATCH_SIZE, WORKERS = 500, 4, 2
WARM = 200  # batches; until then a worker loads modules, and its heap grows to what an image needs
RECIPE = """name: opening
data: {root}
student: {{family: fcos, backbone: mobilenetv3_small_050, channels: 16, size: [96, 128]}}
training: {{max_steps: 1, batch_size: 2}}
"""


# --- the data set ----------------------------------------------------------------------------------------


def generate(root: Path, images: int, objects: int, classes: int, polygons: bool, seed: int = 0) -> Path:
    """A data set with ``train.json``, a val part of 200 images, and a recipe; left alone where it is there."""
    if (root / "recipe.yaml").is_file():
        return root
    for split, count, total, quality in (("train", images, objects, 80), ("val", min(200, images), 1000, 60)):
        (root / split).mkdir(parents=True, exist_ok=True)
        names = [f"{i:012d}.jpg" for i in range(count)]
        link_images(root / split, names, quality)
        with (root / f"{split}.json").open("w", encoding="utf-8") as file:
            file.writelines(lines_of(names, total, classes, polygons, np.random.default_rng(seed)))
    (root / "recipe.yaml").write_text(RECIPE.format(root=root.absolute()))
    return root


def link_images(folder: Path, names: list[str], quality: int) -> None:
    """Few files with many names: a file system allows some ten thousand links to one."""
    for start in range(0, len(names), 10_000):
        first, *others = names[start : start + 10_000]
        pixels = np.random.default_rng(start).integers(100, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(folder / first, quality=quality)
        for name in others:
            os.link(folder / first, folder / name)


def lines_of(
    names: list[str], objects: int, classes: int, polygons: bool, rng: np.random.Generator
) -> Iterator[str]:
    """The JSON file in parts."""
    categories = [{"id": q + 1, "name": f"class {q}", "supercategory": "thing"} for q in range(classes)]
    yield f'{{"info": {{"year": 2017}}, "categories": {json.dumps(categories)}, "images": ['
    for i, name in enumerate(names):
        yield (
            f'{", " if i else ""}{{"license": 3, "file_name": "{name}", "coco_url": "{name}", '
            f'"height": {HEIGHT}, "width": {WIDTH}, "date_captured": "2013-11-14 11:18:45", "id": {i}}}'
        )
    yield '], "annotations": ['
    sides = np.exp(rng.uniform(np.log(8), np.log(320), (objects, 2)))
    corners = rng.uniform(0, 1, (objects, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    boxes = np.concatenate([corners, sides], axis=1).round(2).tolist()
    shapes = [outline(rng) for _ in range(500)] if polygons else [("[]", [])]
    owners, labels = (rng.integers(high, size=objects).tolist() for high in (len(names), classes))
    for k, (box, owner, label) in enumerate(zip(boxes, owners, labels, strict=True)):
        shape, extent = shapes[k % len(shapes)]
        box = extent or box
        yield (
            f'{", " if k else ""}{{"segmentation": {shape}, "area": {box[2] * box[3]:.4f}, '
            f'"iscrowd": 0, "image_id": {owner}, "bbox": {box}, "category_id": {label + 1}, "id": {k + 1}}}'
        )
    yield "]}"


def outline(rng: np.random.Generator) -> tuple[str, list[float]]:
    """A polygon as JSON, anywhere in the image, and its box."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(8, 43)))
    radii = rng.uniform(10, 60, (len(angles), 1))
    center = rng.uniform(70, [WIDTH - 70, HEIGHT - 70])
    corners = center + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    low, high = corners.min(axis=0), corners.max(axis=0)
    return json.dumps([corners.round(2).ravel().tolist()]), [*low.tolist(), *(high - low).tolist()]


# --- one measurement, in a process of its own ------------------------------------------------------------


def memory(key: str, pid: int | str = "self", file: str = "status") -> float:
    """A line of ``/proc``, in MB."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def measured_json(root: Path) -> dict[str, float]:
    before, start = memory("VmRSS"), time.process_time()
    with (root / "train.json").open(encoding="utf-8") as file:
        data = json.load(file)
    seconds = time.process_time() - start
    return {"cpu": seconds, "peak": memory("VmHWM") - before, "objects": len(data["annotations"])}


def measured_open(root: Path, with_masks: bool) -> dict[str, float]:
    from detdistill.data.loading import open_data
    from detdistill.recipe import DataConfig

    before, start = memory("VmRSS"), time.process_time()
    splits = open_data(DataConfig(root=root), with_masks)
    seconds = time.process_time() - start
    peak = memory("VmHWM") - before
    gc.collect()
    objects = len(splits["train"].records.labels_M)
    return {"cpu": seconds, "peak": peak, "stays": memory("VmRSS") - before, "objects": objects}


def measured_workers(root: Path) -> dict[str, float]:
    """MB by which a worker's own memory grows, the most of all workers."""
    from detdistill.data.loading import DetectionDataset, make_loader, open_data
    from detdistill.recipe import DataConfig

    split = open_data(DataConfig(root=root))["train"]
    dataset = DetectionDataset(split, None, with_masks=split.has_masks)
    places = np.random.default_rng(0).integers(len(split), size=(BATCHES + 2 * WORKERS, BATCH_SIZE)).tolist()
    loader = make_loader(dataset, places, WORKERS)
    own: dict[int, list[float]] = defaultdict(list)
    for number, _ in enumerate(loader, start=1):
        if number >= WARM and number % 5 == 0:
            for pid in children():
                own[pid].append(unique(pid))
    # Medians: how many images a worker holds at the moment is chance.
    growth = [statistics.median(mb[-20:]) - statistics.median(mb[:20]) for mb in own.values()]
    return {"growth": max(growth), "own": max(mb[-1] for mb in own.values())}


def children() -> list[int]:
    task = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return [int(pid) for pid in task.read_text().split()]


def unique(pid: int) -> float:
    """The memory that would be free if this process ended, in MB, without the images that it hands over."""
    total, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *values = line.split()
        if key.endswith(":"):
            total += int(values[0]) if counts and key in {"Private_Clean:", "Private_Dirty:"} else 0
        else:  # the first line of a mapping, with its file
            counts = not values[-1].startswith("/dev/shm/torch_")
    return total / 1024


MEASURES = {
    "json": measured_json,
    "boxes": partial(measured_open, with_masks=False),  # as a detector without masks opens it
    "masks": partial(measured_open, with_masks=True),
    "workers": measured_workers,
}


def measure(what: str, root: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, "--folder", str(root)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {what}: " + ", ".join(f"{key} {value:.2f}" for key, value in result.items()), flush=True)
    return result


def check_seconds(root: Path) -> float:
    """CPU seconds of the whole command, from its start."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "detdistill", "check", str(root / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


# --- all measurements ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--objects", type=int, default=860_000)
    parser.add_argument("--folder", type=Path, help="where the sets are kept; by default they are deleted")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows = run(args.folder or Path(temporary), args.images, args.objects)
    print(f"\n{'':46} {'measured':>9} {'at most':>8}")
    for name, value, limit in rows:
        print(f"{name:46} {value:9.2f} {limit:8.2f}{'' if value <= limit else '  missed'}")
    sys.exit(any(value > limit for _, value, limit in rows))


def run(folder: Path, images: int, objects: int) -> list[tuple[str, float, float]]:
    """Each aim: what it is, measured, and its limit."""
    rows: list[tuple[str, float, float]] = []
    for name, polygons, stays in (("boxes", False, 400), ("masks", True, 1000)):
        print(f"{name}: {images} images, {objects} objects", flush=True)
        root = generate(folder / name, images, objects, 80, polygons)
        tries = [(measure("json", root), measure(name, root)) for _ in range(2)]
        base, ours = (
            {key: min(run[key] for run in runs) for key in runs[0]} for runs in zip(*tries, strict=True)
        )
        workers = measure("workers", root)
        rows += [
            (f"{name}: CPU time to open / json.load", ours["cpu"] / base["cpu"], 0.7),
            (f"{name}: peak memory / json.load", ours["peak"] / base["peak"], 1.0),
            (f"{name}: what stays, MB", ours["stays"], stays),
            (f"{name}: growth of a worker in {BATCHES} batches, MB", workers["growth"], 10),
        ]
    print("check", flush=True)
    rows.append(("boxes: CPU seconds of detdistill check", check_seconds(folder / "boxes"), 20))
    print("20,000 classes", flush=True)
    many = generate(folder / "classes", min(images, 5000), min(objects, 100_000), 20_000, polygons=False)
    rows.append(("20,000 classes: CPU seconds to open", measure("boxes", many)["cpu"], 2))
    return rows


if __name__ == "__main__":
    main()
