"""Pascal VOC: one XML file for each image (Everingham et al. 2010), with lists of images in ``ImageSets/Main``,
or without, as LabelImg, Roboflow and CVAT's users write it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from detdistill.data.cleaning import (
    FileIndex,
    RawObject,
    make_record,
    name_key,
    relabel,
    report_duplicates,
    report_empty,
    select_classes,
)
from detdistill.data.formats.layout import (
    SPLIT_NAMES,
    describe_folder,
    entry_names,
    find_entry,
    find_folder,
    is_file,
)
from detdistill.data.images import files_below, image_sizes, is_image
from detdistill.data.records import Finding, Record, Records, Split
from detdistill.data.text import decode_text, read_file, read_lines, require_regular
from detdistill.errors import UserError
from detdistill.recipe import DataConfig

_IMAGE_FOLDERS = ("JPEGImages", "images")
_XML_FOLDERS = ("Annotations", "xmls", "xml")
_DECLARED = re.compile(rb"""<\?xml[^>]*?encoding\s*=\s*["']([A-Za-z0-9._-]+)""")
_ROOT = re.compile(rb"<(?:[\w.-]+:)?annotation[\s>]", re.IGNORECASE)
_LOOKED_AT = 50  # XML files of a folder, to tell whether they are VOC's
_NO_IMAGE = "restore the image or delete its XML file"


class _Pair(NamedTuple):
    """An image and its annotation: the id, and where the two files should be."""

    image_id: str
    xml: Path
    image: Path


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
    file = _set_file(root, image_set)
    stems = read_image_set(file)
    findings: list[Finding] = []
    report_duplicates(stems, "image id", file, findings, "list each image once")
    xmls = find_entry(root, "Annotations") or root / "Annotations"
    folders = [folder for part in _IMAGE_FOLDERS if (folder := find_folder(root, part)) is not None]
    images = _Images([*folders, xmls])
    if not images:
        raise UserError(
            f"{root}: no images in JPEGImages or images; it holds {describe_folder(root)}; restore JPEGImages"
        )
    files = FileIndex()
    pairs = []
    for stem in dict.fromkeys(stems):
        xml = xmls / f"{stem}.xml"
        image = images.find(stem) or root / "JPEGImages" / f"{stem}.jpg"
        pairs.append(_Pair(stem, Path(files.find(str(xml)) or xml), image))
    return _read_pairs(pairs, name, file, findings, classes)


def read_voc_folder(xmls: Path, root: Path, name: str, classes: Sequence[str] | None = None) -> Split:
    """Read all XML files of a folder; their images are in it, or in ``JPEGImages`` or ``images`` of the root.

    Args:
        xmls: the folder, without its subfolders.
        root: the folder of the data set.
        name, classes: as of :func:`read_voc`.

    Images without an XML file are left out, with a warning: nobody has looked at them.

    Raises:
        UserError: a class is unknown.
    """
    findings: list[Finding] = []
    parts = xmls.relative_to(root).parts if root in (xmls, *xmls.parents) else ()
    own, shared = [xmls], []
    for part in _IMAGE_FOLDERS:
        swapped = [part if name_key(p) in map(name_key, _XML_FOLDERS) else p for p in parts]
        own += [folder for folder in (find_folder(root, *swapped),) if folder is not None]
        shared += [folder for folder in (find_folder(root, part),) if folder is not None]
    images, others = _Images(own, deep=False), _Images(shared)
    pairs = []
    for file in map(Path, entry_names(xmls, ".xml")):
        image = images.find(file.stem) or others.find(file.stem) or xmls / f"{file.stem}.jpg"
        pairs.append(_Pair(file.stem, xmls / file, image))
    left_out = images.paths - {pair.image for pair in pairs}
    if left_out:
        message = f"{len(left_out)} images have no XML file and are left out, as {min(left_out)}"
        findings.append(Finding("warning", "missing annotation", xmls, message, "annotate or delete them"))
    return _read_pairs(pairs, name, xmls, findings, classes)


