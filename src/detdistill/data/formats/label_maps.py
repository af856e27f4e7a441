"""Semantic segmentation: an image of class numbers for each image, in three layouts.

- folders of pairs: ``images/SPLIT/NAME.jpg`` and ``labels/SPLIT/NAME.png``, with ``classes.json`` (``classes``,
  perhaps ``ignore_index``) or ``data.classes`` to name the numbers;
- Cityscapes (Cordts et al. 2016): ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`` and
  ``gtFine/SPLIT/CITY/*_gtFine_labelIds.png``, its 19 evaluated classes;
- Pascal VOC: ``ImageSets/Segmentation`` and ``SegmentationClass``, background and 20 classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detdistill.data.cleaning import report_duplicates, report_empty, select_classes
from detdistill.data.formats.layout import (
    SPLIT_NAMES,
    describe_folder,
    entry_names,
    find_entry,
    find_folder,
    is_file,
    is_folder,
    labels_folder,
)
from detdistill.data.formats.voc import find_voc, read_image_set
from detdistill.data.images import READERS, UNREADABLE, files_below, image_sizes, is_image
from detdistill.data.records import UNLABELED, Finding, LabelCode, LabelMap, Record, Records, Split
from detdistill.data.text import distinct_names, read_text, require_regular
from detdistill.errors import UserError, nearest
from detdistill.recipe import DataConfig

# Cityscapes' published table (cityscapesscripts/helpers/labels.py): name and labelId by trainId.
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26,
    "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
CITYSCAPES_IDS = 34  # labelIds are 0…33

VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

Item = TypeVar("Item")

Pair = tuple[str, Path, Path]
"""An image's id, its file, and where its label map should be."""


def read_numbers(path: Path) -> NDArray[np.uint8]:
    """The numbers of a label map, (H, W).

    Raises:
        UserError: the file is missing, cannot be decoded, or holds colors or numbers outside 0…255.
    """
    try:
        require_regular(path)
        with Image.open(path) as image:
            pixels = np.asarray(image)  # of a palette: the indices
    except FileNotFoundError:
        raise UserError(f"{path}: no such label map; restore it or drop its image") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be decoded ({error}); restore it or drop its image") from None
    if pixels.ndim == 3 and (pixels[..., :1] == pixels[..., 1:3]).all():
        pixels = pixels[..., 0]  # gray, written as RGB
    if pixels.ndim != 2:
        raise UserError(f"{path}: holds colors, not class numbers; write a PNG of one channel or a palette")
    if pixels.dtype.itemsize > 1:
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > UNLABELED or (pixels.dtype.kind == "f" and (pixels % 1).any()):
            raise UserError(
                f"{path}: holds numbers from {low:g} to {high:g}; write class numbers 0…{UNLABELED - 1}, and "
                f"{UNLABELED} where nothing is to be learnt"
            )
    return pixels.astype(np.uint8)


def read_labels(label_map: LabelMap) -> NDArray[np.uint8]:
    """(H, W): each pixel's label, 255 where it has none.

    Raises:
        UserError: as :func:`read_numbers`; or there are numbers that mean nothing.
    """
    numbers_HW = read_numbers(label_map.path)
    if not label_map.code.declared_256[numbers_HW].all():
        message, fix = _unknown_numbers(label_map.code, np.bincount(numbers_HW.ravel(), minlength=256))
        raise UserError(f"{label_map.path}: {message}; {fix}")
    return label_map.code.classes_256[numbers_HW]


def _unknown_numbers(code: LabelCode, counts_256: NDArray[np.int64]) -> tuple[str, str]:
    """What is wrong with numbers that occur and mean nothing, and the fix."""
    unknown = np.flatnonzero((counts_256 > 0) & ~code.declared_256).tolist()
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return (
        f"has numbers that mean no class ({', '.join(map(str, unknown[:5]))}{more})",
        f"name them in the classes, or write {UNLABELED} where nothing is to be learnt",
    )


# --- what the numbers say --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelCounts:
    """What some label maps of a split hold.

    Attributes:
        counts_256: (256,) pixels by label; the last are those without a class.
        findings: errors: maps that cannot be read, numbers that mean nothing, nothing to learn.
    """

    counts_256: NDArray[np.int64]
    findings: list[Finding]


