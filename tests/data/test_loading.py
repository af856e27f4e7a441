"""Samples and batches: the same whatever reads them, and boxes that follow their pixels."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detdistill.data.loading import DetectionDataset, make_loader, open_data
from detdistill.data.transforms import augment_seeded, build_augment
from detdistill.errors import UserError
from detdistill.recipe import AugmentConfig, DataConfig

ALL = AugmentConfig(flip=0.5, vertical_flip=0.5, photometric=True, crop=0.7, zoom_out=0.5)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits") / "set"
    return open_data(DataConfig(format="digits", root=root, train_size=24, val_size=6, image_size=96))


def _same(one, other):
    image, target = one
    image_2, target_2 = other
    equal = all(torch.equal(target[key], target_2[key]) for key in target)
    return torch.equal(image, image_2) and target.keys() == target_2.keys() and equal


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_draws_do_not_depend_on_workers_nor_on_torchs_state(digits, workers):
    dataset = DetectionDataset(digits["train"], ALL, seed=5, with_masks=True)
    keys = [[(3, i) for i in range(j, j + 4)] for j in range(0, 24, 4)]
    expected = [dataset[key] for batch in keys for key in batch]
    torch.manual_seed(999)
    found = [sample for batch in make_loader(dataset, keys, workers) for sample in zip(*batch, strict=True)]
    assert all(_same(*pair) for pair in zip(expected, found, strict=True))


def test_epochs_and_seeds_differ_and_leave_torchs_generator_alone(digits):
    dataset = DetectionDataset(digits["train"], ALL, seed=5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, later = dataset[0, 4], dataset[0, 4], dataset[1, 4]
    assert torch.equal(torch.get_rng_state(), state)
    assert _same(first, again)
    assert not _same(first, later)
    assert not _same(first, DetectionDataset(digits["train"], ALL, seed=6)[0, 4])


def test_without_augmentation_a_sample_is_the_record(digits):
    record = digits["val"].records[2]
    image, target = DetectionDataset(digits["val"], None, with_masks=True)[2]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 96, 96)
    np.testing.assert_array_equal(target["boxes"].numpy(), record.boxes_K4)
    np.testing.assert_array_equal(target["labels"].numpy(), record.labels_K)
    assert target["index"] == 2
    assert target["masks"].dtype == torch.bool
    assert target["masks"].sum(dim=(1, 2)).tolist() == record.areas_K.tolist()


def test_the_dataset_can_be_sent_to_a_worker(digits):
    dataset = DetectionDataset(digits["train"], ALL)
    assert _same(pickle.loads(pickle.dumps(dataset))[1, 2], dataset[1, 2])


@settings(deadline=None, max_examples=60)
@given(
    boxes=st.lists(st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 20)] * 2), max_size=5),
    seed=st.integers(0, 2**62),
)
def test_boxes_labels_and_masks_stay_on_their_pixels(boxes, seed):
    """Each object is a filled rectangle of its own gray; after augmentation box and mask still enclose it."""
    image = torch.zeros(3, 60, 60, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), 60, 60, dtype=torch.bool)
    for k, (x, y, w, h) in enumerate(boxes):
        image[:, y : y + h, x : x + w] = 40 * (k + 1)
        masks[k, y : y + h, x : x + w] = True
    corners = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in boxes], dtype=torch.float32)
    target = {"boxes": corners.reshape(-1, 4), "labels": torch.arange(len(boxes)), "masks": masks}
    augment = build_augment(AugmentConfig(flip=0.5, vertical_flip=0.5, crop=0.8, zoom_out=0.5))
    out, moved = augment_seeded(augment, image, target, seed)
    assert moved["boxes"].dtype == torch.float32
    assert len(moved["boxes"]) == len(moved["labels"]) == len(moved["masks"]) <= len(boxes)
    assert moved["masks"].shape[1:] == out.shape[1:]
    for box, label, mask in zip(moved["boxes"].int().tolist(), moved["labels"], moved["masks"], strict=True):
        x1, y1, x2, y2 = box
        assert 0 <= x1 < x2 <= out.shape[2]
        assert 0 <= y1 < y2 <= out.shape[1]
        inside = torch.zeros_like(mask)
        inside[y1:y2, x1:x2] = True
        assert torch.equal(mask, inside)
        gray = out[0, y1:y2, x1:x2]
        tower_features = sum((gray == 40 * (k + 1)).sum() for k in range(int(label) + 1, len(boxes)))
        assert (gray == 40 * (label + 1)).sum() + tower_features == gray.numel()


def test_crowds_and_difficult_objects_are_no_targets(tmp_path, write_coco):
    crowd = {"image_id": 1, "category_id": 9, "bbox": [0, 0, 9, 9], "iscrowd": 1, "id": 1}
    plain = {"image_id": 1, "category_id": 7, "bbox": [5, 5, 9, 9], "iscrowd": 0, "id": 2}
    for name in ("train", "val"):
        write_coco(tmp_path / f"{name}.json", tmp_path, annotations=[crowd, plain])
    split = open_data(DataConfig(root=tmp_path))["train"]
    assert split.records[0].ignore_K.tolist() == [True, False]
    _, target = DetectionDataset(split, AugmentConfig(flip=0))[0, 0]
    assert target["labels"].tolist() == [0]
    assert target["boxes"].tolist() == [[5, 5, 14, 14]]
    _, background = DetectionDataset(split, ALL)[0, 1]
    assert background["boxes"].shape == (0, 4)
    with pytest.raises(UserError, match="no masks"):
        DetectionDataset(split, None, with_masks=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line_that_names_it(tmp_path, write_coco, write_image, workers):
    for name in ("train", "val"):
        write_coco(tmp_path / f"{name}.json", tmp_path)
    dataset = DetectionDataset(open_data(DataConfig(root=tmp_path))["train"], None)
    write_image(tmp_path / "1.png", 10, 20)
    with pytest.raises(UserError, match=r"^\S*1\.png: is 10×20, but .* says 64×48") as caught:
        list(make_loader(dataset, 2, workers))
    assert "\n" not in str(caught.value)


def test_folders_that_tell_nothing_or_too_much(tmp_path, write_coco, write_yolo):
    with pytest.raises(UserError, match="no such folder"):
        open_data(DataConfig(root=tmp_path / "nowhere"))
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(UserError, match=r"Seen: readme\.md\. Expected: COCO"):
        open_data(DataConfig(root=tmp_path))
    write_coco(tmp_path / "train.json", tmp_path / "images" / "train")
    write_yolo(tmp_path, {"train": {"1": "0 .5 .5 .1 .1"}})
    with pytest.raises(UserError, match=r"coco or yolo; set data\.format"):
        open_data(DataConfig(root=tmp_path))
    assert len(open_data(DataConfig(root=tmp_path, format="coco"))["train"]) == 2
    with pytest.raises(UserError, match=r"folder as data\.root"):
        open_data(DataConfig(root=tmp_path / "train.json"))
