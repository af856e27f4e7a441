"""Pascal VOC folders."""

from __future__ import annotations

import re

import pytest

from detdistill.data.formats.voc import read_voc
from detdistill.data.loading import open_data
from detdistill.errors import UserError
from detdistill.recipe import DataConfig


def test_boxes_are_moved_from_counting_pixels_to_coordinates(tmp_path, write_voc, voc_object):
    objects = voc_object("dog", 1, 1, 64, 48) + voc_object("cat", 10, 20, 30, 40, difficult=1)
    write_voc(tmp_path, {"train": {"a": objects, "b": ""}})
    split = read_voc(tmp_path, "train", "train")
    assert split.classes == ("cat", "dog")
    first, background = split.records
    assert first.image_id == "a"
    assert first.boxes_K4.tolist() == [[0, 0, 64, 48], [9, 19, 30, 40]]
    assert first.labels_K.tolist() == [1, 0]
    assert first.ignore_K.tolist() == [False, True]
    assert len(background.labels_K) == 0
    assert split.findings == []


def test_zero_based_files_are_not_scolded(tmp_path, write_voc, voc_object):
    write_voc(tmp_path, {"train": {"a": voc_object("dog", 0, 0, 10, 10)}})
    split = read_voc(tmp_path, "train", "train")
    assert split.findings == []
    assert split.records[0].boxes_K4.tolist() == [[0, 0, 10, 10]]


def test_bad_objects_are_dropped_with_a_warning(tmp_path, write_voc, voc_object):
    objects = "".join([
        voc_object("dog", 5, 5, 5, 5),
        voc_object("dog", 70, 5, 90, 20),
        "<object><name>dog</name></object>",
        "<object><bndbox/></object>",
        voc_object("dog", 1, 1, 9, 9).replace("<xmin>1<", "<xmin>one<"),
        voc_object("dog", 2, 2, 9, 9),
    ])  # fmt: skip
    write_voc(tmp_path, {"train": {"a": objects}})
    split = read_voc(tmp_path, "train", "train")
    assert split.warning_counts() == {
        "zero-size box": 1, "box outside image": 1, "malformed box": 2, "unknown class": 1,
    }  # fmt: skip
    assert len(split.records[0].labels_K) == 1


def test_missing_and_broken_files_are_errors(tmp_path, write_voc, voc_object):
    write_voc(tmp_path, {"train": dict.fromkeys("abcd", voc_object("dog", 1, 1, 9, 9))})
    (tmp_path / "Annotations" / "b.xml").unlink()
    (tmp_path / "Annotations" / "c.xml").write_text("<annotation><object>")
    (tmp_path / "JPEGImages" / "d.jpg").unlink()
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\na\nb\nc\nd\n")
    split = read_voc(tmp_path, "train", "train")
    assert sorted(finding.kind for finding in split.errors) == [
        "duplicate image id", "missing annotation", "missing image", "unreadable annotation",
    ]  # fmt: skip
    assert [record.image_id for record in split.records] == ["a"]


def test_years_are_named_and_joined(tmp_path, write_voc, voc_object):
    for year, stem in (("VOC2007", "x"), ("VOC2012", "y")):
        sets = {"trainval": {stem: voc_object("dog" if stem == "x" else "cat", 1, 1, 9, 9)}}
        write_voc(tmp_path / "VOCdevkit" / year, sets)
    write_voc(tmp_path / "VOCdevkit" / "VOC2007", {"test": {"z": voc_object("dog", 1, 1, 9, 9)}})
    with pytest.raises(UserError, match=r"several years; set it to one of VOC2007/test, VOC2007/trainval"):
        open_data(DataConfig(root=tmp_path))
    both = "VOC2007/trainval+VOC2012/trainval"
    splits = open_data(DataConfig(root=tmp_path, train=both, val="test"))
    assert [record.image_id for record in splits["train"].records] == ["x", "y"]
    assert splits["val"].classes == splits["train"].classes == ("cat", "dog")
    assert splits["val"].records[0].labels_K.tolist() == [1]


def test_sets_of_one_class_have_a_second_column(tmp_path, write_voc, voc_object):
    write_voc(tmp_path, {"train": {"a": voc_object("dog", 1, 1, 9, 9), "b": ""}})
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a  1\nb -1\n")
    assert [record.image_id for record in read_voc(tmp_path, "train", "train").records] == ["a", "b"]


