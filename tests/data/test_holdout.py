"""``data.val: 20%``: a part of train, chosen by the images' names."""

from __future__ import annotations

import json

import pytest

from detdistill.data.loading import open_data
from detdistill.errors import UserError
from detdistill.recipe import DataConfig


def _names(split):
    return {record.path.name for record in split.records}


def test_a_share_of_train_is_held_out_and_stays_where_it_is(tmp_path, write_coco):
    config = DataConfig(root=tmp_path, train="all.json", val="25%")
    write_coco(tmp_path / "all.json", tmp_path / "images", images=40)
    few = open_data(config)
    assert (few["train"].name, few["val"].name) == ("train", "val")
    assert len(few["train"]) + len(few["val"]) == 40
    assert 5 <= len(few["val"]) <= 16
    assert not _names(few["train"]) & _names(few["val"])
    write_coco(tmp_path / "all.json", tmp_path / "images", images=60)
    many = open_data(config)
    for name in ("train", "val"):
        assert _names(few[name]) < _names(many[name])
        assert many[name].classes == ("cat", "dog")


def test_a_part_that_the_folder_has_is_not_mixed_in(tmp_path, write_coco):
    write_coco(tmp_path / "train.json", tmp_path / "train", images=20)
    write_coco(tmp_path / "val.json", tmp_path / "val", images=3)
    splits = open_data(DataConfig(root=tmp_path, val="50%"))
    assert {record.path.parent.name for split in splits.values() for record in split.records} == {"train"}


def test_what_was_made_of_one_photograph_stays_together(tmp_path, write_coco, write_image):
    file = write_coco(tmp_path / "train.json", tmp_path / "images", images=0)
    data = json.loads(file.read_text())
    for i in range(60):
        image = write_image(tmp_path / "images" / f"board{i // 3}_jpg.rf.{i:08x}.jpg")
        data["images"].append({"id": i, "file_name": image.name, "height": 48, "width": 64})
    file.write_text(json.dumps(data))
    splits = open_data(DataConfig(root=tmp_path, val="30%"))
    train, val = ({name.partition(".rf.")[0] for name in _names(splits[part])} for part in ("train", "val"))
    assert val
    assert not train & val


@pytest.mark.parametrize(("images", "val"), [(2, 1), (1, 0)])
def test_of_few_images_one_is_held_out(tmp_path, write_coco, images, val):
    write_coco(tmp_path / "train.json", tmp_path / "images", images=images)
    assert len(open_data(DataConfig(root=tmp_path, val="0.1%"))["val"]) == val


def test_each_part_keeps_an_image(tmp_path, write_coco):
    write_coco(tmp_path / "train.json", tmp_path / "images", images=6)
    splits = open_data(DataConfig(root=tmp_path, val="99.99%"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 1, "val": 5}


@pytest.mark.parametrize("val", ["0%", "100%"])
def test_a_share_that_leaves_nothing_is_refused(tmp_path, write_coco, val):
    write_coco(tmp_path / "train.json", tmp_path / "images")
    with pytest.raises(UserError, match="a share such as 20%"):
        open_data(DataConfig(root=tmp_path, val=val))


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("annotations/instances_default.json", "images/default"),  # CVAT
        ("annotations/instances_default.json", "IMAGES"),
        ("result.json", "images"),  # Label Studio
    ],
)
def test_a_lone_file_is_train_whatever_its_name(tmp_path, write_coco, file, folder):
    write_coco(tmp_path / file, tmp_path / folder, images=9)
    assert sorted(open_data(DataConfig(root=tmp_path))) == ["train"]
    assert len(open_data(DataConfig(root=tmp_path, val="20%"))["train"]) < 9


def test_a_file_whose_name_says_nothing_is_pointed_out(tmp_path, write_coco):
    for name in ("first", "second"):
        write_coco(tmp_path / f"{name}.json", tmp_path / "images", images=9)
    with pytest.raises(UserError, match=r"If first\.json is COCO, set data\.train"):
        open_data(DataConfig(root=tmp_path))
