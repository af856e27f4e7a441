"""COCO JSON: one file for each split, with images, annotations and categories (cocodataset.org)."""

from __future__ import annotations

import gc
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import msgspec
import numpy as np
from numpy.typing import NDArray

from detdistill.data.cleaning import (
    FileIndex,
    box_finding,
    check_mask,
    clip_boxes,
    fill_areas,
    is_number,
    mask_finding,
    misplaced,
    report_duplicates,
    report_empty,
    select_classes,
    settle_masks,
)
from detdistill.data.images import image_sizes
from detdistill.data.masks import extent_of
from detdistill.data.packed import Packed
from detdistill.data.records import Finding, Masks, Records, Split, encode_id, encode_segmentation
from detdistill.data.text import require_regular
from detdistill.errors import UserError
from detdistill.recipe import DataConfig
from detdistill.text import is_text

ROBOFLOW_NAME = "_annotations.coco.json"
_SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
# They lie beside the boxes in the official download.
_OTHER_TASKS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")
_CHUNK = 512  # rows decoded at once: few enough to stay in the processor's cache
_LARGEST_SIDE = 2**24  # pixels; above it a size is a mistake, and float32 boxes are not exact
_NO_PLACE, _UNUSABLE_IMAGE = -1, -2  # not listed; listed, but its file or size is missing
_join = os.path.join  # a Path for each of many images takes seconds

Row = TypeVar("Row")


class _Image(msgspec.Struct, gc=False, kw_only=True):
    file_name: str
    height: int | float | None = None
    width: int | float | None = None
    id: int | str


class _Box(msgspec.Struct, gc=False, kw_only=True):
    """An annotation whose segmentation is skipped; in the order of COCO's own files, which is the fastest."""

    area: float | None = None
    iscrowd: int | float | bool | None = None
    image_id: int | str | None
    bbox: tuple[float, float, float, float] | None
    category_id: int | str | None
    id: int | str | None = None


class _Annotation(msgspec.Struct, gc=False, kw_only=True):
    segmentation: msgspec.Raw = msgspec.Raw()
    area: float | None = None
    iscrowd: int | float | bool | None = None
    image_id: int | str | None
    bbox: tuple[float, float, float, float] | None
    category_id: int | str | None
    id: int | str | None = None


class _Document(msgspec.Struct, gc=False):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: msgspec.Raw


_IMAGES = msgspec.json.Decoder(list[_Image])
_ANNOTATIONS = msgspec.json.Decoder(list[_Annotation])
_BOXES = msgspec.json.Decoder(list[_Box])
_POLYGONS = msgspec.json.Decoder(list[list[list[float]] | None])


def _chunks(
    rows: Sequence[Any],
    decoder: msgspec.json.Decoder[list[Row]],
    read_any: Callable[[Any], Row],
    source: Path,
) -> Iterator[tuple[int, list[Row]]]:
    """Some rows as structs at a time, with the place of the first.

    Args:
        rows: JSON, or what the standard library made of it.
        decoder: of a list of rows that are as the format says.
        read_any: the struct of any other.
        source: the file, for messages.
    """
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        if isinstance(chunk[0], msgspec.Raw):
            text = b"[" + b",".join(chunk) + b"]"
            try:
                yield start, decoder.decode(text)
                continue
            except (ValueError, RecursionError):
                chunk = _parse(text, source)
        yield start, [read_any(row) for row in chunk]