def count_pixels(split: Split, sample: int | None = None) -> PixelCounts:
    """Read label maps of a split and count the pixels of each class.

    Args:
        sample: so many of them, the same ones every time; None reads all.

    Binary masks of 0 and 255 are an error: 255 means "no class" everywhere, so that one class would remain
    and every answer be right. So that rare classes do not look like that, all maps are read in this case.
    """
    maps = [record.label_map for record in sampled(split.records, sample) if record.label_map is not None]
    findings: list[Finding] = []
    numbers_256, counts_256 = np.zeros(256, np.int64), np.zeros(256, np.int64)
    with ThreadPoolExecutor(READERS) as pool:
        for label_map, seen in zip(maps, pool.map(_count_numbers, maps), strict=True):
            if isinstance(seen, Finding):
                findings.append(seen)
                continue
            if (seen[~label_map.code.declared_256] > 0).any():
                unknown = _unknown_numbers(label_map.code, seen)
                findings.append(Finding("error", "unknown number", label_map.path, *unknown))
            numbers_256 += seen
            np.add.at(counts_256, label_map.code.classes_256, seen)
    if maps and not findings and np.count_nonzero(counts_256[:UNLABELED]) < 2:
        if len(maps) < len(split.records):
            return count_pixels(split)
        problem = _nothing_to_learn(split, numbers_256, counts_256)
        findings += [] if problem is None else [Finding("error", "nothing to learn", split.source, *problem)]
    return PixelCounts(counts_256, findings)


def _nothing_to_learn(
    split: Split, numbers_256: NDArray[np.int64], counts_256: NDArray[np.int64]
) -> tuple[str, str] | None:
    """Why at most one class has a pixel in all label maps, and the fix; None if that may be."""
    present = np.flatnonzero(counts_256[:UNLABELED]).tolist()
    if not present:
        numbers = ", ".join(map(str, np.flatnonzero(numbers_256)[:5].tolist()))
        return (
            f"no pixel of its label maps has a class (only the numbers {numbers} occur)",
            "write the numbers of the classes, in the order of classes.json or data.classes",
        )
    if len(split.classes) == 1:
        return (
            f"{split.classes[0]!r} is the only class: all pixels that count have it, and every answer is right",
            "name the background as a class, too",
        )
    if numbers_256[UNLABELED] and np.count_nonzero(numbers_256) == 2:
        number = int(np.flatnonzero(numbers_256)[0])
        absent = next(name for i, name in enumerate(split.classes) if i != present[0])
        return (
            f"only the numbers {number} and {UNLABELED} occur, and {UNLABELED} means no class: "
            f"{absent!r} has no pixel, and every answer is right",
            f"write the number {split.classes.index(absent)} instead of {UNLABELED} in the label maps",
        )
    return None


def sampled(records: Sequence[Item], sample: int | None) -> Sequence[Item]:
    """So many of them, the same ones every time; None for all."""
    if sample is None or sample >= len(records):
        return records
    places = np.random.default_rng(0).choice(len(records), sample, replace=False)
    return [records[int(place)] for place in sorted(places)]


def _count_numbers(label_map: LabelMap) -> NDArray[np.int64] | Finding:
    """How often each number occurs, (256,); or why that is not known."""
    try:
        return np.bincount(read_numbers(label_map.path).ravel(), minlength=256)
    except UserError as error:
        message, _, fix = str(error).removeprefix(f"{label_map.path}: ").partition("; ")
        return Finding("error", "undecodable label map", label_map.path, message, fix)


# --- pairs of images and label maps ----------------------------------------------------------------------


def read_pairs(
    pairs: Iterable[Pair], name: str, classes: Sequence[str], code: LabelCode, source: Path
) -> Split:
    """Check that each image has a label map of its size; a pair that is not good is dropped, with a warning.

    Args:
        pairs: images and where their maps should be.
        name: what the split is called ("train", "val").
        classes: names by label.
        code: what the maps' numbers mean.
        source: the folder or list that they come from, for messages.
    """
    pairs = list(pairs)
    findings: list[Finding] = []
    report_duplicates((pair[0] for pair in pairs), "image id", source, findings, "give each its own name")
    with ThreadPoolExecutor(READERS) as pool:
        sizes = list(pool.map(_sizes, pairs))
    records = []
    for (image_id, image, labels), found in zip(pairs, sizes, strict=True):
        if isinstance(found, Finding):
            findings.append(found)
            continue
        records.append(
            Record(
                image_id, image, *found,
                boxes_K4=np.zeros((0, 4), np.float32), labels_K=np.zeros(0, np.int64),
                ignore_K=np.zeros(0, np.bool_), areas_K=np.zeros(0, np.float32),
                label_map=LabelMap(labels, code),
            )
        )  # fmt: skip
    report_empty(name, len(records), len(records), source, findings)
    return Split(name, Records.pack(records), tuple(classes), None, source, findings)