def _read_pairs(
    pairs: Iterable[_Pair], name: str, source: Path, findings: list[Finding], classes: Sequence[str] | None
) -> Split:
    files = FileIndex()
    parsed: list[tuple[_Pair, tuple[int, int], list[Element]]] = []
    for pair in pairs:
        tree = _parse(pair.xml, findings)
        if tree is not None and files.check(pair.image, pair.xml, findings, _NO_IMAGE):
            size = _size(tree, pair.image, pair.xml, findings)
            if size is not None:
                parsed.append((pair, size, list(tree.iter("object"))))
    names = sorted({_class_of(node) for *_, nodes in parsed for node in nodes} - {""})
    label_of = {class_name: label for label, class_name in enumerate(names)}
    records: list[Record] = []
    for pair, size, nodes in parsed:
        kept = [raw for k, node in enumerate(nodes) for raw in _objects(node, k, label_of, pair.xml, findings)]
        record = make_record(pair.image_id, pair.image, size, kept, pair.xml, findings, with_masks=False)
        records.append(replace(record, source=pair.xml))
    report_empty(name, len(records), sum(len(r.labels_K) for r in records), source, findings)
    split = Split(name, Records.pack(records), tuple(names), None, source, findings)
    return split if classes is None else select_classes(split, classes)


def read_image_set(file: Path) -> list[str]:
    """The names in a file of ``ImageSets``; the lists of a single class have a second column of 1, 0 and -1.

    Raises:
        UserError: it cannot be read.
    """
    lines = read_lines(file)
    if lines and all(len(line.split()) == 2 and line.split()[1] in ("-1", "0", "1") for line in lines):
        return [line.split()[0] for line in lines]
    return lines


class _Images:
    """The images of some folders by their names without suffix; of several, a JPEG, as VOC has it."""

    def __init__(self, folders: Iterable[Path], deep: bool = True) -> None:
        self._exact: dict[str, Path] = {}
        self._by_key: dict[str, set[str]] = {}
        for folder in dict.fromkeys(folders):
            below = files_below(folder) if deep else (folder / name for name in entry_names(folder))
            for path in sorted(filter(is_image, below), key=lambda p: (p.suffix != ".jpg", p)):
                stem = path.relative_to(folder).with_suffix("").as_posix()
                self._exact.setdefault(stem, path)
                self._by_key.setdefault(name_key(stem), set()).add(stem)

    def __bool__(self) -> bool:
        return bool(self._exact)

    @property
    def paths(self) -> set[Path]:
        """The images that can be found."""
        return set(self._exact.values())

    def find(self, stem: str) -> Path | None:
        """The image of this name, else the only one that has it in another letter case or Unicode form."""
        spellings = {stem} if stem in self._exact else self._by_key.get(name_key(stem), set())
        return self._exact[next(iter(spellings))] if len(spellings) == 1 else None


def _parse(source: Path, findings: list[Finding]) -> Element | None:
    if not os.path.lexists(source):
        message, fix = "the annotation file does not exist", "restore it or drop the image from the set"
        findings.append(Finding("error", "missing annotation", source, message, fix))
        return None
    try:
        return _xml(source)
    except UserError as error:
        message, _, fix = str(error).removeprefix(f"{source}: ").partition("; ")
        findings.append(Finding("error", "unreadable annotation", source, message, fix))
        return None