def read_coco(
    annotations: Path,
    images: Path | None,
    name: str,
    classes: Sequence[str] | None = None,
    with_masks: bool = True,
) -> Split:
    """Read one COCO annotation file.

    Args:
        annotations: the JSON file.
        images: the folder that its file names start from; None looks beside the file.
        name: what the split is called ("train", "val").
        classes: keep these, in this order; by default all, by rising category id.
        with_masks: keep segmentations.

    Category ids, image ids, ``area`` and ``iscrowd`` are kept; images without annotations are background.

    Raises:
        UserError: the file is not COCO JSON, the image folder is not found, or a class is unknown.
    """
    with _without_collector():
        return _read(annotations, images, name, classes, with_masks)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Reading makes millions of objects and no cycles; looking for cycles takes a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read(
    annotations: Path, images: Path | None, name: str, classes: Sequence[str] | None, with_masks: bool
) -> Split:
    findings: list[Finding] = []
    document = _load(annotations)
    categories = _categories(document.categories, annotations)
    rows = _image_rows(document.images, annotations, findings)
    files = FileIndex()
    folder = images or _image_folder(annotations, name, [row.file_name for row in rows], files)
    found = _usable_images(rows, folder, annotations, findings, files)
    objects = _read_objects(document.annotations, found, categories, annotations, with_masks, findings)
    del document, rows  # the whole file
    records = _records(found, objects, annotations, findings)
    if with_masks:
        records = settle_masks(records, annotations, findings)
    classes_of_file = _classes(categories, objects.used, annotations)
    label_of = np.full(len(categories), -1)
    label_of[classes_of_file] = np.arange(len(classes_of_file))
    split = Split(
        name=name,
        records=replace(records, labels_M=label_of[records.labels_M]),
        classes=tuple(categories[place].name for place in classes_of_file),
        category_ids=tuple(categories[place].given for place in classes_of_file),
        source=annotations,
        findings=findings,
    )
    report_empty(name, len(records), len(records.labels_M), annotations, findings)
    return split if classes is None else select_classes(split, classes)


def image_files(annotations: Path, images: str | None, root: Path) -> list[Path]:
    """The image files that an annotation file lists; what is annotated in them is left alone.

    Args:
        annotations: the JSON file.
        images: ``data.images``, from ``root``; None looks beside the file.

    Raises:
        UserError: as :func:`read_coco`.
    """
    names = [row.file_name for row in _image_rows(_load(annotations).images, annotations, [])]
    files = FileIndex()
    folder = _named_folder(root, images) if images else _image_folder(annotations, "", names, files)
    return [Path(_image_file(str(folder), name, files)) for name in names]


# --- the file --------------------------------------------------------------------------------------------


class _Lists(NamedTuple):
    """The lists of a file; rows are undecoded JSON, or objects where only the standard library reads them."""

    images: Sequence[Any]
    annotations: Sequence[Any]
    categories: list[Any]


def _load(path: Path) -> _Lists:
    try:
        require_regular(path)
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file; check data.root, data.train and data.val") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        document = msgspec.json.decode(data, type=_Document)
        categories = json.loads(bytes(document.categories))
        if isinstance(categories, list):
            return _Lists(document.images, document.annotations, categories)
    except (ValueError, RecursionError):
        pass  # NaN, a byte order mark, another encoding; or no COCO at all
    tree = _parse(data, path)
    if isinstance(tree, list):
        raise UserError(f"{path}: a list, as detection results are; give the annotations, not the results")
    lists = ("images", "annotations", "categories")
    missing = [key for key in lists if not isinstance(tree, dict) or not isinstance(tree.get(key), list)]
    if missing:
        raise UserError(f"{path}: not COCO annotations: the list {missing[0]!r} is missing; it needs {lists}")
    return _Lists(*(tree[key] for key in lists))


def _parse(text: bytes, source: Path) -> Any:
    """JSON as Python reads it: with NaN, numbers of any size, and every Unicode encoding."""
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        before = text[max(0, error.start - 20) : error.start].decode("utf-8", "replace")
        byte = f"byte 0x{text[error.start]:02x} after {before!r}"
        raise UserError(f"{source}: not JSON in UTF-8 ({byte}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{source}: not JSON ({error}); it may be cut short: fetch or export it again"
        ) from None


