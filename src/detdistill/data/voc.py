"""Pascal VOC: one XML file for each image, lists of images in ``ImageSets/Main`` (Everingham et al. 2010)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from detdistill.config import DataConfig, UserError
from detdistill.data.cleaning import (
    FileIndex,
    RawObject,
    make_record,
    relabel,
    report_duplicates,
    report_empty,
    select_classes,
)
from detdistill.data.images import files_below, image_sizes, is_image
from detdistill.data.records import Finding, Record, Split


def read_voc(root: Path, image_set: str, name: str, classes: Sequence[str] | None = None) -> Split:
    """Read one image set.

    Args:
        root: the folder with Annotations, ImageSets and JPEGImages.
        image_set: a name in ``ImageSets/Main``, as "trainval".
        name: what the split is called ("train", "val").
        classes: keep these, in this order; by default all that occur, by alphabet.

    VOC counts pixels from 1 and includes the last one: a box becomes (xmin - 1, ymin - 1, xmax, ymax), a
    half-open one from 0. ``difficult`` objects are kept as ignored. Category ids are places in the alphabet.

    Raises:
        UserError: there is no such image set, or a class is unknown.
    """
    file = root / "ImageSets" / "Main" / f"{image_set}.txt"
    stems = _stems(file)
    findings: list[Finding] = []
    report_duplicates(stems, "image id", file, findings, "list each image once")
    images = _images_by_stem(root / "JPEGImages")
    files = FileIndex()
    parsed: list[tuple[str, Path, tuple[int, int], list[Element], Path]] = []
    for stem in dict.fromkeys(stems):
        source = root / "Annotations" / f"{stem}.xml"
        image = images.get(stem, root / "JPEGImages" / f"{stem}.jpg")
        tree = _parse(source, findings)
        if tree is not None and files.check(image, source, findings):
            size = _size(tree, image, source, findings)
            if size is not None:
                parsed.append((stem, image, size, tree.findall("object"), source))
    names = sorted({_class_of(node) for *_, nodes, _ in parsed for node in nodes} - {""})
    label_of = {class_name: label for label, class_name in enumerate(names)}
    records: list[Record] = []
    for stem, image, size, nodes, source in parsed:
        objects = [_object(node, k, label_of, source, findings) for k, node in enumerate(nodes)]
        kept = [raw for raw in objects if raw is not None]
        records.append(make_record(stem, image, size, kept, source, findings, with_masks=False))
    report_empty(name, len(records), sum(len(r.labels_K) for r in records), file, findings)
    split = Split(name, records, tuple(names), None, file, findings)
    return split if classes is None else select_classes(split, classes)


def _stems(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: the image set cannot be read ({error}); correct data.train or data.val"
        ) from None
    # The lists of a single class (aeroplane_train.txt) have a second column of 1, 0 and -1.
    if lines and all(len(line.split()) == 2 and line.split()[1] in ("-1", "0", "1") for line in lines):
        return [line.split()[0] for line in lines]
    return lines


def _images_by_stem(folder: Path) -> dict[str, Path]:
    """Image files by name without suffix; of several, a JPEG, as VOC has it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: VOC keeps its images here, and there is no such folder; restore it")
    paths = sorted((path for path in files_below(folder) if is_image(path)), key=lambda p: p.suffix != ".jpg")
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return found


def _parse(source: Path, findings: list[Finding]) -> Element | None:
    try:
        return ElementTree.parse(source).getroot()
    except FileNotFoundError:
        message, fix = "the annotation file does not exist", "restore it or drop the image from the set"
        findings.append(Finding("error", "missing annotation", source, message, fix))
    except (ElementTree.ParseError, OSError, UnicodeError, ValueError) as error:
        message, fix = f"not XML ({error})", "it may be cut short: fetch or export it again"
        findings.append(Finding("error", "unreadable annotation", source, message, fix))
    return None


def _size(tree: Element, image: Path, source: Path, findings: list[Finding]) -> tuple[int, int] | None:
    try:
        size = int(float(tree.findtext("size/height", ""))), int(float(tree.findtext("size/width", "")))
        if min(size) > 0:
            return size
    except (ValueError, OverflowError):
        pass  # some tools leave the size out or write 0: the image's header knows it
    try:
        return image_sizes(image)[0]
    except UserError as error:
        findings.append(Finding("error", "unreadable image", source, str(error), "restore the image"))
        return None


def _class_of(node: Element) -> str:
    return node.findtext("name", "").strip()


