"""Images without labels: where they are found, and what comes of them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from detdistill.data.inspect import inspect_data
from detdistill.data.loading import open_data
from detdistill.data.unlabeled import UnlabeledImages, find_unlabeled
from detdistill.errors import UserError
from detdistill.recipe import AugmentConfig, DataConfig, parse_recipe


def draw(path, color=(200, 30, 30), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """A COCO set of ten training images and two to measure on, with three more images beside it."""
    for part, count in (("train", 10), ("val", 2)):
        images = [
            {"id": i, "file_name": draw(tmp_path / part / f"{i}.png").name, "height": 30, "width": 40}
            for i in range(count)
        ]
        boxes = [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [2, 2, 20, 20], "area": 400, "iscrowd": 0}
            for i in range(count)
        ]
        found = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
        (tmp_path / f"{part}.json").write_text(json.dumps(found))
    for name in ("b/2.png", "a.jpg", "b/1.png"):
        draw(tmp_path / "more" / name)
    return tmp_path


def test_a_folder_is_searched_with_its_subfolders(root):
    found = find_unlabeled(DataConfig(root=root, unlabeled="more"))
    assert [str(path.relative_to(root / "more")) for path in found] == ["a.jpg", "b/1.png", "b/2.png"]


def test_any_path_will_do_and_each_image_counts_once(root, tmp_path):
    names = tmp_path / "more" / "names.txt"
    names.write_text("b/1.png\n\na.jpg\nb/1.png\n")
    found = find_unlabeled(DataConfig(root=root / "train", unlabeled=str(names)))
    assert found == [root / "more" / "a.jpg", root / "more" / "b" / "1.png"]


def test_of_a_coco_file_the_images_are_taken(root):
    found = find_unlabeled(DataConfig(root=root, unlabeled="train.json"))
    assert found == sorted((root / "train").iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing", "no such folder or file 'nothing'"),
        ("more/names.txt", r"lists .*gone\.png, which is missing \(1 are\)"),
        ("empty.txt", "lists no image"),
        ("train/0.txt", "no such folder or file"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(root, given, message):
    (root / "more" / "names.txt").write_text("a.jpg\ngone.png\n")
    (root / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=message) as error:
        find_unlabeled(DataConfig(root=root, unlabeled=given))
    assert "\n" not in str(error.value)


def test_augmentation_depends_on_seed_epoch_and_image_alone(root):
    files = find_unlabeled(DataConfig(root=root, unlabeled="more"))
    augment = AugmentConfig(flip=0.5, photometric=True, crop=0.5, zoom_out=0.5)
    images, again = (UnlabeledImages(files, augment, 3, label_maps=False) for _ in range(2))
    first = images[(0, 1)][0]
    images[(0, 2)]
    assert torch.equal(first, again[(0, 1)][0])
    assert any(
        first.shape != other.shape or not torch.equal(first, other)
        for other in (again[(epoch, 1)][0] for epoch in (1, 2, 3))
    )
    assert set(images[(0, 1)][1]) == {"index", "view"}


def test_the_doctor_counts_and_decodes_them_and_tells_of_those_in_val(root):
    (root / "more" / "broken.png").write_bytes(b"\x89PNG")
    inspection = inspect_data(DataConfig(root=root, unlabeled="more"))
    assert inspection.unlabeled == 4
    assert [finding.file.name for finding in inspection.errors] == ["broken.png"]
    assert "unlabeled: 4 images" in inspection.lines()
    shared = inspect_data(DataConfig(root=root, unlabeled="val.json"))
    assert sum("2 images of data.unlabeled are in val" in f.message for f in shared.findings) == 1


def test_limit_keeps_some_training_images_evenly_spread(root):
    splits = open_data(DataConfig(root=root, limit=4))
    assert [record.image_id for record in splits["train"].records] == [0, 2, 5, 7]
    assert len(splits["val"]) == 2
    assert len(open_data(DataConfig(root=root, limit=99))["train"]) == 10


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"unlabeled_batch": 4}}, r"add `data\.unlabeled"),
        ({"training": {"unlabeled_batch": 3, "accumulate": 2}}, "unlabeled_batch must be a multiple"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(sections, message):
    data = {"root": "x", **({"unlabeled": "more"} if "accumulate" in sections["training"] else {})}
    with pytest.raises(UserError, match=message):
        parse_recipe({"data": data, "student": {}, **sections})


def test_digits_have_a_root_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path))
    data = DataConfig(
        format="digits", train_size=4, val_size=2, image_size=64, unlabeled="annotations/instances_train.json"
    )
    assert [path.parent.name for path in find_unlabeled(data)] == ["train"] * 4
