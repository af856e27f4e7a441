"""YOLO: one text file for each image, rows of ``class cx cy w h`` or ``class x1 y1 x2 y2 …`` in fractions of
the image's sides (docs.ultralytics.com/datasets/detect)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from detdistill.data.cleaning import (
    FileIndex,
    RawObject,
    make_record,
    report_duplicates,
    report_empty,
    select_classes,
    settle_masks,
)
from detdistill.data.formats.layout import ListedImages, describe_folder, labels_folder
from detdistill.data.formats.yolo_layout import (
    NAME_FILES,
    YoloLayout,
    class_names,
    existing_images,
    find_yolo,
    is_label_file,
)
from detdistill.data.images import READERS, files_below, image_sizes, is_image
from detdistill.data.records import Finding, Record, Records, Split
from detdistill.data.text import read_lines, read_text
from detdistill.errors import UserError
from detdistill.recipe import DataConfig, names_of

_FARTHEST = 1.5  # a coordinate beyond it is in pixels, not a fraction drawn a little too far
_HELD = 0.8  # of the key points of a row that are in its box, at least
_SHORTEST_WITH_POINTS = 9  # words: class, box, two points
_INACCURATE = 0.01  # by which a predicted box may leave its image
_NO_IMAGE = "restore the file or drop it from the list"


def read_yolo(
    images: Path | Sequence[Path],
    name: str,
    classes: Sequence[str],
    with_masks: bool = True,
    keypoints: int = 0,
    root: Path | None = None,
) -> Split:
    """Read the images of a folder or of a list.

    Args:
        images: a folder (searched with its subfolders), a text file of image paths, or several of either.
        name: what the split is called ("train", "val").
        classes: names by class id, from 0.
        with_masks: keep polygons, where rows have them.
        keypoints: numbers that follow the box of a row and are not read.
        root: the folder of the data set, in which the images of a list are searched; by default the list's.

    Labels are in the folder with ``images`` replaced by ``labels`` in its path where there is one, else in the
    folder of the images. An image without a label file is background. Sizes come from the images' headers.

    Raises:
        UserError: a folder or list does not exist, or a list cannot be read.
    """
    classes = names_of(classes, "classes")
    sources = [images] if isinstance(images, Path) else list(images)
    findings: list[Finding] = []
    files = FileIndex()
    paths = [path for source in sources for path in _image_paths(source, root, files, findings)]
    paths = [path for path in dict.fromkeys(paths) if files.check(path, sources[0], findings, _NO_IMAGE)]
    ids = _ids(paths)
    report_duplicates(ids, "image id", sources[0], findings, "give each image its own name")
    labels = _label_files(paths, files)
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(_read_pair, paths, labels))
    texts = [text for _, text in contents if isinstance(text, str)]
    predicted = not keypoints and _are_predictions(texts)
    if predicted:
        message = "each row has 6 or 7 numbers, as predictions with a score and a track id; none is used"
        fix = "leave score and track id out (class cx cy w h), or give the annotations"
        findings.append(Finding("error", "predictions", sources[0], message, fix))
    if not keypoints and _are_boxes_with_points(texts):
        message = "rows are a box followed by points in it, as key points or a polygon have them"
        fix = "name the key points with kpt_shape in the .yaml, or keep either the box or the polygon"
        findings.append(Finding("error", "box and points", sources[0], message, fix))
    records: list[Record] = []
    for image_id, path, source, (size, rows) in zip(ids, paths, labels, contents, strict=True):
        if isinstance(size, UserError):
            findings.append(Finding("error", "unreadable image", path, str(size), "restore it or delete it"))
            continue
        source = source or path
        if isinstance(rows, UserError):
            problem, _, fix = str(rows).removeprefix(f"{source}: ").partition("; ")
            findings.append(Finding("error", "unreadable labels", source, problem, fix))
            continue
        objects = [] if predicted else _objects(rows, size, len(classes), keypoints, source, findings)
        records.append(make_record(image_id, path, size, objects, source, findings, with_masks))
    _report_orphans([source for source in sources if source.is_dir()], {*labels}, findings)
    packed = settle_masks(records, sources[0], findings) if with_masks else Records.pack(records)
    if records and not any(labels):
        findings.append(_no_labels(paths[0], len(records), sources[0]))
    elif not predicted:
        report_empty(name, len(packed), len(packed.labels_M), sources[0], findings)
    return Split(name, packed, classes, None, sources[0], findings)


def _folder_of_labels(images: Path) -> Path:
    folder = labels_folder(images)
    return folder if folder.is_dir() else images


def _label_files(images: Sequence[Path], files: FileIndex) -> list[Path | None]:
    """The label file of each image, None where it has none."""
    folders = {folder: _folder_of_labels(folder) for folder in {path.parent for path in images}}
    found = (files.find(f"{folders[path.parent]}/{path.stem}.txt") for path in images)
    return [None if path is None else Path(path) for path in found]


def _no_labels(image: Path, images: int, source: Path) -> Finding:
    folder = _folder_of_labels(image.parent)
    message = (
        f"none of its {images} images has a label file: that of {image.name} would be "
        f"{folder / image.stem}.txt, and {folder} holds {describe_folder(folder, 3)}"
    )
    return Finding("error", "no labels", source, message, "put the label files there, named as the images")


def _image_paths(source: Path, root: Path | None, files: FileIndex, findings: list[Finding]) -> list[Path]:
    """The images of a folder, or those that a list names; an error is added where none is to be found."""
    if source.is_dir():
        found = sorted(path for path in files_below(source) if is_image(path))
        labels = _folder_of_labels(source)
        orphans = [] if found else [path for path in files_below(labels) if is_label_file(path)]
        if orphans:
            raise UserError(
                f"{source}: holds no images, and {labels} has {len(orphans)} label files; export the data set "
                "with its images, or copy them there"
            )
        return found
    listed = ListedImages(root or source.parent, files)
    entries = read_lines(source)
    if not any(is_image(Path(PurePosixPath(entry.replace("\\", "/")).name)) for entry in entries):
        seen = f"its first line is {entries[0][:60]!r}" if entries else "it is empty"
        raise UserError(f"{source}: is no list of images ({seen}); write one path of an image on each line")
    paths = []
    for entry in entries:
        path = listed.find(entry, source.parent)
        if path is None:
            name = PurePosixPath(entry.replace("\\", "/")).name
            message = f"its image {entry} does not exist, and no single {name} is in {listed.root}"
            findings.append(Finding("error", "missing image", source, message, _NO_IMAGE))
        else:
            paths.append(path)
    return paths


def _ids(paths: Sequence[Path]) -> list[str]:
    """File stems, or where those repeat (``a/1.jpg``, ``b/1.jpg``) paths without suffix, from the folder that
    all have in common: the dataset may be moved."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    top = os.path.commonpath([path.parent.absolute() for path in paths])
    return [Path(os.path.relpath(path, top)).with_suffix("").as_posix() for path in paths]


