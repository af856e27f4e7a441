"""The doctor finds what a reader of annotations cannot see."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from detdistill.data.inspect import inspect_data
from detdistill.recipe import DataConfig


def _folder(tmp_path, write_coco, images=6):
    for name in ("train", "val"):
        write_coco(tmp_path / f"{name}.json", tmp_path / name, images=images)
    return DataConfig(root=tmp_path)


def test_a_healthy_folder(tmp_path, write_coco):
    inspection = inspect_data(_folder(tmp_path, write_coco))
    assert inspection.errors == []
    assert [finding.kind for finding in inspection.findings] == ["empty class"]
    train = inspection.statistics["train"]
    assert (train.images, train.background, train.objects, train.ignored) == (6, 5, 1, 0)
    assert train.per_class == {"cat": 1, "dog": 0}
    assert train.sizes == pytest.approx([200**0.5] * 5)
    assert inspection.decoded == 12
    assert inspection.lines()[-1] == "12 images decoded; 0 errors, 1 warnings"


@pytest.mark.parametrize("sample", [0, None])
def test_a_file_that_was_cut_short_is_found_even_outside_the_sample(tmp_path, write_coco, sample):
    config = _folder(tmp_path, write_coco)
    content = (tmp_path / "train" / "3.png").read_bytes()
    (tmp_path / "train" / "3.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "val" / "5.png").write_bytes(b"")
    # Bytes after the end, as some cameras write, hurt nobody.
    with (tmp_path / "train" / "1.png").open("ab") as file:
        file.write(bytes(100))
    inspection = inspect_data(config, sample)
    found = [(finding.kind, finding.file.relative_to(tmp_path).as_posix()) for finding in inspection.errors]
    assert found == [("undecodable image", "train/3.png"), ("undecodable image", "val/5.png")]


def test_a_size_that_the_file_does_not_have(tmp_path, write_coco, write_image):
    config = _folder(tmp_path, write_coco)
    write_image(tmp_path / "train" / "2.png", 48, 64)
    (error,) = inspect_data(config).errors
    assert error.kind == "wrong size"
    assert "is 48×64" in str(error)


def test_images_in_both_parts_and_missing_parts(tmp_path, write_coco):
    write_coco(tmp_path / "train.json", tmp_path / "images")
    kinds = [finding.kind for finding in inspect_data(DataConfig(root=tmp_path)).findings]
    assert kinds == ["empty class", "missing split"]
    write_coco(tmp_path / "val.json", tmp_path / "images")
    kinds = [finding.kind for finding in inspect_data(DataConfig(root=tmp_path)).findings]
    assert kinds == ["empty class", "shared images"]


def test_the_report_caps_each_kind_but_counts_all(tmp_path, write_coco):
    config = _folder(tmp_path, write_coco)
    file = tmp_path / "train.json"
    data = json.loads(file.read_text())
    data["annotations"] += [{**data["annotations"][0], "id": i, "bbox": [1, 1, 0, 0]} for i in range(2, 12)]
    file.write_text(json.dumps(data))
    lines = inspect_data(config).lines(per_kind=3)
    assert sum("has no size" in line for line in lines) == 3
    assert "warning: zero-size box: 7 more like these" in lines
    assert lines[-1].endswith("0 errors, 11 warnings")


def test_a_copy_under_another_name_in_val_is_found(tmp_path, write_coco):
    config = _folder(tmp_path, write_coco, images=3)
    assert "shared images" not in [finding.kind for finding in inspect_data(config).findings]
    shutil.copy(tmp_path / "train" / "1.png", tmp_path / "val" / "3.png")
    (finding,) = [f for f in inspect_data(config).findings if f.kind == "shared images"]
    assert "1 images" in finding.message
    assert str(tmp_path / "val" / "3.png") in finding.message
    assert str(tmp_path / "train" / "1.png") in finding.message


def test_a_file_under_two_ids_is_no_image_of_both_parts(tmp_path, write_coco):
    config = _folder(tmp_path, write_coco)
    file = tmp_path / "train.json"
    data = json.loads(file.read_text())
    data["images"].append({**data["images"][0], "id": 77})
    file.write_text(json.dumps(data))
    (finding,) = [f for f in inspect_data(config).findings if f.kind in ("repeated image", "shared images")]
    assert finding.kind == "repeated image"
    assert finding.file == file


@pytest.mark.parametrize(("bits", "kinds"), [(12, ["dark image"]), (16, [])])
def test_bits_that_are_not_used_are_told(tmp_path, write_coco, bits, kinds):
    config = _folder(tmp_path, write_coco)
    ramp = np.linspace(0, 2**bits - 1, 48 * 64).reshape(48, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "train" / "2.png")
    found = [finding.kind for finding in inspect_data(config).findings if finding.kind != "empty class"]
    assert found == kinds


@pytest.mark.parametrize(("objects", "told"), [(100, False), (101, True)])
def test_images_with_more_objects_than_are_counted_are_told(tmp_path, write_coco, objects, told):
    config = _folder(tmp_path, write_coco)
    content = json.loads((tmp_path / "val.json").read_text())
    content["annotations"] = [
        {"id": i, "image_id": content["images"][0]["id"], "category_id": content["categories"][0]["id"],
         "bbox": [1 + i % 10, 1 + i // 10, 5, 5], "area": 25, "iscrowd": 0}
        for i in range(objects)
    ]  # fmt: skip
    (tmp_path / "val.json").write_text(json.dumps(content))
    found = [str(finding) for finding in inspect_data(config).findings if finding.kind == "many objects"]
    assert len(found) == told
    assert not told or "1 images have more than 100 objects, up to 101" in found[0]
