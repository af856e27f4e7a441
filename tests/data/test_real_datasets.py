"""The counts of real datasets, against their README and pycocotools."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO

from detdistill.data.formats.coco import read_coco
from detdistill.data.formats.voc import read_voc
from detdistill.data.inspect import inspect_data
from detdistill.data.loading import DetectionDataset, open_data, tell_format
from detdistill.data.masks import decode_mask
from detdistill.errors import UserError
from detdistill.recipe import DataConfig

pytestmark = pytest.mark.real


def _objects(split):
    return sum(len(record.labels_K) for record in split.records)


def test_deeppcb(shared_data):
    inspection = inspect_data(DataConfig(root=shared_data / "deeppcb"), sample=8)
    counts = {name: (stats.images, stats.objects) for name, stats in inspection.statistics.items()}
    assert counts == {"train": (1000, 6873), "val": (500, 3140)}
    assert inspection.findings == []


def test_bccd_has_two_boxes_without_size(shared_data):
    root = shared_data / "bccd"
    splits = open_data(DataConfig(root=root))
    splits["test"] = read_voc(root, "test", "test")
    assert {name: len(split) for name, split in splits.items()} == {"train": 205, "val": 87, "test": 72}
    warnings = sum(
        (split.warning_counts() for split in splits.values()), start=type(splits["val"].warning_counts())()
    )
    assert warnings == {"zero-size box": 2}
    assert sum(map(_objects, splits.values())) == 4888 - 2
    assert not any(split.errors for split in splits.values())


@pytest.mark.parametrize(
    ("file", "folder"),
    [("coco-mini/annotations/instances_val2017.json", "coco-mini/val2017"), ("nuclei/val.json", "nuclei/val")],
)
def test_masks_and_areas_are_those_of_pycocotools(shared_data, file, folder):
    split = read_coco(shared_data / file, shared_data / folder, "val")
    with contextlib.redirect_stdout(io.StringIO()):
        oracle = COCO(shared_data / file)
    assert split.findings == []
    assert _objects(split) == len(oracle.anns)
    assert sum(record.ignore_K.sum() for record in split.records) == sum(
        a["iscrowd"] for a in oracle.anns.values()
    )
    for record in split.records[:20]:
        annotations = oracle.loadAnns(oracle.getAnnIds(record.image_id))
        assert [split.category_ids[label] for label in record.labels_K] == [
            a["category_id"] for a in annotations
        ]
        np.testing.assert_allclose(record.areas_K, [a["area"] for a in annotations], rtol=1e-6)
        for mask, annotation in zip(record.masks or (), annotations, strict=True):
            np.testing.assert_array_equal(
                decode_mask(mask, record.height, record.width), oracle.annToMask(annotation).astype(bool)
            )


def test_coco_mini_asks_which_file_and_leaves_crowds_out_of_targets(shared_data):
    root = shared_data / "coco-mini"
    with pytest.raises(UserError, match=r"set data\.train"):
        open_data(DataConfig(root=root))
    splits = open_data(
        DataConfig(
            root=root, train="instances_train2017.json", val="instances_val2017.json", classes=("dog", "person")
        )
    )
    assert splits["train"].category_ids == (18, 1)
    train = splits["train"]
    assert len(train) == 209
    place = next(i for i, record in enumerate(train.records) if record.ignore_K.any())
    _, target = DetectionDataset(train, None, with_masks=True)[place]
    assert len(target["labels"]) == len(target["masks"]) == (~train.records[place].ignore_K).sum()


def test_segmentation_folders_are_not_taken_for_yolo(shared_data):
    assert tell_format(DataConfig(root=shared_data / "camvid")) == "label_maps"