def _read_pair(image: Path, labels: Path | None) -> tuple[tuple[int, int] | UserError, str | UserError]:
    """The image's size and the text of its label file, or why there is none."""
    try:
        size = image_sizes(image)[0]
    except UserError as error:
        return error, ""
    try:
        return size, "" if labels is None else read_text(labels)
    except UserError as error:
        return size, error


def _are_predictions(texts: Iterable[str]) -> bool:
    """Whether all rows of a split are ``class cx cy w h`` with a score, a track id, or both.

    Seven numbers are a triangle, too, but not where all boxes are inside their images, and all triangles end on
    a whole number.
    """
    rows = (row for text in texts for row in text.splitlines() if row.strip())
    first = next(rows, None)
    return first is not None and _is_prediction(first) and all(map(_is_prediction, rows))


def _are_boxes_with_points(texts: Iterable[str]) -> bool:
    """Whether all rows of more than four numbers begin with a box that holds nearly all points after it.

    A polygon's first corners, taken for a box, do not hold the others in row after row.
    """
    rows = (row for text in texts for row in text.splitlines() if len(row.split()) >= _SHORTEST_WITH_POINTS)
    first = next(rows, None)
    return first is not None and _is_box_with_points(first) and all(map(_is_box_with_points, rows))


def _is_box_with_points(row: str) -> bool:
    try:
        _, cx, cy, w, h, *others = map(float, row.split())
    except ValueError:
        return False
    if not _is_inside(cx, cy, w, h):
        return False

    def held(step: int) -> bool:
        if len(others) % step or (step == 3 and not {0.0, 1.0, 2.0}.issuperset(others[2::3])):
            return False
        # a key point at 0 0 is not labeled
        points = [(x, y) for x, y in zip(others[::step], others[1::step], strict=True) if x or y]
        inside = [abs(x - cx) <= w / 2 + _INACCURATE and abs(y - cy) <= h / 2 + _INACCURATE for x, y in points]
        return sum(inside) >= _HELD * max(1, len(points))

    return held(2) or held(3)