def _sizes(pair: Pair) -> tuple[int, int] | Finding:
    """(height, width) of a good pair, or what is wrong with it."""
    _, image, labels = pair
    if not is_file(labels):
        message, fix = f"has no label map {labels} and was dropped", "restore the map or delete the image"
        return Finding("warning", "missing label map", image, message, fix)
    try:
        size, label_size = image_sizes(image)[0], image_sizes(labels)[0]
    except UserError as error:
        message, _, fix = str(error).partition("; ")
        return Finding("warning", "unreadable image", image, f"{message}, and was dropped", fix)
    if size != label_size:
        (height, width), (label_height, label_width) = size, label_size
        message = f"is {label_width}×{label_height}, and its image {width}×{height}; the pair was dropped"
        return Finding("warning", "wrong size", labels, message, "export the map at the image's size")
    return size


def numbered(classes: Sequence[str], ignored: int = UNLABELED) -> LabelCode:
    """The code of maps whose numbers are the labels, but for one that means no class."""
    code = coded(range(len(classes)), [ignored])
    code.classes_256[ignored] = UNLABELED
    return code


def coded(numbers: Sequence[int], others: Iterable[int] = ()) -> LabelCode:
    """The code of maps in which label i is ``numbers[i]``; ``others`` may occur and mean no class."""
    classes_256 = np.full(256, UNLABELED, np.uint8)
    classes_256[list(numbers)] = np.arange(len(numbers))
    declared_256 = np.zeros(256, np.bool_)
    declared_256[[*numbers, *others, UNLABELED]] = True
    return LabelCode(classes_256, declared_256)


# --- folders of pairs ------------------------------------------------------------------------------------


