"""Where the files of a YOLO data set are: Ultralytics' and Roboflow's YAML file, darknet's ``obj.data`` (which
CVAT exports), or folders and lists with a file of class names (LabelImg, Label Studio)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from detdistill.data.cleaning import name_key
from detdistill.data.formats.layout import (
    SPLIT_NAMES,
    describe_folder,
    entry_names,
    find_entry,
    find_folder,
    labels_folder,
)
from detdistill.data.images import files_below, is_image
from detdistill.data.text import decode_text, distinct_names, read_class_names, read_file, read_lines
from detdistill.errors import UserError

NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels", "predefined_classes.txt")
_LISTS = tuple(f"{name}.txt" for names in SPLIT_NAMES.values() for name in names)


def is_label_file(file: Path) -> bool:
    """Whether it may be the label file of an image, by its name."""
    if file.suffix.lower() != ".txt" or file.name.startswith(("._", "README")):
        return False
    return name_key(file.name) not in (*NAME_FILES, *_LISTS)


@dataclass(frozen=True)
class YoloLayout:
    """What a folder holds.

    Attributes:
        classes: their names; None where the file that lists the images has none.
        images: by split, folders and lists of images.
        keypoints: numbers of key points that follow a box.
    """

    classes: tuple[str, ...] | None
    images: dict[str, list[Path]]
    keypoints: int = 0


def find_yolo(root: Path) -> YoloLayout | None:
    """Look for a data set's YAML file (``root`` itself may be it), for darknet's ``obj.data``, for folders of
    images and labels, or for lists of images with a file of class names.

    Raises:
        UserError: several YAML files could be meant, or the one there is wrong.
    """
    if root.is_file():
        return _layout_of_darknet(root) if root.suffix == ".data" else _layout_of_yaml(root)
    found = [file for file in _yaml_files(root) if _looks_like_dataset(file)]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{root}: several dataset files: {names}; set data.root to the one you mean")
    if found:
        return _layout_of_yaml(found[0])
    darknet = find_entry(root, "obj.data")
    if darknet is not None and darknet.is_file():
        return _layout_of_darknet(darknet)
    images = {split: folders for split in SPLIT_NAMES if (folders := _folders(root, split))}
    if not images:
        whole = [folder for folder in (find_folder(root, "images"), root) if folder and _has_labels(folder)]
        images = {"train": whole[:1]} if whole else _lists(root)
    return YoloLayout(None, images) if images else None


def _folders(root: Path, split: str) -> list[Path]:
    """The folders with the images of a part."""
    for name in SPLIT_NAMES[split]:
        # Images and labels in folders of their own, else together.
        for places in ([("images", name), (name, "images")], [(name,)]):
            folders = [folder for parts in places if (folder := find_folder(root, *parts))]
            folders = [folder for folder in folders if _has_labels(folder)]
            if folders:
                return folders
    return []


def _has_labels(images: Path) -> bool:
    """Whether there are label files; in a folder without one of labels, such with the name of an image."""
    labels = labels_folder(images)
    if labels != images and labels.is_dir():
        # Not any folder of that name: those of segmentation sets hold pictures.
        return any(is_label_file(file) for file in files_below(labels))
    stems = {name[:-4] for name in entry_names(images, ".txt") if is_label_file(Path(name))}
    return bool(stems) and any(name.stem in stems and is_image(name) for name in map(Path, entry_names(images)))


def _lists(root: Path) -> dict[str, list[Path]]:
    """Lists as ``train.txt`` and ``val.txt``, where a file of class names makes clear what they are."""
    if not any(find_entry(root, name) for name in NAME_FILES):
        return {}
    found = {}
    for split, names in SPLIT_NAMES.items():
        files = [file for name in names if (file := find_entry(root, f"{name}.txt")) and _is_list(file)]
        if files:
            found[split] = files[:1]
    return found


def _is_list(file: Path) -> bool:
    return file.is_file() and any(is_image(Path(line)) for line in read_lines(file)[:1])


def class_names(base: Path, images: dict[str, list[Path]]) -> tuple[str, ...] | None:
    """The names in a ``classes.txt`` or the like, with the data set, its labels or its images.

    LabelImg writes one with each folder of labels, of the classes that were used so far: where there are
    several, the longest must begin with all others.

    Raises:
        UserError: a file cannot be read, or two number the classes differently.
    """
    folders = [base, base / "labels"]
    for source in (source for sources in images.values() for source in sources if source.is_dir()):
        own = [source, labels_folder(source)]
        folders += own + [folder.parent for folder in own if base in folder.parent.parents]
    found = (find_entry(folder, name) for folder in dict.fromkeys(folders) for name in NAME_FILES)
    files = dict.fromkeys(file for file in found if file is not None and file.is_file())
    named = [(read_class_names(file), file) for file in files]
    if not named:
        return None
    longest, where = max(named, key=lambda pair: len(pair[0]))
    for names, file in named:
        if names != longest[: len(names)]:
            raise UserError(f"{file}: numbers the classes in another way than {where}; keep the right one")
    return longest


# --- the data set's YAML file ----------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Refuses what a data set does not need: aliases within aliases can stand for more than any memory."""

    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > 20:
                raise yaml.composer.ComposerError(problem="more than 20 aliases")
        return super().compose_node(parent, index)