def _xml(source: Path) -> Element:
    """The tree of an XML file, in UTF-8 or the encoding that it declares.

    Raises:
        UserError: it cannot be read, or is not XML.
    """
    data = read_file(source)
    declared = _DECLARED.search(data[:200])
    encoding = declared[1].decode() if declared else "utf-8"
    try:
        # Expat itself knows UTF-8, UTF-16 and those of one byte; not, for instance, GBK.
        tree = ElementTree.fromstring(data.decode(encoding) if declared else data)
        for node in tree.iter():
            node.tag = node.tag.rpartition("}")[2].lower()  # without a namespace; some tools write <Object>
        if tree.tag != "annotation":
            raise UserError(f"{source}: its root is <{tree.tag[:40]}>, not VOC's <annotation>; export it again")
        return tree
    except LookupError:
        raise UserError(f"{source}: declares the unknown encoding {encoding}; save it as UTF-8") from None
    except UnicodeError:
        raise UserError(
            f"{source}: declares the encoding {encoding} and has another; save it as UTF-8"
        ) from None
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        if not declared:
            decode_text(data, source)  # another encoding is no XML, either
        raise UserError(f"{source}: not XML ({error}); it may be cut short: fetch or export it again") from None


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


def _objects(
    node: Element, place: int, label_of: dict[str, int], source: Path, findings: list[Finding]
) -> list[RawObject]:
    """What an <object> holds: one object, or one for each <bndbox> where it has several."""
    name, class_name = f"object {place + 1}", _class_of(node)
    if not class_name:
        message = f"{name} has no class name and was dropped"
        findings.append(Finding("warning", "unknown class", source, message, "write its <name>"))
        return []
    difficult = node.findtext("difficult", "0").strip().lower() in ("1", "1.0", "true", "yes")
    boxes = [_corners(box) for box in node.findall("bndbox")] or [None]
    if len(boxes) > 1:
        message = f"{name} ({class_name}) has {len(boxes)} <bndbox>, and each was taken as an object"
        findings.append(Finding("warning", "several boxes", source, message, "write one <object> for each"))
    if None in boxes:
        message = f"{name} ({class_name}) has no <bndbox> of four numbers and was dropped"
        findings.append(Finding("warning", "malformed box", source, message, "draw the box again or delete it"))
    return [RawObject(box, label_of[class_name], name, ignore=difficult) for box in boxes if box is not None]