def find_label_folders(root: Path) -> dict[str, Path]:
    """The images folder of each split, ``images/SPLIT`` or ``SPLIT/images``, with label maps in its labels."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        places = [place for name in names for place in (("images", name), (name, "images"))]
        folders = (folder for place in places if (folder := find_folder(root, *place)) is not None)
        folder = next((folder for folder in folders if _holds_images(labels_folder(folder))), None)
        if folder is not None:
            found[split] = folder
    return found


def _holds_images(folder: Path) -> bool:
    return folder.is_dir() and any(is_image(path) for path in files_below(folder))


def open_label_folders(config: DataConfig) -> dict[str, Split]:
    """Find and read the pairs of ``config.root``; ``data.train`` and ``data.val`` name other images folders.

    Raises:
        UserError: no such folder, or nothing names the classes.
    """
    root = _root(config)
    folders = find_label_folders(root)
    for split, given in (("train", config.train), ("val", config.val)):
        if given is not None:
            folders[split] = _given_folder(root, given, split)
    class_file = find_entry(root, "classes.json")
    named, ignored = _class_file(class_file)
    classes = named or config.classes
    if classes is None:
        raise UserError(
            f'{root}: nothing names the classes; write classes.json ({{"classes": [...]}}) or set data.classes '
            f"in the order of the numbers; the folder holds {describe_folder(root)}"
        )
    if len(classes) > UNLABELED:
        where = f"{class_file if named else root}: {'' if named else 'data.classes: '}"
        raise UserError(
            f"{where}{len(classes)} classes; a label map has numbers of 8 bits, 0…{UNLABELED - 1} for "
            f"classes: name {UNLABELED} at most"
        )
    code = numbered(classes, ignored)
    splits = {}
    for name, folder in folders.items():
        pairs, orphans = _pairs(folder)
        splits[name] = read_pairs(pairs, name, classes, code, folder)
        message, fix = "there is no image of this label map", "restore the image or delete the map"
        splits[name].findings.extend(
            Finding("warning", "label map without image", file, message, fix) for file in orphans
        )
    return _selected(splits, config, named is not None)


def _given_folder(root: Path, given: str, split: str) -> Path:
    places = [("images", given), (given, "images"), (given,)]
    candidates = [*(folder for place in places if (folder := find_folder(root, *place))), Path(given)]
    folder = next((path for path in candidates if is_folder(path) and labels_folder(path) != path), None)
    if folder is None:
        images = find_folder(root, "images")
        known = [name for name in entry_names(images or root) if ((images or root) / name).is_dir()]
        raise UserError(f"{root}: data.{split}: no images folder {given!r}; {nearest(given, known)}")
    return folder


def _pairs(images: Path) -> tuple[list[Pair], list[Path]]:
    """Each image with its label map or where that should be; and the maps of no image."""
    labels = labels_folder(images)
    maps = {path.relative_to(labels).with_suffix(""): path for path in files_below(labels) if is_image(path)}
    pairs = []
    for path in sorted(files_below(images)):
        if is_image(path):
            name = path.relative_to(images).with_suffix("")
            pairs.append((name.as_posix(), path, maps.pop(name, labels / f"{name}.png")))
    return pairs, sorted(maps.values())


def _class_file(file: Path | None) -> tuple[tuple[str, ...] | None, int]:
    """The names in classes.json, if it is there, and the number that means no class."""
    if file is None:
        return None, UNLABELED
    try:
        tree = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); correct it") from None
    tree = tree if isinstance(tree, dict) else {}
    names, ignored = tree.get("classes"), tree.get("ignore_index", UNLABELED)
    names = names if isinstance(names, list) and all(type(name) in (str, int) for name in names) else []
    right = len(names) > 0 and type(ignored) is int and 0 <= ignored <= UNLABELED
    if not right:
        raise UserError(
            f'{file}: write {{"classes": [names, each once, by number], "ignore_index": {UNLABELED}}}'
        )
    return distinct_names(map(str, names), file), ignored


# --- Cityscapes ------------------------------------------------------------------------------------------


def find_cityscapes(root: Path) -> bool:
    """Whether ``root`` holds ``leftImg8bit`` and ``gtFine``."""
    return (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir()


def open_cityscapes(config: DataConfig) -> dict[str, Split]:
    """Read ``train`` and ``val`` (the test part's maps are empty), or the parts that ``data`` names.

    Maps are taken as ``labelTrainIds``, where those were generated, else as ``labelIds``.

    Raises:
        UserError: no such part.
    """
    root = _root(config)
    splits = {}
    for name, chosen in (("train", config.train), ("val", config.val)):
        given = chosen or name
        images = root / "leftImg8bit" / given
        if chosen is None and not is_folder(images):
            continue
        if not is_folder(images):
            known = sorted(path.name for path in (root / "leftImg8bit").glob("*") if path.is_dir())
            raise UserError(f"{root}: data.{name}: no part {given!r}; {nearest(given, known)}")
        found = sorted(images.rglob("*_leftImg8bit.png"))
        stems = [path.relative_to(images).as_posix().removesuffix("_leftImg8bit.png") for path in found]
        labels = root / "gtFine" / given
        trained = any(labels.rglob("*_gtFine_labelTrainIds.png"))
        kind = "labelTrainIds" if trained else "labelIds"
        code = (
            numbered(tuple(CITYSCAPES)) if trained else coded(list(CITYSCAPES.values()), range(CITYSCAPES_IDS))
        )
        pairs = [(s, path, labels / f"{s}_gtFine_{kind}.png") for s, path in zip(stems, found, strict=True)]
        splits[name] = read_pairs(pairs, name, tuple(CITYSCAPES), code, images)
    return _selected(splits, config)


# --- Pascal VOC ------------------------------------------------------------------------------------------


def open_voc_segmentation(config: DataConfig) -> dict[str, Split]:
    """Read ``train`` and ``val``, or the sets that ``data`` names, of the one year in ``root``.

    Raises:
        UserError: no such set, or several years are there.
    """
    root = _root(config)
    years = find_voc(root, "Segmentation")
    if len(years) != 1:
        seen = ", ".join(year.name for year in years) or "none"
        raise UserError(
            f"{root}: ImageSets/Segmentation of one year is wanted, found {seen}; set data.root to one"
        )
    (year,) = years
    splits = {}
    for name, chosen in (("train", config.train), ("val", config.val)):
        given = (chosen or name).removesuffix(".txt")
        file = year / "ImageSets" / "Segmentation" / f"{given}.txt"
        if chosen is None and not is_file(file):
            continue
        if not is_file(file):
            known = sorted(path.stem for path in file.parent.glob("*.txt"))
            raise UserError(f"{file}: data.{name}: no such image set; {nearest(given, known)}")
        stems = [line.split()[0] for line in read_image_set(file)]
        pairs = [
            (stem, year / "JPEGImages" / f"{stem}.jpg", year / "SegmentationClass" / f"{stem}.png")
            for stem in stems
        ]
        splits[name] = read_pairs(pairs, name, VOC, numbered(VOC), file)
    return _selected(splits, config)


def _root(config: DataConfig) -> Path:
    assert config.root is not None, "DataConfig refuses data without a root"
    return config.root


def _selected(splits: dict[str, Split], config: DataConfig, named: bool = True) -> dict[str, Split]:
    """Only the classes that were chosen, where they have names of their own; other pixels count nowhere."""
    if config.classes is None or not named:
        return splits
    return {name: select_classes(split, config.classes) for name, split in splits.items()}
