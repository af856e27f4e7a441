"""COCO JSON: one file for each split, with images, annotations and categories (cocodataset.org)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

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
from detdistill.data.images import image_sizes
from detdistill.data.records import Finding, Record, Split

ROBOFLOW_NAME = "_annotations.coco.json"
_SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
# They lie beside the boxes in the official download.
_OTHER_TASKS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")


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
        with_masks: keep segmentations (full COCO takes gigabytes with them).

    Category ids, image ids, ``area`` and ``iscrowd`` are kept; images without annotations are background.

    Raises:
        UserError: the file is not COCO JSON, the image folder is not found, or a class is unknown.
    """
    data = _load(annotations)
    findings: list[Finding] = []
    categories = _categories(data, annotations)
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    rows = [row for row in map(_with_id, data["images"]) if _is_image_row(row, annotations, findings)]
    files = FileIndex()
    folder = images or _image_folder(annotations, name, rows, files)
    report_duplicates((row["id"] for row in rows), "image id", annotations, findings)
    report_duplicates(_given_ids(data["annotations"]), "annotation id", annotations, findings)

    rows_by_id = {row["id"]: row for row in reversed(rows)}  # the first of each id stays
    objects = _objects_by_image(data["annotations"], rows_by_id, label_of, annotations, findings)
    records: list[Record] = []
    for image_id, row in reversed(rows_by_id.items()):
        path = _image_file(folder, row, files)
        if not files.check(path, annotations, findings):
            continue
        size = _declared_size(row, path, annotations, findings)
        if size is not None:
            found = objects.get(image_id, [])
            records.append(make_record(image_id, path, size, found, annotations, findings, with_masks))
    if with_masks:
        records = settle_masks(records, annotations, findings)
    report_empty(name, len(records), sum(len(r.labels_K) for r in records), annotations, findings)
    split = Split(
        name=name,
        records=records,
        classes=tuple(str(category["name"]) for category in categories),
        category_ids=tuple(category["id"] for category in categories),
        source=annotations,
        findings=findings,
    )
    return split if classes is None else select_classes(split, classes)