def _as_id(value: Any) -> int | str | None:
    """An id as others are compared with it (pandas writes 7.0 for 7); None for what is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) else None


def _number(value: Any) -> float | None:
    """A finite number, also one that is written as text; None for what is none."""
    if isinstance(value, str):
        try:
            value = float({"false": "0", "true": "1"}.get(value.strip().lower(), value))
        except ValueError:
            return None
    return float(value) if is_number(value) else None


def _integer(value: Any) -> int | None:
    """A whole number, also one that is written as text; None for what is none."""
    if type(value) is int:
        return value
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


# --- categories ------------------------------------------------------------------------------------------


class _Category(NamedTuple):
    id: int
    name: str
    group: str | None  # the supercategory
    given: int | str  # the id as the file has it, for results: a number, or a number written as text


def _categories(rows: Sequence[Any], source: Path) -> list[_Category]:
    """By rising id."""
    categories = []
    for row in rows:
        number = _integer(row.get("id")) if isinstance(row, dict) else None
        name = str(row.get("name", "")) if isinstance(row, dict) else ""
        if number is None or not name.strip() or not is_text(name):
            raise UserError(f"{source}: category {str(row)[:80]!r} needs an integer id and a name; add them")
        group = row.get("supercategory")
        given = row["id"] if isinstance(row["id"], str) else number
        categories.append(_Category(number, name, group if isinstance(group, str) else None, given))
    if not categories:
        raise UserError(f"{source}: no categories; list the classes under 'categories'")
    _refuse_doubles([category.id for category in categories], "id", source)
    return sorted(categories, key=lambda category: category.id)


def _refuse_doubles(values: Sequence[Any], key: str, source: Path) -> None:
    (value, times) = Counter(values).most_common(1)[0]
    if times > 1:
        raise UserError(f"{source}: two categories have the {key} {value!r}; give each its own")


def _classes(categories: Sequence[_Category], used: set[int], source: Path) -> list[int]:
    """The places of the classes, without the group that Roboflow writes before them."""
    groups = {category.group for category in categories}
    classes = [
        place
        for place, category in enumerate(categories)
        if place in used or category.group != "none" or category.name not in groups
    ]
    _refuse_doubles([categories[place].name for place in classes], "name", source)
    return classes


# --- images ----------------------------------------------------------------------------------------------


class _Images(NamedTuple):
    """The images that can be used, and the place of each id; of one that is listed and cannot, _UNUSABLE."""

    ids: list[int | str]
    paths: list[str]
    sizes: list[tuple[int, int]]
    places: dict[int | str, int]


def _image_rows(rows: Sequence[Any], source: Path, findings: list[Finding]) -> list[_Image]:
    """The rows with an id and a file name."""
    read: list[_Image] = []
    for start, chunk in _chunks(rows, _IMAGES, _any_image, source):
        read += [image for image in chunk if image.file_name]
        for place in (start + k for k, image in enumerate(chunk) if not image.file_name):
            message, fix = (
                f"image entry at place {place} lacks an id or file_name",
                "add them or delete the entry",
            )
            findings.append(Finding("error", "malformed image", source, message, fix))
    return read


def _any_image(row: Any) -> _Image:
    """Of an image entry that is not as the format says; without a name where it has no id or name."""
    image_id = _as_id(row.get("id")) if isinstance(row, dict) else None
    if image_id is None or not row.get("file_name"):
        return _Image(id="", file_name="")
    sides = [row.get(key) for key in ("height", "width")]
    height, width = (None if side is None else _number(side) or math.nan for side in sides)
    return _Image(id=image_id, file_name=str(row["file_name"]), height=height, width=width)


def _usable_images(
    rows: Sequence[_Image], folder: Path, source: Path, findings: list[Finding], files: FileIndex
) -> _Images:
    report_duplicates((row.id for row in rows), "image id", source, findings)
    images = _Images([], [], [], {})
    beside, prefix = files.names(folder), _join(folder, "")
    for row in rows:
        if row.id in images.places:  # the first of each id stays
            continue
        usable = row.file_name in beside
        path = f"{prefix}{row.file_name}" if usable else _image_file(str(folder), row.file_name, files)
        usable = usable or files.check(Path(path), source, findings)
        size = _size(row, path, source, findings) if usable else None
        if size is None:
            images.places[row.id] = _UNUSABLE_IMAGE
            continue
        images.places[row.id] = len(images.ids)
        images.ids.append(row.id)
        images.paths.append(path)
        images.sizes.append(size)
    return images


def _size(row: _Image, path: str, source: Path, findings: list[Finding]) -> tuple[int, int] | None:
    """(height, width) as declared, else as the image's header says."""
    height, width = row.height, row.width
    if height is not None and width is not None:
        if 1 <= height <= _LARGEST_SIDE and 1 <= width <= _LARGEST_SIDE:
            return int(height), int(width)
        message = f"image {row.id} has an impossible height or width; those of its file are used"
        findings.append(Finding("warning", "malformed size", source, message, "write them in pixels"))
    try:
        return image_sizes(Path(path))[0]
    except UserError as error:
        message, fix = f"image {row.id} has no size, and {error}", "restore the image"
        findings.append(Finding("error", "unreadable image", source, message, fix))
        return None