def test_a_chosen_class_need_not_be_in_val(tmp_path, write_voc, voc_object):
    cat, dog = voc_object("cat", 1, 1, 9, 9), voc_object("dog", 1, 1, 9, 9)
    write_voc(tmp_path, {"train": {"a": cat + dog}, "test": {"b": dog}})
    splits = open_data(DataConfig(root=tmp_path, classes=("dog", "cat")))
    assert splits["val"].classes == ("dog", "cat")
    assert splits["val"].errors == []
    with pytest.raises(UserError, match="did you mean 'cat'"):
        open_data(DataConfig(root=tmp_path, classes=("cats",)))


@pytest.mark.parametrize(
    ("text", "ignored"), [("1", True), ("1.0", True), ("TRUE", True), ("yes", True), ("0", False), ("", False)]
)
def test_difficult_as_tools_write_it(tmp_path, write_voc, voc_object, text, ignored):
    write_voc(tmp_path, {"train": {"a": voc_object("dog", 1, 1, 20, 20, difficult=text)}})
    assert read_voc(tmp_path, "train", "train").records[0].ignore_K.tolist() == [ignored]


def test_a_namespace_hides_no_object(tmp_path, write_voc, voc_object):
    write_voc(tmp_path, {"train": {"a": voc_object("dog", 1, 1, 20, 20)}})
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<annotation>", '<annotation xmlns="urn:x">'))
    assert len(read_voc(tmp_path, "train", "train").records[0].labels_K) == 1


def test_tags_in_capitals_hide_no_object(tmp_path, write_voc, voc_object):
    plain = voc_object("cat", 5, 5, 30, 30)
    capitals = re.sub(r"</?\w+", lambda tag: tag[0].upper(), plain)
    write_voc(tmp_path, {"train": {"a": capitals, "b": plain}})
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("annotation>", "Annotation>"))
    split = read_voc(tmp_path, "train", "train")
    assert split.findings == []
    assert [record.boxes_K4.tolist() for record in split.records] == [[[4, 4, 30, 30]]] * 2


def test_each_box_of_an_object_is_taken(tmp_path, write_voc, voc_object):
    first, second = voc_object("cat", 5, 5, 30, 30, difficult=1), voc_object("cat", 9, 9, 40, 40)
    box = re.search("<bndbox>.*</bndbox>", second)[0]
    both = first.replace("</object>", f"{box}<bndbox><xmin>1</xmin></bndbox></object>")
    within = f"<part>{voc_object('dog', 1, 1, 9, 9)}</part>"
    write_voc(tmp_path, {"train": {"a": both + within}})
    split = read_voc(tmp_path, "train", "train")
    record = split.records[0]
    assert record.boxes_K4.tolist() == [[4, 4, 30, 30], [8, 8, 40, 40], [0, 0, 9, 9]]
    assert record.ignore_K.tolist() == [True, True, False]
    assert split.warning_counts() == {"several boxes": 1, "malformed box": 1}


def test_another_xml_file_is_no_image_without_objects(tmp_path, write_voc, voc_object):
    write_voc(tmp_path, {"train": {"a": voc_object("cat", 5, 5, 30, 30), "b": ""}})
    (tmp_path / "Annotations" / "b.xml").write_text("<html><body>404</body></html>")
    (error,) = read_voc(tmp_path, "train", "train").errors
    assert "its root is <html>" in error.message


@pytest.mark.parametrize("damage", [b"", b"\x00\xff\xfe", b"<html></html>", None])
def test_a_damaged_first_file_does_not_hide_the_others(tmp_path, write_image, voc_object, damage):
    for stem in "abc":
        write_image(tmp_path / f"{stem}.jpg")
        (tmp_path / f"{stem}.xml").write_text(f"<annotation>{voc_object('cat', 5, 5, 30, 30)}</annotation>")
    if damage is None:
        (tmp_path / "a.xml").unlink()
        (tmp_path / "a.xml").mkdir()
    else:
        (tmp_path / "a.xml").write_bytes(damage)
    split = open_data(DataConfig(root=tmp_path))["train"]
    assert [finding.kind for finding in split.errors] == ["unreadable annotation"]
    assert len(split.records) == 2