def _object(
    node: Element, place: int, label_of: dict[str, int], source: Path, findings: list[Finding]
) -> RawObject | None:
    name, class_name = f"object {place + 1}", _class_of(node)
    if not class_name:
        message = f"{name} has no class name and was dropped"
        findings.append(Finding("warning", "unknown class", source, message, "write its <name>"))
        return None
    try:
        corners = [float(node.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        message = f"{name} ({class_name}) has no <bndbox> of four numbers and was dropped"
        findings.append(Finding("warning", "malformed box", source, message, "draw the box again or delete it"))
        return None
    x1, y1, x2, y2 = corners
    # One that ends where it starts is a slip of the mouse, not an object of one pixel. Tools that count from 0
    # write 0 for the edge, which must not become -1.
    box = corners if x2 <= x1 or y2 <= y1 else [x1 - 1 if x1 >= 1 else x1, y1 - 1 if y1 >= 1 else y1, x2, y2]
    difficult = node.findtext("difficult", "0").strip() in ("1", "true", "True")
    return RawObject(box, label_of[class_name], name, ignore=difficult)


# --- where the files are ---------------------------------------------------------------------------------


def find_voc(root: Path, sets: str = "Main") -> list[Path]:
    """The folders that hold ``ImageSets/SETS``: root, or years such as ``VOCdevkit/VOC2007``; empty if none."""
    candidates = [root, *sorted(root.glob("VOC*")), *sorted(root.glob("VOCdevkit/VOC*"))]
    return [folder for folder in candidates if (folder / "ImageSets" / sets).is_dir()]


def open_voc(config: DataConfig) -> dict[str, Split]:
    """Find and read the train and val sets of ``config.root``.

    Taken are ``train`` (else ``trainval``) and ``val`` (else ``test``), unless ``data.train`` and ``data.val``
    name others. A year is named as ``VOC2007/trainval``, several as ``VOC2007/trainval+VOC2012/trainval``.

    Raises:
        UserError: no set or several years are found, or a file is missing.
    """
    root = config.root
    assert root is not None, "DataConfig refuses VOC without a root"
    years = find_voc(root)
    splits = {}
    for name, given, usual in (
        ("train", config.train, ("train", "trainval")),
        ("val", config.val, ("val", "test")),
    ):
        if given is None:
            given = next((s for s in usual if any(_set_file(year, s).is_file() for year in years)), None)
        if given is not None:
            parts = [read_voc(*_locate(root, years, part.strip(), name), name) for part in given.split("+")]
            splits[name] = _merge(parts, root)
    if config.classes is None:
        return splits
    # Val need not show every class: only what train lacks is a wrong name.
    return {
        name: select_classes(split, config.classes if name == "train" or "train" not in splits else
                             [c for c in config.classes if c in split.classes])
        for name, split in splits.items()
    }  # fmt: skip


def _set_file(year: Path, image_set: str) -> Path:
    return year / "ImageSets" / "Main" / f"{image_set}.txt"


def _locate(root: Path, years: Sequence[Path], part: str, name: str) -> tuple[Path, str]:
    """The folder and the image set that ``VOC2007/trainval`` or ``trainval`` means."""
    folder, _, image_set = part.removesuffix(".txt").removeprefix("ImageSets/Main/").rpartition("/")
    fitting = [
        year
        for year in years
        if (not folder or folder in (year.name, year.relative_to(root).as_posix()))
        and _set_file(year, image_set).is_file()
    ]
    if len(fitting) == 1:
        return fitting[0], image_set
    known = sorted(
        f"{year.name}/{file.stem}" for year in years for file in (year / "ImageSets" / "Main").glob("*.txt")
    )
    problem = "is in several years" if fitting else "is no image set"
    raise UserError(f"{root}: data.{name}: {part!r} {problem}; set it to one of {', '.join(known[:12])}")


def _merge(parts: Sequence[Split], root: Path) -> Split:
    """Several years as one split."""
    if len(parts) == 1:
        return parts[0]
    names = sorted({class_name for part in parts for class_name in part.classes})
    merged = [relabel(part, names, names.index) for part in parts]
    findings = [finding for part in parts for finding in part.findings]
    records = [record for part in merged for record in part.records]
    twice = {stem for stem, times in Counter(record.image_id for record in records).items() if times > 1}
    if twice:
        message, fix = (
            f"{len(twice)} images (as {min(map(str, twice))}) are in two of the sets",
            "name each once",
        )
        findings.append(Finding("error", "duplicate image id", root, message, fix))
    return replace(merged[0], records=records, source=root, findings=findings)