# --- objects ---------------------------------------------------------------------------------------------


_OBJECT = np.dtype([
    ("place", np.int64),  # in the file's list
    ("image", np.int64),
    ("label", np.int64),  # the place of its category
    ("box", np.float64, 4),  # xyxy pixels
    ("ignore", np.bool_),
    ("area", np.float64),  # pixels², NaN where none is given
])  # fmt: skip


class _Objects(NamedTuple):
    """The annotations of usable images, in the order of the file.

    Attributes:
        ids: of all annotations, also of those that were dropped.
        rows_M: of ``_OBJECT``.
        extents_M4: xyxy pixels, of their segmentations; NaN where there is none. None where they are not read.
        masks: JSON of their segmentations, empty where there is no usable one; None where they are not read.
        used: the places of all categories that occur.
    """

    ids: Sequence[int | str | None]
    rows_M: NDArray[Any]
    extents_M4: NDArray[np.float64] | None
    masks: list[bytes] | None
    used: set[int]


def _read_objects(
    rows: Sequence[Any],
    images: _Images,
    categories: Sequence[_Category],
    source: Path,
    with_masks: bool,
    findings: list[Finding],
) -> _Objects:
    image_places = _Lookup(images.places)
    label_places = _Lookup({category.id: place for place, category in enumerate(categories)})
    ids: list[int | str | None] = []
    used: set[int] = set()
    odd: dict[str, list[str]] = defaultdict(list)
    masks: list[bytes] = []
    extents: list[NDArray[np.float64]] = [np.zeros((0, 4))]
    doubtful: list[int] = []
    rows_M = np.empty(len(rows), _OBJECT)
    count = 0
    decoder: Any = _ANNOTATIONS if with_masks else _BOXES
    for start, chunk in _chunks(rows, decoder, partial(_any_annotation, odd=odd), source):
        ids += [row.id for row in chunk]
        of_image = image_places([row.image_id for row in chunk])
        labels = label_places([row.category_id for row in chunk])
        boxes = [row.bbox for row in chunk]
        places = np.arange(len(chunk))
        used.update(np.unique(labels).tolist())
        if of_image.min() < 0 or labels.min() < 0 or None in boxes:
            usable = (of_image >= 0) & (labels >= 0) & [box is not None for box in boxes]
            findings += [
                _dropped(chunk[k], _name(ids, start + k), of_image[k], labels[k], source)
                for k in np.flatnonzero(~usable & (of_image != _UNUSABLE_IMAGE)).tolist()
            ]
            places = places[usable]
            chunk = [chunk[k] for k in places]
        numbers = np.fromiter(chain.from_iterable(row.bbox for row in chunk), np.float64, 4 * len(chunk))
        part = rows_M[count : count + len(chunk)]
        count += len(chunk)
        part["place"] = start + places
        part["image"] = of_image[places]
        part["label"] = labels[places]
        part["box"] = numbers.reshape(-1, 4)
        flags = [row.iscrowd for row in chunk]
        part["ignore"] = [flag == 1 for flag in flags]
        if not {None, 0, 1}.issuperset(flags):
            odd["iscrowd"] += [
                f"{_name(ids, start + place)}: {flag!r}"
                for place, flag in zip(places.tolist(), flags, strict=True)
                if flag not in (None, 0, 1)
            ]
        part["area"] = np.array([row.area for row in chunk], np.float64)  # None becomes NaN
        if with_masks:
            texts, unclear, extents_K4 = _read_masks([row.segmentation for row in chunk])
            doubtful += [len(masks) + k for k in unclear]
            masks += texts
            extents.append(extents_K4)
    with np.errstate(over="ignore", invalid="ignore"):
        areas_M = rows_M["area"][:count].astype(np.float32)
    odd["area"] += [
        f"{_name(ids, rows_M['place'][k])}: {rows_M['area'][k]:g}"
        for k in np.flatnonzero((areas_M <= 0) | np.isinf(areas_M)).tolist()
    ]
    _report_odd(odd, source, findings)
    if len(set(ids)) < len(ids):
        report_duplicates((value for value in ids if value is not None), "annotation id", source, findings)
    objects = rows_M[:count]
    extents_M4 = np.concatenate(extents)
    for k in doubtful:
        image = objects["image"][k]
        name = f"{_name(ids, objects['place'][k])} of image {images.ids[image]}"
        mask = check_mask(json.loads(masks[k]), images.sizes[image], name, source, findings)
        masks[k] = b"" if mask is None else encode_segmentation(mask)
        if mask is not None:
            extents_M4[k] = extent_of(mask, *images.sizes[image])
    with np.errstate(over="ignore", invalid="ignore"):
        objects["box"][:, 2:] += objects["box"][:, :2]
    if not with_masks:
        return _Objects(ids, objects, None, None, used)
    return _Objects(ids, objects, extents_M4, masks, used)