def _is_prediction(row: str) -> bool:
    try:
        _, cx, cy, w, h, *others = map(float, row.split())
    except ValueError:
        return False
    if not 1 <= len(others) <= 2 or not (0 <= others[0] <= 1 or others[0].is_integer()):
        return False
    return _is_inside(cx, cy, w, h) and (len(others) == 1 or (others[0] <= 1 and others[1].is_integer()))


def _is_inside(cx: float, cy: float, w: float, h: float) -> bool:
    """Whether it is a box within its image, all in fractions of the image."""
    return 0 < w <= 2 * min(cx, 1 - cx) + _INACCURATE and 0 < h <= 2 * min(cy, 1 - cy) + _INACCURATE


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


def _report_orphans(folders: Iterable[Path], expected: set[Path | None], findings: list[Finding]) -> None:
    for folder in folders:
        for file in sorted(files_below(_folder_of_labels(folder))):
            if file not in expected and is_label_file(file):
                message, fix = "there is no image of this label file", "restore the image or delete the file"
                findings.append(Finding("warning", "label without image", file, message, fix))


def open_yolo(config: DataConfig, with_masks: bool = True) -> dict[str, Split]:
    """Find and read the train and val images of ``config.root`` (a folder, or the dataset's YAML file).

    ``data.train`` and ``data.val`` name an images folder or a list instead. Where no file names the classes,
    ``data.classes`` does, in the order of their numbers.

    Raises:
        UserError: no images or no class names are found, or several could be meant.
    """
    root = config.root
    assert root is not None, "DataConfig refuses YOLO without a root"
    if config.images is not None:
        raise UserError(
            "data.images is not for YOLO: set data.train and data.val to the folders or lists of images"
        )
    layout = find_yolo(root) or YoloLayout(None, {})
    images = dict(layout.images)
    base = root.parent if root.is_file() else root
    for name, given in (("train", config.train), ("val", config.val)):
        if given:
            images[name] = [existing_images([base, Path()], given, f"data.{name}")]
    if not images:
        raise UserError(
            f"{root}: no images with YOLO labels in images/train, train/images, train, images or the folder "
            f"itself; it holds {describe_folder(root)}; set data.train and data.val to folders or lists"
        )
    classes = layout.classes or class_names(base, images) or config.classes
    if classes is None:
        raise UserError(
            f"{root}: no file names the classes (a .yaml with names and train, {', '.join(NAME_FILES[:3])}); "
            f"{base} holds {describe_folder(base)}; add classes.txt with one name a line, or set data.classes "
            "in the order of the class numbers"
        )
    splits = {
        name: read_yolo(sources, name, classes, with_masks, layout.keypoints, base)
        for name, sources in images.items()
    }
    if config.classes is None:
        return splits
    return {name: select_classes(split, config.classes) for name, split in splits.items()}
