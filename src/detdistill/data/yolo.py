"""YOLO: one text file for each image, rows of ``class cx cy w h`` or ``class x1 y1 x2 y2 …`` in fractions of
the image's sides (docs.ultralytics.com/datasets/detect)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detdistill.config import DataConfig, UserError
from detdistill.data.cleaning import (
    FileIndex,
    RawObject,
    make_record,
    report_duplicates,
    report_empty,
    select_classes,
    settle_masks,
)
from detdistill.data.images import READERS, files_below, image_sizes, is_image, labels_beside
from detdistill.data.records import Finding, Record, Split

_FARTHEST = 1.5  # a coordinate beyond it is in pixels, not a fraction drawn a little too far
_NOT_LABELS = ("classes.txt", "train.txt", "val.txt", "test.txt")
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}


def read_yolo(
    images: Path | Sequence[Path],
    name: str,
    classes: Sequence[str],
    with_masks: bool = True,
    keypoints: int = 0,
) -> Split:
    """Read the images of a folder or of a list.

    Args:
        images: a folder (searched with its subfolders), a text file of image paths, or several of either.
        name: what the split is called ("train", "val").
        classes: names by class id, from 0.
        with_masks: keep polygons, where rows have them.
        keypoints: numbers that follow the box of a row and are not read.

    Labels are looked for beside the images with ``images`` replaced by ``labels`` in the path. An image without
    a label file is background. Sizes come from the images' headers.

    Raises:
        UserError: a folder or list does not exist.
    """
    sources = [images] if isinstance(images, Path) else list(images)
    findings: list[Finding] = []
    paths = [path for source in sources for path in _image_paths(source)]
    files = FileIndex()
    paths = [path for path in dict.fromkeys(paths) if files.check(path, sources[0], findings)]
    ids = _ids(paths)
    report_duplicates(ids, "image id", sources[0], findings, "give each image its own name")
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(_read_pair, paths))
    records: list[Record] = []
    for image_id, path, (size, rows) in zip(ids, paths, contents, strict=True):
        if isinstance(size, UserError):
            findings.append(Finding("error", "unreadable image", path, str(size), "restore it or delete it"))
            continue
        source = label_path(path)
        objects = _objects(rows, size, len(classes), keypoints, source, findings)
        records.append(make_record(image_id, path, size, objects, source, findings, with_masks))
    _report_orphans([source for source in sources if source.is_dir()], paths, findings)
    if with_masks:
        records = settle_masks(records, sources[0], findings)
    report_empty(name, len(records), sum(len(r.labels_K) for r in records), sources[0], findings)
    return Split(name, records, tuple(classes), None, sources[0], findings)


def label_path(image: Path) -> Path:
    """The label file of an image."""
    return labels_beside(image.parent) / f"{image.stem}.txt"


def _image_paths(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(path for path in files_below(source) if is_image(path))
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{source}: neither a folder nor a list of images ({error}); correct its path"
        ) from None
    return [source.parent / line.strip() for line in lines if line.strip()]


def _ids(paths: Sequence[Path]) -> list[str]:
    """File stems, or where those repeat (``a/1.jpg``, ``b/1.jpg``) paths without suffix, from the folder that
    all have in common: the dataset may be moved."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    top = os.path.commonpath([path.parent.absolute() for path in paths])
    return [Path(os.path.relpath(path, top)).with_suffix("").as_posix() for path in paths]


def _read_pair(path: Path) -> tuple[tuple[int, int] | UserError, str]:
    """The image's size, or why it has none, and the text of its label file."""
    try:
        size = image_sizes(path)[0]
    except UserError as error:
        return error, ""
    try:
        return size, label_path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return size, ""


def _objects(
    text: str, size: tuple[int, int], classes: int, keypoints: int, source: Path, findings: list[Finding]
) -> list[RawObject]:
    objects = []
    for number, row in enumerate(text.splitlines(), start=1):
        if not row.strip():
            continue
        parsed = _parse_row(row.split(), size, classes, keypoints, f"line {number}")
        if isinstance(parsed, RawObject):
            objects.append(parsed)
        else:
            kind, problem, fix = parsed
            message = f"line {number} ({row.strip()[:40]}) {problem} and was dropped"
            findings.append(Finding("warning", kind, source, message, fix))
    return objects


def _parse_row(
    words: Sequence[str], size: tuple[int, int], classes: int, keypoints: int, name: str
) -> RawObject | tuple[str, str, str]:
    """The object, or what is wrong: kind, problem, fix."""
    try:
        label, *values = (float(word) for word in words)
    except ValueError:
        return "malformed row", "is not all numbers", "write class cx cy w h"
    if keypoints and len(values) == 4 + keypoints:
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        fix = "leave the score out" if len(values) == 5 else "write class cx cy w h, or a polygon"
        return "malformed row", f"has {len(words)} columns", fix
    if not math.isfinite(label) or label != int(label) or not 0 <= label < classes:
        return "unknown class", f"has a class outside 0…{classes - 1}", "correct it or add its name"
    if any(abs(value) > _FARTHEST for value in values):
        return "malformed row", "is not in fractions of the image", "divide by its width and height"
    height, width = size
    if len(values) == 4:
        cx, cy, w, h = values[0] * width, values[1] * height, values[2] * width, values[3] * height
        return RawObject((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), int(label), name)
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    polygon = [value for corner in zip(xs, ys, strict=True) for value in corner]
    box = (min(xs), min(ys), max(xs), max(ys))
    return RawObject(box, int(label), name, mask=[polygon])