def _name(ids: Sequence[int | str | None], place: int) -> str:
    """How a message calls an annotation: by its id, or by its place in the file."""
    return f"annotation {f'at place {place}' if ids[place] is None else ids[place]}"


class _Lookup:
    """The places of ids, also where one list has 7 and the other "7"; _NO_PLACE of one that is not there."""

    def __init__(self, places: Mapping[int | str, int]) -> None:
        self._places = places
        self._spelled = {str(key): place for key, place in places.items()}
        # A table by id, where ids are integers and not far apart: in nearly all files.
        numbers = [key for key in places if type(key) is int]
        self._first, last = min(numbers, default=0), max(numbers, default=0)
        small = abs(self._first) < 2**62 and last - self._first < 100 * len(numbers) + 1000
        self._table = np.full(last - self._first + 1 if small else 0, _NO_PLACE)
        if small:
            self._table[np.array(numbers, np.int64) - self._first] = [places[key] for key in numbers]

    def __call__(self, ids: Sequence[int | str | None]) -> NDArray[np.int64]:
        given = np.array(ids)
        if given.dtype == np.int64 and len(self._table):
            found: NDArray[np.int64] = self._table.take(given - self._first, mode="clip")
            inside = (given >= self._first) & (given < self._first + len(self._table))
            if inside.all() and found.min() > _NO_PLACE:
                return found
        return np.array([self._place(value) for value in ids], np.int64)

    def _place(self, value: int | str | None) -> int:
        place = None if value is None else self._places.get(value)
        return self._spelled.get(str(value), _NO_PLACE) if place is None else place