def _yaml_files(root: Path) -> list[Path]:
    names = [name for name in entry_names(root) if Path(name).suffix.lower() in (".yaml", ".yml")]
    return [root / name for name in names if (root / name).is_file()]


def _looks_like_dataset(file: Path) -> bool:
    """Whether it has the keys ``names`` and ``train``, as far as can be seen without parsing it."""
    data = read_file(file).replace(b"\0", b"")  # also in UTF-16, to be refused by name
    return all(re.search(rb"\b" + key + rb"[\"']?\s*:", data) for key in (b"names", b"train"))


def _parse_dataset(file: Path) -> dict[str, yaml.Node]:
    """The YAML file's values by key, not yet converted: the class name ``no`` is not False.

    Raises:
        UserError: it cannot be read, is not YAML, or is no mapping; one line with the file.
    """
    text = decode_text(read_file(file), file)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is not None:
            loader.construct_document(root)  # values that mean nothing, as the date 2024-13-45
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}: not YAML: {problem}; correct it") from None
    except ValueError as error:
        raise UserError(f"{file}: a value cannot be read: {error}; correct it") from None
    except RecursionError:
        raise UserError(f"{file}: values are nested too deeply; correct it") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{file}: is no YOLO dataset file: it needs the keys names and train")
    tree: dict[str, yaml.Node] = {}
    for key, value in root.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in tree:
                raise UserError(f"{file}:{key.start_mark.line + 1}: {key.value} is written twice; keep one")
            tree[key.value] = value
    return tree


