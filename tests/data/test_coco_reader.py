"""COCO files as they are met: whole, odd, and broken."""

from __future__ import annotations

import json

import pytest

from detdistill.data.formats.coco import read_coco
from detdistill.data.loading import open_data
from detdistill.errors import UserError
from detdistill.recipe import DataConfig


def _box(number, **changes):
    return {"id": number, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 0, **changes}


def test_a_whole_file(tmp_path, write_coco):
    crowd = _box(2, category_id=9, iscrowd=1)
    plain = _box(1, bbox=[4, 6, 10, 20], area=150)
    split = read_coco(write_coco(tmp_path / "a.json", tmp_path, annotations=[plain, crowd]), tmp_path, "train")
    assert split.classes == ("cat", "dog")
    assert split.category_ids == (7, 9)
    first, background = split.records
    assert first.boxes_K4.tolist() == [[4, 6, 14, 26], [1, 2, 4, 6]]
    assert first.labels_K.tolist() == [0, 1]
    assert first.ignore_K.tolist() == [False, True]
    assert first.areas_K.tolist() == [150, 12]
    assert len(background.labels_K) == 0
    assert first.masks is None
    assert split.findings == []


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        (_box(5, bbox=[1, 2, 0, 4]), "zero-size box"),
        (_box(5, bbox=[1, 2, 3]), "malformed box"),
        (_box(5, bbox=None), "malformed box"),
        (_box(5, bbox=[1, 2, float("nan"), 4]), "box not finite"),
        (_box(5, image_id=99), "unknown image"),
        (_box(5, image_id=[1]), "unknown image"),
        (_box(5, category_id=1), "unknown class"),
        ("not a mapping", "malformed annotation"),
    ],
)
def test_a_bad_annotation_is_dropped_and_counted(tmp_path, write_coco, annotation, kind):
    file = write_coco(tmp_path / "a.json", tmp_path, annotations=[_box(1), annotation])
    split = read_coco(file, tmp_path, "train")
    assert split.warning_counts() == {kind: 1}
    assert sum(len(record.labels_K) for record in split.records) == 1
    assert split.errors == []


def test_duplicate_ids_missing_files_and_empty_splits_are_errors(tmp_path, write_coco):
    file = write_coco(tmp_path / "a.json", tmp_path, images=4, annotations=[_box(1), _box(1)])
    data = json.loads(file.read_text())
    data["images"].append(dict(data["images"][3]))
    file.write_text(json.dumps(data))
    (tmp_path / "2.png").unlink()
    split = read_coco(file, tmp_path, "train")
    kinds = sorted(finding.kind for finding in split.errors)
    assert kinds == ["duplicate annotation id", "duplicate image id", "missing image"]
    assert [record.image_id for record in split.records] == [1, 3, 4]
    empty = read_coco(write_coco(tmp_path / "b.json", tmp_path, annotations=[]), tmp_path, "val")
    assert [finding.kind for finding in empty.errors] == ["empty split"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "detection results"),
        ('{"images": [], "categories": []}', "'annotations' is missing"),
        ('{"images": {}, "annotations": [], "categories": []}', "'images' is missing"),
        ('{"images": [], "annotations": [], "categories": []}', "no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "needs an integer id and a name"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "two categories have the name 'a'",
        ),
    ],
)
def test_what_is_no_coco_file_is_refused_with_its_name(tmp_path, text, message):
    file = tmp_path / "broken.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message) as caught:
        read_coco(file, tmp_path, "train")
    assert "broken.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_come_from_the_header_where_the_file_has_none(tmp_path, write_coco):
    file = write_coco(tmp_path / "a.json", tmp_path)
    data = json.loads(file.read_text())
    for row in data["images"]:
        del row["width"], row["height"]
    file.write_text(json.dumps(data))
    record = read_coco(file, tmp_path, "train").records[0]
    assert (record.height, record.width) == (48, 64)


def test_roboflows_group_is_no_class(tmp_path, write_coco):
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 7, "name": "cat", "supercategory": "pets"},
    ]
    for part in ("train", "valid"):
        folder = tmp_path / part
        write_coco(folder / "_annotations.coco.json", folder, categories=categories)
    splits = open_data(DataConfig(root=tmp_path))
    assert splits["train"].classes == ("cat",)
    assert splits["val"].source == tmp_path / "valid" / "_annotations.coco.json"


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}.json", "images/{}"),
        ("annotations/{}.json", "images"),
        ("{}.json", "images"),
        ("{}.json", "{}"),
        ("{}.json", "."),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
def test_layouts_are_told_by_looking(tmp_path, write_coco, file, folder):
    for part in ("train", "val"):
        write_coco(tmp_path / file.format(part), tmp_path / folder.format(part))
    splits = open_data(DataConfig(root=tmp_path))
    assert sorted(splits) == ["train", "val"]
    assert all(split.findings == [] and len(split) == 2 for split in splits.values())