def _dropped(row: _Annotation, name: str, place: int, label: int, source: Path) -> Finding:
    """Why an annotation is left out."""
    if row.image_id is None and row.category_id is None and row.bbox is None:
        kind, problem, fix = "malformed annotation", "has no image, category or bbox", "export it again"
    elif place == _NO_PLACE:
        problem = f"is of image {row.image_id!r}, which is not listed"
        kind, fix = "unknown image", "list the image"
    elif label == _NO_PLACE:
        problem = f"is of category {row.category_id!r}, which is not listed"
        kind, fix = "unknown class", "add it to 'categories'"
    else:
        kind, problem, fix = "malformed box", "has no bbox of four numbers", "write [x, y, width, height]"
    return Finding("warning", kind, source, f"{name} {problem} and was dropped", fix)


def _any_annotation(row: Any, odd: dict[str, list[str]]) -> _Annotation:
    """Of an annotation that is not as the format says; ``odd`` gets the values that should be numbers."""
    if not isinstance(row, dict):
        return _Annotation(image_id=None, category_id=None, bbox=None)

    def number(key: str) -> float | None:
        value = row.get(key)
        if value is None or value == "":
            return None
        read = _number(value)
        if read is None:
            odd[key].append(f"annotation {row.get('id')}: {str(value)[:40]!r}")
        return read

    raw = msgspec.Raw()
    if row.get("segmentation") is not None:
        try:
            raw = msgspec.Raw(msgspec.json.encode(row["segmentation"]))
        except (ValueError, OverflowError, RecursionError):
            raw = msgspec.Raw(b'"unreadable"')
    return _Annotation(
        image_id=_as_id(row.get("image_id")),
        category_id=_as_id(row.get("category_id")),
        bbox=_box(row.get("bbox")),
        id=_as_id(row.get("id")),
        area=number("area"),
        iscrowd=number("iscrowd"),
        segmentation=raw,
    )


def _box(bbox: Any) -> tuple[float, float, float, float] | None:
    if not isinstance(bbox, list):  # not the text "1234" of four digits
        return None
    try:
        x, y, width, height = map(float, bbox)
    except (TypeError, ValueError, OverflowError):
        return None
    return x, y, width, height


def _report_odd(odd: Mapping[str, Sequence[str]], source: Path, findings: list[Finding]) -> None:
    for key, wanted, taken in (
        ("iscrowd", "0 or 1", "taken as 0"),
        ("area", "a number above 0", "their box's area is used"),
    ):
        if found := odd.get(key):
            message = f"the {key} of {len(found)} annotations is not {wanted} ({found[0]}); {taken}"
            findings.append(Finding("warning", f"malformed {key}", source, message, f"write {wanted}"))


def _read_masks(given: Sequence[msgspec.Raw]) -> tuple[list[bytes], list[int], NDArray[np.float64]]:
    """Segmentations as JSON, empty for an object without; which of them are not simply polygons; and the
    extents of the others, (K, 4) xyxy."""
    texts = [bytes(raw) for raw in given]
    extents_K4 = np.full((len(texts), 4), np.nan)
    if not any(len(text) > len("[]") for text in texts):
        return [b""] * len(texts), [], extents_K4
    try:
        decoded = _POLYGONS.decode(b"[" + b",".join(text or b"null" for text in texts) + b"]")
    except ValueError:  # run lengths, or something broken
        return texts, [k for k, text in enumerate(texts) if text], extents_K4
    texts = [text if polygons else b"" for text, polygons in zip(texts, decoded, strict=True)]
    doubtful = [
        k
        for k, polygons in enumerate(decoded)
        if polygons and not all(len(part) >= 6 and len(part) % 2 == 0 for part in polygons)
    ]
    for k in doubtful:
        decoded[k] = None
    given_K = np.array([bool(polygons) for polygons in decoded])
    if given_K.any():
        objects = list(filter(None, decoded))
        values = np.fromiter(chain.from_iterable(chain.from_iterable(objects)), np.float64).reshape(-1, 2)
        ends = np.cumsum([len(one[0]) if len(one) == 1 else sum(map(len, one)) for one in objects]) // 2
        starts = np.concatenate([[0], ends[:-1]])
        extents_K4[given_K, :2] = np.minimum.reduceat(values, starts)
        extents_K4[given_K, 2:] = np.maximum.reduceat(values, starts)
    return texts, doubtful, extents_K4


