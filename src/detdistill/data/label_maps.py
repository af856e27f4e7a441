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
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detdistill.config import DataConfig, UserError, nearest
from detdistill.data.cleaning import report_duplicates, report_empty, select_classes
from detdistill.data.images import READERS, UNREADABLE, files_below, image_sizes, is_image, labels_beside
from detdistill.data.records import UNLABELLED, Finding, LabelCode, LabelMap, Record, Split
from detdistill.data.voc import find_voc

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}

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

Pair = tuple[str, Path, Path]
"""An image's id, its file, and where its label map should be."""


def read_numbers(path: Path) -> NDArray[np.uint8]:
    """The numbers of a label map, (H, W); those over 255 become 255.

    Raises:
        UserError: the file is missing, cannot be decoded, or holds colours.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)  # of a palette: the indices
    except FileNotFoundError:
        raise UserError(f"{path}: no such label map; restore it or drop its image") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be decoded ({error}); restore it or drop its image") from None
    if pixels.ndim == 3 and (pixels[..., :1] == pixels[..., 1:3]).all():
        pixels = pixels[..., 0]  # grey, written as RGB
    if pixels.ndim != 2:
        raise UserError(f"{path}: holds colours, not class numbers; write a PNG of one channel or a palette")
    return np.minimum(pixels, UNLABELLED).astype(np.uint8)


def read_labels(label_map: LabelMap) -> NDArray[np.uint8]:
    """(H, W): each pixel's label, 255 where it has none.

    Raises:
        UserError: as :func:`read_numbers`.
    """
    return label_map.code.classes_256[read_numbers(label_map.path)]


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
    return Split(name, records, tuple(classes), None, source, findings)


def _sizes(pair: Pair) -> tuple[int, int] | Finding:
    """(height, width) of a good pair, or what is wrong with it."""
    _, image, labels = pair
    if not labels.is_file():
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


def numbered(classes: Sequence[str], ignored: int = UNLABELLED) -> LabelCode:
    """The code of maps whose numbers are the labels, but for one that means no class."""
    code = coded(range(len(classes)), [ignored])
    code.classes_256[ignored] = UNLABELLED
    return code


def coded(numbers: Sequence[int], others: Iterable[int] = ()) -> LabelCode:
    """The code of maps in which label i is ``numbers[i]``; ``others`` may occur and mean no class."""
    classes_256 = np.full(256, UNLABELLED, np.uint8)
    classes_256[list(numbers)] = np.arange(len(numbers))
    declared_256 = np.zeros(256, np.bool_)
    declared_256[[*numbers, *others, UNLABELLED]] = True
    return LabelCode(classes_256, declared_256)


# --- folders of pairs ------------------------------------------------------------------------------------


def find_label_folders(root: Path) -> dict[str, Path]:
    """The images folder of each split, ``images/SPLIT`` or ``SPLIT/images``, that has label maps beside it."""
    found = {}
    for split, names in _SPLITS.items():
        folders = [folder for name in names for folder in (root / "images" / name, root / name / "images")]
        folder = next(
            (folder for folder in folders if folder.is_dir() and _holds_images(labels_beside(folder))), None
        )
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
    named, ignored = _class_file(root / "classes.json")
    classes = named or config.classes
    if classes is None:
        raise UserError(
            f'{root}: nothing names the classes; write classes.json ({{"classes": [...]}}) or set data.classes '
            f"in the order of the numbers"
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
    candidates = [root / "images" / given, root / given / "images", root / given, Path(given)]
    folder = next((path for path in candidates if path.is_dir() and "images" in path.parts), None)
    if folder is None:
        known = sorted(path.name for path in (root / "images").glob("*") if path.is_dir())
        raise UserError(f"{root}: data.{split}: no images folder {given!r}; {nearest(given, known)}")
    return folder


def _pairs(images: Path) -> tuple[list[Pair], list[Path]]:
    """Each image with its label map or where that should be; and the maps of no image."""
    labels = labels_beside(images)
    maps = {path.relative_to(labels).with_suffix(""): path for path in files_below(labels) if is_image(path)}
    pairs = []
    for path in sorted(files_below(images)):
        if is_image(path):
            name = path.relative_to(images).with_suffix("")
            pairs.append((name.as_posix(), path, maps.pop(name, labels / f"{name}.png")))
    return pairs, sorted(maps.values())


def _class_file(file: Path) -> tuple[tuple[str, ...] | None, int]:
    """The names in classes.json, if it is there, and the number that means no class."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, UNLABELLED
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); correct it") from None
    names = tree.get("classes") if isinstance(tree, dict) else None
    ignored = tree.get("ignore_index", UNLABELLED) if isinstance(tree, dict) else None
    right = isinstance(names, list) and 0 < len(set(map(str, names))) == len(names) <= UNLABELLED
    if not right or not isinstance(ignored, int) or not 0 <= ignored <= UNLABELLED:
        raise UserError(
            f'{file}: write {{"classes": [names, each once, by number], "ignore_index": {UNLABELLED}}}'
        )
    assert isinstance(names, list)
    return tuple(map(str, names)), ignored


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
        if chosen is None and not images.is_dir():
            continue
        if not images.is_dir():
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
        if chosen is None and not file.is_file():
            continue
        if not file.is_file():
            known = sorted(path.stem for path in file.parent.glob("*.txt"))
            raise UserError(f"{file}: data.{name}: no such image set; {nearest(given, known)}")
        stems = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
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