def test_several_files_are_asked_about_and_images_can_be_named(tmp_path, write_coco):
    for name in ("boxes_train2017", "instances_train2017", "boxes_val2017", "captions_val2017"):
        write_coco(tmp_path / "annotations" / f"{name}.json", tmp_path / "odd place")
    with pytest.raises(UserError, match=r"boxes_train2017.json, .*instances_train2017.json; set data.train"):
        open_data(DataConfig(root=tmp_path))
    with pytest.raises(UserError, match=r"set data\.images"):
        open_data(DataConfig(root=tmp_path, train="boxes_train2017.json"))
    config = DataConfig(root=tmp_path, train="annotations/boxes_train2017.json", images="odd place")
    assert len(open_data(config)["val"]) == 2


def test_val_gets_trains_classes_and_an_unknown_one_is_an_error(tmp_path, write_coco):
    write_coco(tmp_path / "train.json", tmp_path)
    other = [{"id": 7, "name": "dog"}, {"id": 8, "name": "cow"}]
    boxes = [_box(1), _box(2, category_id=8)]
    write_coco(tmp_path / "test.json", tmp_path, categories=other, annotations=boxes)
    val = open_data(DataConfig(root=tmp_path))["val"]
    assert val.classes == ("cat", "dog")
    assert val.category_ids == (10, 7)  # cat's 7 of train is dog's in val: a number that neither file has
    assert val.records[0].labels_K.tolist() == [1]
    assert [finding.kind for finding in val.errors] == ["unknown class"]
    chosen = open_data(DataConfig(root=tmp_path, classes=("dog",)))["val"]
    assert chosen.errors == []
    assert chosen.records[0].labels_K.tolist() == [0]


@pytest.mark.parametrize("of", [str, float])
def test_ids_of_another_type_are_the_same_ids(tmp_path, write_coco, of):
    file = write_coco(tmp_path / "a.json", tmp_path)
    data = json.loads(file.read_text())
    for row in data["images"]:
        row["id"] = of(row["id"])
    if of is float:  # as pandas writes whole columns
        data["categories"][0]["id"] = 9.0
        data["annotations"][0] |= {"category_id": 7.0}
    file.write_text(json.dumps(data))
    split = read_coco(file, tmp_path, "train")
    assert split.findings == []
    assert split.category_ids == (7, 9)
    assert split.records[0].labels_K.tolist() == [0]


def _naming(file, *names):
    """The file, with other names for its images."""
    data = json.loads(file.read_text())
    for row, name in zip(data["images"], names, strict=True):
        row["file_name"] = name
    file.write_text(json.dumps(data))
    return file


@pytest.mark.parametrize(
    ("name", "lies_at"),
    [
        ("my%20photos/1.png", "images/my photos/1.png"),  # URL-encoded
        ("images\\1.png", "images/1.png"),
        ("C:\\Users\\Jo\\1.png", "images/1.png"),  # of another machine
        ("/data/upload/1/1.png", "images/1.png"),
        ("100%25.png", "images/100%25.png"),  # a name is taken as it is, where there is such a file
    ],
)
def test_names_as_exporters_write_them(tmp_path, write_coco, write_image, name, lies_at):
    file = _naming(write_coco(tmp_path / "train.json", tmp_path / "unused", images=1), name)
    image = write_image(tmp_path / lies_at)
    write_image(tmp_path / "images" / "100%.png")
    (record,) = read_coco(file, None, "train").records
    assert record.path == image


def test_an_image_that_is_missing_from_its_folder_is_not_taken_from_another(tmp_path, write_coco, write_image):
    file = _naming(write_coco(tmp_path / "train.json", tmp_path / "unused", images=2), "a/1.png", "a/2.png")
    write_image(tmp_path / "images" / "a" / "1.png")
    write_image(tmp_path / "images" / "2.png")
    assert [finding.kind for finding in read_coco(file, None, "train").errors] == ["missing image"]


@pytest.mark.parametrize("name", ["", " ", "\ud800", "a\udfff"])
def test_a_class_without_a_name_that_can_be_written_is_refused(tmp_path, write_coco, name):
    file = write_coco(tmp_path / "a.json", tmp_path, categories=[{"id": 7, "name": name}])
    with pytest.raises(UserError, match="needs an integer id and a name"):
        read_coco(file, tmp_path, "train")


@pytest.mark.parametrize("first", [2**53 + 1, 2**62, 7])
def test_neighboring_category_ids_stay_apart(tmp_path, write_coco, first):
    """Also where a float could not tell them from each other."""
    box = {"image_id": 1, "bbox": [4, 6, 10, 20]}
    annotations = [{**box, "id": i, "category_id": first + i % 2} for i in range(3)]
    categories = [{"id": first, "name": "cat"}, {"id": first + 1, "name": "dog"}]
    file = write_coco(tmp_path / "a.json", tmp_path, categories=categories, annotations=annotations)
    split = read_coco(file, tmp_path, "train")
    assert split.category_ids == (first, first + 1)
    assert split.records[0].labels_K.tolist() == [0, 1, 0]
    assert split.findings == []