def _records(images: _Images, objects: _Objects, source: Path, findings: list[Finding]) -> Records:
    """Clip and drop boxes, drop masks that are not theirs, and bring the objects of each image together."""
    sizes_N2 = np.array(images.sizes, np.int64).reshape(-1, 2)
    rows_M = objects.rows_M
    sizes_M2 = sizes_N2[rows_M["image"]].astype(np.float64)
    boxes_M4, kept_M, moved_M = clip_boxes(rows_M["box"], sizes_M2)
    for k in np.flatnonzero(~kept_M | moved_M).tolist():
        image = rows_M["image"][k]
        name, box = _name(objects.ids, rows_M["place"][k]), rows_M["box"][k].tolist()
        size, image_id = images.sizes[image], images.ids[image]
        findings.append(box_finding(name, box, bool(kept_M[k]), size, source, image_id))
    if objects.masks is not None and objects.extents_M4 is not None:
        far_M = kept_M & misplaced(clip_boxes(objects.extents_M4, sizes_M2)[0], boxes_M4)
        for k in np.flatnonzero(far_M).tolist():
            objects.masks[k] = b""
            name = f"{_name(objects.ids, rows_M['place'][k])} of image {images.ids[rows_M['image'][k]]}"
            findings.append(mask_finding(name, objects.extents_M4[k].tolist(), boxes_M4[k].tolist(), source))
    order_M = np.argsort(rows_M["image"], kind="stable")
    order_M = order_M[kept_M[order_M]]
    boxes_M4 = boxes_M4[order_M]
    counts_N = np.bincount(rows_M["image"][order_M], minlength=len(images.ids))
    return Records(
        ids=Packed.pack([encode_id(image_id) for image_id in images.ids]),
        paths=Packed.pack_texts(images.paths),
        heights_N=sizes_N2[:, 0].copy(),
        widths_N=sizes_N2[:, 1].copy(),
        firsts=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_N)]),
        boxes_M4=boxes_M4,
        labels_M=rows_M["label"][order_M],
        ignore_M=rows_M["ignore"][order_M],
        areas_M=fill_areas(rows_M["area"][order_M], boxes_M4),
        masks=None if objects.masks is None else Masks(Packed.pack(objects.masks).take(order_M)),
    )


# --- where the files are ---------------------------------------------------------------------------------


def find_coco(root: Path) -> dict[str, list[Path]]:
    """The annotation files of each split ("train", "val", "test"); empty if the folder is not COCO.

    Where no file has the name of a split, one that is COCO is train: CVAT's ``instances_default.json``, Label
    Studio's ``result.json``.
    """
    folders = [folder for folder in (root / "annotations", root) if folder.is_dir()]
    files = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    files = [file for file in files if not file.name.startswith(_OTHER_TASKS)]
    found: dict[str, list[Path]] = {}
    for split, names in _SPLIT_NAMES.items():
        named = [root / name / ROBOFLOW_NAME for name in names if (root / name / ROBOFLOW_NAME).is_file()]
        named += [file for file in files if any(_is_named(file.stem.lower(), name) for name in names)]
        if named:
            found[split] = named
    if not found:
        files = [file for file in files if _looks_like_coco(file)]
        return {"train": files} if len(files) == 1 else {}
    return found


def _is_named(stem: str, split: str) -> bool:
    return stem == split or stem.endswith(f"_{split}") or f"_{split}2" in stem  # instances_train2017


def _looks_like_coco(file: Path) -> bool:
    """By its ends: the lists of images or annotations begin or end it (``categories`` alone are Label Studio's
    notes on a YOLO export)."""
    try:
        require_regular(file)
        with file.open("rb") as opened:
            start = opened.read(4096)
            opened.seek(max(0, file.stat().st_size - 4096))
            end = opened.read()
    except (OSError, UserError):
        return False
    if not start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return False
    rows = b'"categories"' in start and (b'"image_id"' in end or b'"file_name"' in end)
    return rows or b'"images"' in start or b'"annotations"' in start