def _texts(node: yaml.Node | None) -> list[str]:
    """The text or texts that a node holds, as they are written; none of a null."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [] if node is None else [node]
    scalars = [item for item in nodes if isinstance(item, yaml.ScalarNode)]
    return [item.value for item in scalars if item.tag != "tag:yaml.org,2002:null" and item.value]


def _layout_of_yaml(file: Path) -> YoloLayout:
    tree = _parse_dataset(file)
    if not {"names", "train"} <= tree.keys():
        raise UserError(f"{file}: is no YOLO dataset file: it needs the keys names and train")
    folder = Path(next(iter(_texts(tree.get("path"))), "."))
    bases = list(dict.fromkeys([file.parent / folder, folder, file.parent]))
    keys = {name_key(key): key for key in tree}
    images = {}
    for split, names in SPLIT_NAMES.items():
        entries = next((texts for name in names if (texts := _texts(tree.get(keys.get(name, ""))))), [])
        if entries:
            images[split] = [existing_images(bases, entry, f"{file}: {split}") for entry in entries]
    names = _names_in(tree["names"], file)
    _require_count(next(iter(_texts(tree.get("nc"))), None), "nc", names, file)
    return YoloLayout(names, images, _keypoints(tree.get("kpt_shape"), file))


def _require_count(given: str | None, key: str, names: Sequence[str], file: Path) -> None:
    """Refuse a number of classes that is not that of their names."""
    if given is not None and given.strip() != str(len(names)):
        raise UserError(f"{file}: {key} is {given}, and names has {len(names)} classes; correct one of them")


def _names_in(node: yaml.Node, file: Path) -> tuple[str, ...]:
    """Class names as they are written: 02146, 1.10, null, no and on are names."""
    wrong = f"{file}: names must list the classes, as [cat, dog] or {{0: cat, 1: dog}}"
    if isinstance(node, yaml.MappingNode):
        pairs = node.value
        if not all(isinstance(part, yaml.ScalarNode) for pair in pairs for part in pair):
            raise UserError(wrong)
        numbered = {key.value: value.value for key, value in pairs}
        if sorted(numbered) != sorted(map(str, range(len(pairs)))):
            raise UserError(
                f"{file}: names must be numbered 0…{len(pairs) - 1} without gaps, each number once; "
                "add those missing"
            )
        return distinct_names((numbered[str(i)] for i in range(len(pairs))), file)
    if not isinstance(node, yaml.SequenceNode) or not all(isinstance(n, yaml.ScalarNode) for n in node.value):
        raise UserError(wrong)
    return distinct_names((item.value for item in node.value), file)


def _keypoints(node: yaml.Node | None, file: Path) -> int:
    numbers = _texts(node)
    if node is not None and not all(re.fullmatch(r"[0-9]{1,6}", number) for number in numbers):
        raise UserError(f"{file}: kpt_shape must be [key points, numbers of each], as [17, 3]")
    return math.prod(map(int, numbers)) if numbers else 0


def existing_images(bases: Iterable[Path], entry: str, what: str) -> Path:
    given = entry.replace("\\", "/")
    # Roboflow writes ../train/images for a folder next to the file.
    for part in dict.fromkeys((given, given.removeprefix("../"))):
        for base in bases:
            parts = [part] if Path(part).is_absolute() else PurePosixPath(part).parts
            candidate = find_entry(base, *parts) if parts else base
            if candidate is not None:
                return candidate
    # The folders of another machine: /home/ann/boards/images/train.
    parts = PurePosixPath(given).parts
    for start in range(1, len(parts) - (not given.endswith(".txt"))):
        for base in bases:
            candidate = find_entry(base, *parts[start:])
            if candidate is not None:
                return candidate
    looked = " or ".join(
        dict.fromkeys(f"{base} ({describe_folder(base, 5)})" for base in bases if base.is_dir())
    )
    raise UserError(f"{what}: no such images {entry!r} in {looked or 'any folder'}; correct the path")


# --- darknet's obj.data, which CVAT exports --------------------------------------------------------------


def _layout_of_darknet(file: Path) -> YoloLayout:
    """CVAT writes the paths in it as if the data set were in a folder ``data``."""
    pairs = (line.partition("=") for line in read_lines(file))
    values = {name_key(key.strip()): value.strip() for key, _, value in pairs}
    images = {}
    for split, names in SPLIT_NAMES.items():
        given = next((values[name] for name in names if values.get(name)), None)
        if given is not None:
            images[split] = [_listed_in_darknet(given, file)]
    if not images:
        raise UserError(f"{file}: has no line `train = LIST` and none `valid = LIST`; add the list of images")
    classes = read_class_names(_listed_in_darknet(values["names"], file)) if values.get("names") else None
    if classes is not None:
        _require_count(values.get("classes") or None, "classes", classes, file)
    return YoloLayout(classes, images)


def _listed_in_darknet(given: str, file: Path) -> Path:
    parts = PurePosixPath(given.replace("\\", "/")).parts
    found = (find_entry(file.parent, *parts[start:]) for start in range(len(parts)))
    path = next((path for path in found if path is not None), None)
    if path is None:
        raise UserError(f"{file}: no such file {given!r} in {file.parent}; correct its path")
    return path
