"""Every text file of a data set goes through one reader: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs
import json
import os

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from detdistill.data.formats.coco import find_coco
from detdistill.data.formats.label_maps import read_numbers
from detdistill.data.inspect import inspect_data
from detdistill.data.loading import open_data, usable_splits
from detdistill.data.text import distinct_names, read_class_names, read_lines, read_text
from detdistill.data.unlabeled import find_unlabeled
from detdistill.errors import UserError
from detdistill.recipe import DataConfig

ENCODINGS = {
    "cp1252": ("Straße".encode("cp1252"), r"is not UTF-8 \(byte 0xdf in line 1\); save it as UTF-8"),
    "cp950": ("第一".encode("cp950"), "is not UTF-8"),
    "utf-16": ("Straße".encode("utf-16"), "is UTF-16, not UTF-8"),
    "utf-16-be": (codecs.BOM_UTF16_BE + "a".encode("utf-16-be"), "is UTF-16, not UTF-8"),
    "utf-32": ("a".encode("utf-32"), "is UTF-32, not UTF-8"),
    "utf-16 without a mark": ("abc".encode("utf-16-le"), "holds NUL bytes"),
}


@pytest.mark.parametrize(("data", "message"), ENCODINGS.values(), ids=ENCODINGS)
def test_another_encoding_is_one_line_with_the_file(tmp_path, data, message):
    file = tmp_path / "classes.txt"
    file.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_text(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_lines_end_as_on_any_system_and_a_mark_is_no_text(tmp_path):
    file = tmp_path / "list.txt"
    file.write_bytes(codecs.BOM_UTF8 + " ä.png \r\nb.png\rc\u2028d.png\n\n".encode())
    assert read_lines(file) == ["ä.png", "b.png", "c\u2028d.png"]


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for name, message in (
        ("pipe.txt", "a pipe or a device"),
        (".", "is a folder"),
        ("gone.txt", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_text(tmp_path / name)


def test_a_class_name_is_there_once_and_has_a_letter(tmp_path):
    assert distinct_names(["a", "B"], tmp_path) == ("a", "B")
    for names, message in (
        (["a", "b", "a"], "classes 0 and 2 have the same name 'a'"),
        (["a", " "], "class 1 has an empty name"),
        (["a", "\ud800"], r"class 1 has half a character in its name '\\ud800'"),
        ([], "names no class"),
    ):
        with pytest.raises(UserError, match=message):
            distinct_names(names, tmp_path)


@pytest.mark.parametrize("form", ["yolo", "voc", "label maps", "recipe"])
def test_half_a_character_in_a_class_name_is_one_line_in_each_format(
    tmp_path, write_yolo, write_voc, voc_object, form
):
    classes = ("\ud800",) if form == "recipe" else None
    if form == "voc":
        write_voc(tmp_path, {"train": {"a": voc_object("&#xD800;", 1, 1, 20, 20)}})
    elif form == "label maps":
        for part in ("images", "labels"):
            (tmp_path / part / "train").mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / part / "train" / "a.png")
        (tmp_path / "classes.json").write_text('{"classes": ["a", "\\ud800"]}')
    else:
        write_yolo(tmp_path, {"train": {"a": "0 .5 .5 .5 .5"}})
        (tmp_path / "data.yaml").write_text('names: ["\\ud800"]\ntrain: images/train\n')
    with pytest.raises((UserError, ValidationError), match=r"half a character|not XML") as error:
        usable_splits(DataConfig(root=tmp_path, classes=classes), ["train"])
    assert form == "recipe" or "\n" not in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat, dog]\nnc: 3\n", "nc is 3, and names has 2 classes"),
        ("names: {0: cat}\nnc: two\n", "nc is two, and names has 1 classes"),
        ("names: [cat, dog]\nnc: 2\n", None),
        ("names: [cat, dog]\nnc:\n", None),
    ],
)
def test_the_number_of_classes_is_that_of_their_names(tmp_path, write_yolo, text, message):
    write_yolo(tmp_path, {"train": {"a": "0 .5 .5 .5 .5"}})
    (tmp_path / "data.yaml").write_text(f"{text}train: images/train\n")
    if message is None:
        assert open_data(DataConfig(root=tmp_path))["train"].classes == ("cat", "dog")
        return
    with pytest.raises(UserError, match=message):
        open_data(DataConfig(root=tmp_path))


def test_the_number_of_classes_of_darknet_is_that_of_their_names(tmp_path, write_yolo):
    write_yolo(tmp_path, {"train": {"a": "0 .5 .5 .5 .5"}})
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    (tmp_path / "train.txt").write_text("images/train/a.jpg\n")
    (tmp_path / "obj.data").write_text("classes = 3\ntrain = train.txt\nnames = obj.names\n")
    with pytest.raises(UserError, match=r"obj\.data: classes is 3, and names has 2 classes"):
        open_data(DataConfig(root=tmp_path))


@pytest.mark.parametrize("where", ["name", "file_name"])
def test_coco_in_latin_1_is_called_not_utf_8(tmp_path, where, write_coco):
    file = write_coco(tmp_path / "train.json", tmp_path, categories=[{"id": 7, "name": "cat"}])
    given = {"name": '"cat"', "file_name": '"1.png"'}[where]
    file.write_bytes(file.read_text().replace(given, '"Straße"').encode("latin-1"))
    with pytest.raises(
        UserError, match=r"train\.json: not JSON in UTF-8 \(byte 0xdf after .*Stra'\); save it"
    ) as error:
        open_data(DataConfig(root=tmp_path))
    assert "\n" not in str(error.value)


# --- each file of each format ----------------------------------------------------------------------------


def _yolo(tmp_path, write_yolo):
    rows = {"a": "1 .5 .5 .5 .5\n0 .2 .2 .1 .1\n"}
    write_yolo(tmp_path, {"train": rows, "val": rows})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "list.txt").write_text("images/train/a.jpg\n")
    return DataConfig(root=tmp_path, train="list.txt")


def _with_mark(file):
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())


@pytest.mark.parametrize("name", ["labels/train/a.txt", "classes.txt", "list.txt"])
def test_a_mark_in_a_file_of_yolo_changes_nothing(tmp_path, write_yolo, name):
    config = _yolo(tmp_path, write_yolo)
    _with_mark(tmp_path / name)
    splits = usable_splits(config, ["train", "val"])
    assert splits["train"].records[0].labels_K.tolist() == [1, 0]
    assert splits["train"].classes == ("cat", "dog")
    assert not any(split.findings for split in splits.values())


@pytest.mark.parametrize("name", ["labels/train/a.txt", "classes.txt", "list.txt"])
def test_another_encoding_in_a_file_of_yolo_stops_a_run(tmp_path, write_yolo, name):
    config = _yolo(tmp_path, write_yolo)
    (tmp_path / name).write_bytes("0 .5 .5 .1 .1 ß\n".encode("cp1252"))
    with pytest.raises(UserError, match=rf"{name}: is not UTF-8 \(byte 0xdf in line 1\)"):
        usable_splits(config, ["train", "val"])


def test_marks_in_data_yaml_and_image_sets(tmp_path, write_yolo, write_voc, voc_object):
    write_yolo(tmp_path / "yolo", {"train": {"a": "0 .5 .5 .5 .5"}})
    (tmp_path / "yolo" / "data.yaml").write_bytes(
        codecs.BOM_UTF8 + "names: [ä]\ntrain: images/train\n".encode()
    )
    assert open_data(DataConfig(root=tmp_path / "yolo"))["train"].classes == ("ä",)
    write_voc(tmp_path / "voc", {"train": {"ä": voc_object("dog", 1, 1, 9, 9)}})
    _with_mark(tmp_path / "voc" / "ImageSets" / "Main" / "train.txt")
    split = open_data(DataConfig(root=tmp_path / "voc"))["train"]
    assert [record.image_id for record in split.records] == ["ä"]
    assert not split.findings
    (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt").write_bytes("ä".encode("cp1252"))
    with pytest.raises(UserError, match=r"train\.txt: is not UTF-8"):
        open_data(DataConfig(root=tmp_path / "voc"))


def test_marks_in_classes_json_and_lists_without_labels(tmp_path):
    for part in ("train", "val"):
        for folder, pixels in (("images", np.zeros((4, 4, 3))), ("labels", np.arange(16).reshape(4, 4) % 2)):
            (tmp_path / folder / part).mkdir(parents=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / part / "a.png")
    (tmp_path / "classes.json").write_bytes(codecs.BOM_UTF8 + json.dumps({"classes": ["a", "b"]}).encode())
    assert open_data(DataConfig(root=tmp_path))["train"].classes == ("a", "b")
    config = DataConfig(root=tmp_path, unlabeled="more.txt")
    (tmp_path / "more.txt").write_bytes(codecs.BOM_UTF8 + b"images\\train\\a.png\r\n")
    assert find_unlabeled(config) == [tmp_path / "images" / "train" / "a.png"]
    assert inspect_data(config).unlabeled == 1
    for name, what in (("more.txt", config), ("classes.json", config)):
        (tmp_path / name).write_bytes("ß".encode("cp1252"))
        with pytest.raises(UserError, match=rf"{name}: is not UTF-8"):
            inspect_data(what)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso-8859-1", "gbk"])
def test_xml_has_the_encoding_that_it_declares(tmp_path, write_voc, voc_object, encoding):
    name = "中" if encoding == "gbk" else "ß"
    write_voc(tmp_path, {"train": {"a": voc_object(name, 1, 1, 9, 9)}})
    file = tmp_path / "Annotations" / "a.xml"
    declared = encoding.removesuffix("-sig")
    file.write_bytes(
        f'<?xml version="1.0" encoding="{declared}"?>{file.read_text(encoding="utf-8")}'.encode(encoding)
    )
    split = open_data(DataConfig(root=tmp_path))["train"]
    assert split.classes == (name,)
    assert not split.findings


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", r"a\.xml: is not UTF-8 \(byte 0xdf in line 1\); save it as UTF-8"),
        (b'<?xml version="1.0" encoding="martian"?>', r"a\.xml: declares the unknown encoding martian"),
        (b'<?xml version="1.0" encoding="ascii"?>', r"a\.xml: declares the encoding ascii and has another"),
        (b"<annotation>", r"a\.xml: is not UTF-8"),
    ],
)
def test_xml_of_another_encoding_is_an_error_that_says_so(tmp_path, write_voc, voc_object, head, message):
    write_voc(tmp_path, {"train": {"a": voc_object("ß", 1, 1, 9, 9)}})
    file = tmp_path / "Annotations" / "a.xml"
    file.write_bytes(head + file.read_text(encoding="utf-8").encode("cp1252"))
    with pytest.raises(UserError, match=message):
        usable_splits(DataConfig(root=tmp_path), ["train"])


@pytest.mark.parametrize("name", ["9" * 5000, "a" * 300, "zero\u2400byte", "../../nowhere/x", "/dev/zero"])
def test_names_that_no_file_has_are_missing_files(tmp_path, write_yolo, write_voc, voc_object, name):
    write_voc(tmp_path / "voc", {"train": {"a": voc_object("dog", 1, 1, 9, 9)}})
    with (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt").open("a", encoding="utf-8") as file:
        file.write(f"{name}\n")
    with pytest.raises(UserError, match="does not exist"):
        usable_splits(DataConfig(root=tmp_path / "voc"), ["train"])
    config = _yolo(tmp_path, write_yolo)
    with (tmp_path / "list.txt").open("a", encoding="utf-8") as file:
        file.write(f"{name}.jpg\n")
    with pytest.raises(UserError, match="does not exist"):
        usable_splits(config, ["train"])
    with pytest.raises(UserError, match="which is missing"):
        find_unlabeled(config.model_copy(update={"unlabeled": "list.txt"}))
    with pytest.raises(UserError, match="no such folder or file"):
        find_unlabeled(config.model_copy(update={"unlabeled": name + ".gone"}))
    with pytest.raises(UserError, match="no such images"):
        usable_splits(config.model_copy(update={"train": name + ".gone"}), ["train"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_refused_instead_of_waited_for(tmp_path):
    pipe = tmp_path / "classes.json"
    os.mkfifo(pipe)
    assert find_coco(tmp_path) == {}
    for read in (read_text, read_numbers):
        with pytest.raises(UserError, match=r"classes\.json: is a pipe or a device"):
            read(pipe)
    with pytest.raises(UserError, match=r"no such file .classes\.json."):
        open_data(DataConfig(root=tmp_path, format="coco", train="classes.json", val="classes.json"))


def test_a_blank_line_among_class_names_is_refused_and_not_skipped(tmp_path):
    """It would move the numbers of all classes after it."""
    file = tmp_path / "classes.txt"
    file.write_text("cat\n\ndog\n")
    with pytest.raises(UserError, match="class 1 has an empty name"):
        read_class_names(file)
    file.write_text("cat\ndog\n\n \n")
    assert read_class_names(file) == ("cat", "dog")