def _report_orphans(folders: Iterable[Path], images: Iterable[Path], findings: list[Finding]) -> None:
    expected = {label_path(image) for image in images}
    for folder in folders:
        for file in sorted(files_below(labels_beside(folder))):
            if file.suffix == ".txt" and file not in expected and file.name not in _NOT_LABELS:
                message, fix = "there is no image of this label file", "restore the image or delete the file"
                findings.append(Finding("warning", "label without image", file, message, fix))


# --- where the files are ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class YoloLayout:
    """Names of the classes (None if no file tells them), where each split's images are, and how many numbers
    of key points follow a box."""

    classes: tuple[str, ...] | None
    images: dict[str, list[Path]]
    keypoints: int = 0


def find_yolo(root: Path) -> YoloLayout | None:
    """Look for a dataset's YAML file (``root`` itself may be it), or for ``images`` and ``labels`` folders.

    Raises:
        UserError: several YAML files could be meant, or the one there is wrong.
    """
    found = [(file, tree) for file in _yaml_files(root) if (tree := _dataset_yaml(file)) is not None]
    if len(found) > 1:
        names = ", ".join(file.name for file, _ in found)
        raise UserError(f"{root}: several dataset files: {names}; set data.root to the one you mean")
    if found:
        return _layout_of_yaml(*found[0])
    if root.is_file():
        raise UserError(f"{root}: is no YOLO dataset file: it needs the keys names and train")
    images: dict[str, list[Path]] = {}
    for split, folder_names in _SPLITS.items():
        for name in folder_names:
            folders = [root / "images" / name, root / name / "images"]
            folders = [folder for folder in folders if folder.is_dir() and _has_labels(folder)]
            if folders:
                images[split] = folders
                break
    if not images and (root / "images").is_dir() and _has_labels(root / "images"):
        images["train"] = [root / "images"]
    return YoloLayout(_classes_file(root), images) if images else None


def _has_labels(images: Path) -> bool:
    # Not any folder of that name: those of segmentation sets hold pictures.
    return any(file.suffix == ".txt" for file in files_below(labels_beside(images)))


def _yaml_files(root: Path) -> list[Path]:
    return [root] if root.is_file() else sorted([*root.glob("*.yaml"), *root.glob("*.yml")])


def _dataset_yaml(file: Path) -> dict[str, Any] | None:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return tree if isinstance(tree, dict) and {"names", "train"} <= tree.keys() else None


def _layout_of_yaml(file: Path, tree: dict[str, Any]) -> YoloLayout:
    names = tree["names"]
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(
                f"{file}: names must be numbered 0…{len(names) - 1} without gaps; add those missing"
            )
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: names must list the classes")
    folder = Path(str(tree.get("path") or "."))
    bases = list(dict.fromkeys([file.parent / folder, folder, file.parent]))
    images = {}
    for split, keys in (("train", ("train",)), ("val", ("val", "valid", "test"))):
        entry = next((tree[key] for key in keys if tree.get(key)), None)
        if entry is not None:
            entries = entry if isinstance(entry, list) else [entry]
            images[split] = [_existing(bases, str(item), f"{file}: {split}") for item in entries]
    shape = tree.get("kpt_shape") or [0]
    if not isinstance(shape, list) or not all(isinstance(number, int) for number in shape):
        raise UserError(f"{file}: kpt_shape must be [key points, numbers of each], as [17, 3]")
    return YoloLayout(tuple(str(name) for name in names), images, math.prod(shape))


def _existing(bases: Iterable[Path], entry: str, what: str) -> Path:
    # Roboflow writes ../train/images for a folder that lies beside the file.
    for candidate in (base / part for part in (entry, entry.removeprefix("../")) for base in bases):
        if candidate.exists():
            return candidate
    raise UserError(f"{what}: no such images {entry!r}; correct the path (it starts from the dataset's folder)")


def _classes_file(root: Path) -> tuple[str, ...] | None:
    for file in (root / "classes.txt", root / "obj.names", root / "labels" / "classes.txt"):
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
    return None


def open_yolo(config: DataConfig, with_masks: bool = True) -> dict[str, Split]:
    """Find and read the train and val images of ``config.root`` (a folder, or the dataset's YAML file).

    ``data.train`` and ``data.val`` name an images folder or a list instead.

    Raises:
        UserError: no images or no class names are found, or several could be meant.
    """
    root = config.root
    assert root is not None, "DataConfig refuses YOLO without a root"
    layout = find_yolo(root) or YoloLayout(_classes_file(root), {})
    if layout.classes is None:
        raise UserError(f"{root}: nothing names the classes; add classes.txt with one name a line")
    images = dict(layout.images)
    base = root.parent if root.is_file() else root
    for name, given in (("train", config.train), ("val", config.val)):
        if given:
            images[name] = [_existing([base, Path()], given, f"data.{name}")]
    splits = {
        name: read_yolo(sources, name, layout.classes, with_masks, layout.keypoints)
        for name, sources in images.items()
    }
    if config.classes is None:
        return splits
    return {name: select_classes(split, config.classes) for name, split in splits.items()}