def image_files(annotations: Path, images: str | None, root: Path) -> list[Path]:
    """The image files that an annotation file lists; what is annotated in them is left alone.

    Args:
        annotations: the JSON file.
        images: ``data.images``, from ``root``; None looks beside the file.

    Raises:
        UserError: as :func:`read_coco`.
    """
    rows = [row for row in _load(annotations)["images"] if _is_image_row(row, annotations, [])]
    files = FileIndex()
    folder = _named_folder(root, images) if images else _image_folder(annotations, "", rows, files)
    return [_image_file(folder, row, files) for row in rows]


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file; check data.root, data.train and data.val") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); it may be cut short: fetch or export it again") from None
    if isinstance(data, list):
        raise UserError(f"{path}: a list, as detection results are; give the annotations, not the results")
    lists = ("images", "annotations", "categories")
    missing = [key for key in lists if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if missing:
        raise UserError(f"{path}: not COCO annotations: the list {missing[0]!r} is missing; it needs {lists}")
    return data


def _categories(data: Mapping[str, Any], source: Path) -> list[dict[str, Any]]:
    """By rising id, without the group that Roboflow writes before the real classes."""
    categories = [_with_id(category) for category in data["categories"]]
    for category in categories:
        if not isinstance(category, dict) or not isinstance(category.get("id"), int) or "name" not in category:
            raise UserError(f"{source}: category {category!r} needs an integer id and a name; add them")
    for key in ("id", "name"):
        values = [category[key] for category in categories]
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise UserError(f"{source}: two categories have the {key} {twice[0]!r}; give each its own")
    if not categories:
        raise UserError(f"{source}: no categories; list the classes under 'categories'")
    groups = {category.get("supercategory") for category in categories}
    used = {_as_id(row.get("category_id")) for row in data["annotations"] if isinstance(row, dict)}
    return sorted(
        (
            category
            for category in categories
            if category["id"] in used
            or category.get("supercategory") != "none"
            or category["name"] not in groups
        ),
        key=lambda category: category["id"],
    )


def _with_id(row: Any) -> Any:
    is_float = isinstance(row, dict) and isinstance(row.get("id"), float)
    return {**row, "id": _as_id(row["id"])} if is_float else row


def _as_id(value: Any) -> Any:
    """An id as others are compared with it (pandas writes 7.0 for 7); None for what is none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) else None


def _is_image_row(row: Any, source: Path, findings: list[Finding]) -> bool:
    if isinstance(row, dict) and isinstance(row.get("id"), int | str) and row.get("file_name"):
        return True
    message, fix = f"image entry {str(row)[:80]} lacks an id or file_name", "add them or delete the entry"
    findings.append(Finding("error", "malformed image", source, message, fix))
    return False


def _given_ids(rows: Iterable[Any]) -> list[Any]:
    ids = (row.get("id") for row in rows if isinstance(row, dict))
    return [value for value in ids if isinstance(value, int | str)]


def _declared_size(
    row: Mapping[str, Any], path: Path, source: Path, findings: list[Finding]
) -> tuple[int, int] | None:
    size = row.get("height"), row.get("width")
    if all(isinstance(side, int | float) and side >= 1 for side in size):
        return int(size[0]), int(size[1])  # type: ignore[arg-type]
    try:
        return image_sizes(path)[0]
    except UserError as error:
        message, fix = f"image {row['id']} has no size, and {error}", "restore the image"
        findings.append(Finding("error", "unreadable image", source, message, fix))
        return None


def _objects_by_image(
    rows: Sequence[Any],
    images: Mapping[Any, Any],
    label_of: Mapping[Any, int],
    source: Path,
    findings: list[Finding],
) -> dict[Any, list[RawObject]]:
    objects: dict[Any, list[RawObject]] = defaultdict(list)
    spelled = {str(image_id): image_id for image_id in images}  # "7" of one list is 7 of the other

    def drop(kind: str, message: str, fix: str) -> None:
        findings.append(Finding("warning", kind, source, f"{message} and was dropped", fix))

    for position, row in enumerate(rows):
        if not isinstance(row, dict):
            drop("malformed annotation", f"annotation {str(row)[:60]} is no mapping", "export it again")
            continue
        name = f"annotation {row.get('id', f'at place {position}')}"
        image_id, category_id = _as_id(row.get("image_id")), _as_id(row.get("category_id"))
        image_id = image_id if image_id in images else spelled.get(str(image_id), image_id)
        box = _xyxy(row.get("bbox"))
        if image_id not in images:
            drop("unknown image", f"{name} is of image {image_id!r}, which is not listed", "list the image")
        elif category_id not in label_of:
            message = f"{name} is of category {category_id}, which is not listed"
            drop("unknown class", message, "add it to 'categories'")
        elif box is None:
            message = f"{name} has the bbox {str(row.get('bbox'))[:60]}"
            drop("malformed box", message, "write [x, y, width, height]")
        else:
            crowd = bool(row.get("iscrowd"))
            label, area, mask = label_of[category_id], row.get("area"), row.get("segmentation")
            objects[image_id].append(RawObject(box, label, name, crowd, area, mask))
    return objects


def _xyxy(bbox: Any) -> tuple[float, float, float, float] | None:
    try:
        x, y, width, height = bbox
        x, y, width, height = float(x), float(y), float(width), float(height)
    except (TypeError, ValueError, OverflowError):
        return None
    return x, y, x + width, y + height


# --- where the files are ---------------------------------------------------------------------------------


def find_coco(root: Path) -> dict[str, list[Path]]:
    """The annotation files of each split ("train", "val", "test"); empty if the folder is not COCO."""
    found: dict[str, list[Path]] = {}
    for split, names in _SPLIT_NAMES.items():
        files: list[Path] = []
        for name in names:
            files.append(root / name / ROBOFLOW_NAME)
            for folder in (root / "annotations", root):
                files += [folder / f"{name}.json", *sorted(folder.glob(f"*_{name}.json"))]
                files += sorted(folder.glob(f"*_{name}2*.json"))  # instances_train2017.json
        files = [file for file in files if file.is_file() and not file.name.startswith(_OTHER_TASKS)]
        if files:
            found[split] = files
    return found


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


def _image_file(folder: Path, row: Mapping[str, Any], files: FileIndex) -> Path:
    """Where an image is: exporters also write its name URL-encoded, or with folders of another machine."""
    given = str(row["file_name"]).replace("\\", "/")
    plain = unquote(given)
    for path in (folder / given, folder / plain):
        if (found := files.find(path)) is not None:
            return found
    bare = files.find(folder / PurePosixPath(plain).name)
    elsewhere = not files.names((folder / given).parent)
    return bare if elsewhere and bare is not None else folder / given


def _image_folder(annotations: Path, name: str, rows: Sequence[Mapping[str, Any]], files: FileIndex) -> Path:
    """The folder from which the first file names lead to images."""
    root = annotations.parent.parent if annotations.parent.name == "annotations" else annotations.parent
    base = annotations.parent
    tail = annotations.stem.rsplit("_", 1)[-1]  # instances_train2017 → train2017
    names = [tail, name, *_SPLIT_NAMES.get(tail, ()), *_SPLIT_NAMES.get(name, ())]
    candidates = [root / part for part in names]
    candidates += [root / "images" / part for part in names]
    candidates += [root / "images", root, base, root / "data", root / "JPEGImages"]
    candidates = list(dict.fromkeys(folder for folder in candidates if folder.is_dir()))
    samples = [str(row["file_name"]).replace("\\", "/") for row in rows[:20]]
    for folder in candidates:
        if any((folder / sample).is_file() for sample in samples):
            return folder
    for folder in candidates:
        if any(files.has(_image_file(folder, row, files)) for row in rows[:20]):
            return folder
    if not samples:
        return root
    looked = ", ".join(str(folder.relative_to(root)) for folder in candidates)
    raise UserError(
        f"{annotations}: its images (as {samples[0]}) are not in {root} nor its folders ({looked}); "
        "set data.images to their folder"
    )