def _corners(node: Element) -> list[float] | None:
    """xyxy from 0, the last pixel included, of a <bndbox>; None where it has not four numbers."""
    try:
        x1, y1, x2, y2 = corners = [float(node.findtext(key, "")) for key in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        return None
    # One that ends where it starts is a slip of the mouse, not an object of one pixel. Tools that count from 0
    # write 0 for the edge, which must not become -1.
    return corners if x2 <= x1 or y2 <= y1 else [x1 - 1 if x1 >= 1 else x1, y1 - 1 if y1 >= 1 else y1, x2, y2]


# --- where the files are ---------------------------------------------------------------------------------


def find_voc(root: Path, sets: str = "Main") -> list[Path]:
    """The folders that hold ``ImageSets/SETS``: root, or years such as ``VOCdevkit/VOC2007``; empty if none."""
    candidates = [root, *sorted(root.glob("VOC*")), *sorted(root.glob("VOCdevkit/VOC*"))]
    return [folder for folder in candidates if find_folder(folder, "ImageSets", sets) is not None]


def find_voc_folders(root: Path) -> dict[str, Path]:
    """Without ImageSets: the folder of XML files of each split; "train" has all where none is a split's."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        places = [place for name in names for place in _xml_places(name)]
        folders = (folder for place in places if (folder := find_folder(root, *place)) is not None)
        folder = next(filter(_has_voc_xml, folders), None)
        if folder is not None:
            found[split] = folder
    if not found:
        whole = [*((part,) for part in _XML_FOLDERS), (), ("images",)]
        candidates = (folder for place in whole if (folder := find_folder(root, *place)) is not None)
        for folder in filter(_has_voc_xml, candidates):
            return {"train": folder}
    return found


def _xml_places(name: str) -> list[tuple[str, ...]]:
    return [
        *((part, name) for part in _XML_FOLDERS),
        *((name, part) for part in _XML_FOLDERS),
        (name,),
        ("images", name),
    ]


def _has_voc_xml(folder: Path) -> bool:
    """Whether one of its first XML files is VOC's; one that is damaged does not hide the others."""
    return any(_looks_like_voc(folder / name) for name in entry_names(folder, ".xml")[:_LOOKED_AT])


def _looks_like_voc(file: Path) -> bool:
    try:
        require_regular(file)
        with file.open("rb") as opened:
            return _ROOT.search(opened.read(1024).replace(b"\0", b"")) is not None
    except (OSError, UserError):
        return False


def open_voc(config: DataConfig) -> dict[str, Split]:
    """Find and read the train and val sets of ``config.root``.

    Taken are ``train`` (else ``trainval``) and ``val`` (else ``test``), by default; ``data.train`` and
    ``data.val`` name others. A year is named as ``VOC2007/trainval``, several as
    ``VOC2007/trainval+VOC2012/trainval``. Without ImageSets they are folders of XML files.

    Raises:
        UserError: no set or several years are found, or a file is missing.
    """
    root = config.root
    assert root is not None, "DataConfig refuses VOC without a root"
    if config.images is not None:
        raise UserError(
            "data.images is not for VOC: put the images into JPEGImages, or next to their XML files"
        )
    years = find_voc(root)
    splits = _open_sets(config, root, years) if years else _open_folders(config, root)
    if config.classes is None:
        return splits
    # Val need not show every class: only what train lacks is a wrong name.
    return {
        name: select_classes(split, config.classes if name == "train" or "train" not in splits else
                             [c for c in config.classes if c in split.classes])
        for name, split in splits.items()
    }  # fmt: skip


def _open_folders(config: DataConfig, root: Path) -> dict[str, Split]:
    folders = find_voc_folders(root)
    for name, given in (("train", config.train), ("val", config.val)):
        if given is not None:
            places = [(given,), *_xml_places(given)]
            found = (folder for place in places if (folder := find_folder(root, *place)) is not None)
            folder = next(filter(_has_voc_xml, found), None)
            if folder is None:
                raise UserError(
                    f"{root}: data.{name}: no folder {given!r} with VOC's XML files, and no ImageSets/Main; "
                    f"{root} holds {describe_folder(root)}"
                )
            folders[name] = folder
    if not folders:
        raise UserError(
            f"{root}: no VOC data: no ImageSets/Main, and no XML files in Annotations, train, images or the "
            f"folder itself; it holds {describe_folder(root)}; set data.root to the folder of the data set"
        )
    return {name: read_voc_folder(folder, root, name) for name, folder in folders.items()}


def _open_sets(config: DataConfig, root: Path, years: Sequence[Path]) -> dict[str, Split]:
    splits = {}
    for name, given, usual in (
        ("train", config.train, ("train", "trainval")),
        ("val", config.val, ("val", "test")),
    ):
        if given is None:
            given = next((s for s in usual if any(is_file(_set_file(year, s)) for year in years)), None)
        if given is not None:
            parts = [read_voc(*_locate(root, years, part.strip(), name), name) for part in given.split("+")]
            splits[name] = _merge(parts, root)
    return splits


def _set_file(year: Path, image_set: str) -> Path:
    usual = year / "ImageSets" / "Main" / f"{image_set}.txt"
    return find_entry(year, "ImageSets", "Main", f"{image_set}.txt") or usual


def _locate(root: Path, years: Sequence[Path], part: str, name: str) -> tuple[Path, str]:
    """The folder and the image set that ``VOC2007/trainval`` or ``trainval`` means."""
    folder, _, image_set = part.removesuffix(".txt").removeprefix("ImageSets/Main/").rpartition("/")
    fitting = [
        year
        for year in years
        if (not folder or folder in (year.name, year.relative_to(root).as_posix()))
        and is_file(_set_file(year, image_set))
    ]
    if len(fitting) == 1:
        return fitting[0], image_set
    known = sorted(
        f"{year.name}/{Path(file).stem}"
        for year in years
        for file in entry_names(find_entry(year, "ImageSets", "Main") or year)
        if file.endswith(".txt")
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
    return replace(merged[0], records=Records.pack(records), source=root, findings=findings)