def open_coco(config: DataConfig, with_masks: bool = True) -> dict[str, Split]:
    """Find and read the train and val files of ``config.root``.

    ``data.train`` and ``data.val`` name the files where the folder holds several; a lone test file serves
    for val.

    Raises:
        UserError: several files could be meant, none is found, or one cannot be read.
    """
    root = config.root
    assert root is not None, "DataConfig refuses COCO without a root"
    found = find_coco(root)
    if "val" not in found and "test" in found:
        found["val"] = found["test"]
    splits = {}
    for name, given in (("train", config.train), ("val", config.val)):
        file = _named_file(root, given, name) if given else _only_file(found.get(name, []), name, root)
        if file is not None:
            images = None if config.images is None else _named_folder(root, config.images)
            splits[name] = read_coco(file, images, name, config.classes, with_masks)
    return splits


def _named_file(root: Path, given: str, name: str) -> Path:
    for file in (root / given, root / "annotations" / given, Path(given)):
        if file.is_file():
            return file
    raise UserError(f"data.{name}: no such file {given!r} in {root}; give a path from data.root")


def _named_folder(root: Path, given: str) -> Path:
    for folder in (root / given, Path(given)):
        if folder.is_dir():
            return folder
    raise UserError(f"data.images: no such folder {given!r} in {root}; give a path from data.root")


def _only_file(files: Sequence[Path], name: str, root: Path) -> Path | None:
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(root)) for file in files)
        raise UserError(f"{root}: several files could be {name}: {names}; set data.{name} to the one you mean")
    return files[0] if files else None


def _image_file(folder: str, file_name: str, files: FileIndex) -> str:
    """Where an image is: exporters also write its name URL-encoded, or with folders of another machine."""
    given = file_name.replace("\\", "/")
    plain = unquote(given) if "%" in given else given
    for name in dict.fromkeys((given, plain)):
        found = files.find(_join(folder, name))
        if found is not None:
            return found
    elsewhere = not files.names(os.path.split(_join(folder, given))[0])
    bare = files.find(_join(folder, PurePosixPath(plain).name)) if elsewhere else None
    return bare or _join(folder, given)


def _image_folder(annotations: Path, name: str, file_names: Sequence[str], files: FileIndex) -> Path:
    """The folder from which the first file names lead to images."""
    root = annotations.parent.parent if annotations.parent.name == "annotations" else annotations.parent
    base = annotations.parent
    tail = annotations.stem.rsplit("_", 1)[-1]  # instances_train2017 → train2017
    names = [tail, name, *_SPLIT_NAMES.get(tail, ()), *_SPLIT_NAMES.get(name, ())]
    candidates = [root / part for part in names]
    candidates += [root / "images" / part for part in names]
    candidates += [root / "images", root, base, root / "data", root / "JPEGImages"]
    candidates = list(dict.fromkeys(folder for folder in map(_any_case, candidates) if folder.is_dir()))
    samples = [file_name.replace("\\", "/") for file_name in file_names[:20]]
    for folder in candidates:
        if any(files.has(_join(folder, sample)) for sample in samples):
            return folder
    for folder in candidates:
        if any(files.has(_image_file(str(folder), sample, files)) for sample in samples):
            return folder
    if not samples:
        return root
    looked = ", ".join(str(folder.relative_to(root)) for folder in candidates)
    raise UserError(
        f"{annotations}: its images (as {samples[0]}) are not in {root} nor its folders ({looked}); "
        "set data.images to their folder"
    )


def _any_case(folder: Path) -> Path:
    """The folder of this name, in capitals or not."""
    if folder.is_dir() or not folder.parent.is_dir():
        return folder
    found = (entry for entry in sorted(folder.parent.iterdir()) if entry.name.lower() == folder.name.lower())
    return next(found, folder)
