"""Semantic segmentation's data: three layouts, what their numbers mean, what is wrong, augmentation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detdistill.data.formats.label_maps import CITYSCAPES, VOC, count_pixels, read_labels, read_numbers
from detdistill.data.inspect import inspect_data
from detdistill.data.loading import DetectionDataset, open_data, usable_splits
from detdistill.errors import UserError
from detdistill.recipe import AugmentConfig, DataConfig

RNG = np.random.default_rng(0)


def write(path: Path, pixels: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.astype(np.uint8))
    if palette:
        image = Image.fromarray(pixels.astype(np.uint8), mode="P")
        image.putpalette([value for i in range(256) for value in (i * 37 % 256, i * 91 % 256, 255 - i)])
    image.save(path)


def picture(height: int = 12, width: int = 20) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three images to train on and one to measure, of classes 0 to 2."""
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["sky", "road", "car"], "ignore_index": 255}))
    for part, names in (("train", "abc"), ("val", "d")):
        for i, name in enumerate(names):
            write(tmp_path / "images" / part / f"{name}.jpg", picture())
            labels = np.full((12, 20), i % 3)
            labels[:, :5] = 255
            labels[:, 5:10] = (i + 1) % 3
            write(tmp_path / "labels" / part / f"{name}.png", labels)
    return tmp_path


def data(root: Path, **settings: object) -> DataConfig:
    return DataConfig(root=root, **settings)


# --- layouts ---------------------------------------------------------------------------------------------


def test_folders_of_pairs_are_told_by_looking(folders: Path) -> None:
    splits = open_data(data(folders))
    assert {name: [r.image_id for r in split.records] for name, split in splits.items()} == {
        "train": ["a", "b", "c"],
        "val": ["d"],
    }
    assert splits["train"].classes == ("sky", "road", "car")
    assert not splits["train"].findings
    image, target = DetectionDataset(splits["train"], None)[1]
    assert image.shape == (3, 12, 20)
    assert target["semantic"].dtype == torch.uint8
    assert target["semantic"][0].tolist() == [255] * 5 + [2] * 5 + [1] * 10
    assert set(target) == {"semantic", "index"}


def test_a_part_can_be_named(folders: Path) -> None:
    write(folders / "images" / "night" / "n.png", picture())
    write(folders / "labels" / "night" / "n.png", np.zeros((12, 20)))
    assert [r.image_id for r in open_data(data(folders, val="night"))["val"].records] == ["n"]
    with pytest.raises(UserError, match=r"data\.val: no images folder 'nigth'.*night"):
        open_data(data(folders, val="nigth"))


def test_chosen_classes_have_the_order_that_was_asked_for(folders: Path) -> None:
    split = open_data(data(folders, classes=("car", "sky")))["train"]
    assert split.classes == ("car", "sky")
    _, target = DetectionDataset(split, None)[1]
    assert target["semantic"][0].tolist() == [255] * 5 + [0] * 5 + [255] * 10  # road counts nowhere
    assert open_data(data(folders, classes=("car", "sky")))["val"].classes == ("car", "sky")


def test_without_classes_json_the_classes_are_named_in_order(folders: Path) -> None:
    (folders / "classes.json").unlink()
    with pytest.raises(UserError, match=r"nothing names the classes; write classes\.json"):
        open_data(data(folders))
    split = open_data(data(folders, classes=("x", "y", "z")))["train"]
    assert split.classes == ("x", "y", "z")
    assert read_labels(split.records[0].label_map)[0].tolist() == [255] * 5 + [1] * 5 + [0] * 10


def test_another_number_may_mean_no_class(folders: Path) -> None:
    (folders / "classes.json").write_text(json.dumps({"classes": ["void", "road", "car"], "ignore_index": 0}))
    split = open_data(data(folders))["train"]
    assert read_labels(split.records[0].label_map)[0].tolist() == [255] * 5 + [1] * 5 + [255] * 10


@pytest.mark.parametrize("trained", [False, True])
def test_cityscapes(tmp_path: Path, trained: bool) -> None:
    # Numbers, names and trainIds as in cityscapesscripts/helpers/labels.py, copied by hand.
    ids = [0, 3, 7, 8, 9, 11, 12, 17, 18, 19, 24, 25, 29, 31, 33]
    train_ids = [255, 255, 0, 1, 255, 2, 3, 5, 255, 6, 11, 12, 255, 16, 18]
    for part in ("train", "val"):
        stem = "aachen/aachen_000000_000019"
        write(tmp_path / "leftImg8bit" / part / f"{stem}_leftImg8bit.png", picture(2, len(ids)))
        labels = tmp_path / "gtFine" / part
        write(labels / f"{stem}_gtFine_labelIds.png", np.array([ids, ids]))
        write(labels / f"{stem}_gtFine_color.png", picture(2, len(ids)))
        if trained:
            write(labels / f"{stem}_gtFine_labelTrainIds.png", np.array([train_ids, train_ids]))
    splits = open_data(data(tmp_path))
    assert splits["val"].classes == tuple(CITYSCAPES)
    assert len(CITYSCAPES) == 19
    assert splits["val"].records[0].image_id == "aachen/aachen_000000_000019"
    assert read_labels(splits["train"].records[0].label_map)[1].tolist() == train_ids
    assert not inspect_data(data(tmp_path)).errors


def test_voc_by_its_palette(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    numbers = np.array([[0, 1, 15, 20, 255]] * 3)
    for name in ("2007_000032", "2007_000033"):
        write(root / "JPEGImages" / f"{name}.jpg", picture(3, 5))
        write(root / "SegmentationClass" / f"{name}.png", numbers, palette=True)
    sets = root / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("2007_000032\n")
    (sets / "val.txt").write_text("2007_000033\n")
    splits = open_data(data(tmp_path))
    assert splits["train"].classes == VOC
    assert [VOC[i] for i in (1, 15, 20)] == ["aeroplane", "person", "tvmonitor"]
    assert read_labels(splits["train"].records[0].label_map).tolist() == numbers.tolist()
    assert [r.image_id for r in splits["val"].records] == ["2007_000033"]
    with pytest.raises(UserError, match="no such image set"):
        open_data(data(tmp_path, val="vall"))


def test_voc_with_boxes_too_stays_a_set_of_boxes(tmp_path: Path) -> None:
    for kind in ("Main", "Segmentation"):
        (tmp_path / "ImageSets" / kind).mkdir(parents=True)
        (tmp_path / "ImageSets" / kind / "train.txt").write_text("a\n")
    write(tmp_path / "JPEGImages" / "a.jpg", picture())
    write(tmp_path / "SegmentationClass" / "a.png", np.zeros((12, 20)), palette=True)
    assert not open_data(data(tmp_path))["train"].has_label_maps
    assert open_data(data(tmp_path, format="voc_segmentation"))["train"].has_label_maps


# --- files -----------------------------------------------------------------------------------------------


def test_files_of_other_kinds(tmp_path: Path) -> None:
    gray = np.repeat(np.arange(6).reshape(2, 3, 1), 3, axis=2)
    write(tmp_path / "gray.png", gray)
    assert read_numbers(tmp_path / "gray.png").tolist() == [[0, 1, 2], [3, 4, 5]]
    write(tmp_path / "colors.png", picture())
    with pytest.raises(UserError, match="holds colors, not class numbers"):
        read_numbers(tmp_path / "colors.png")
    Image.fromarray(np.array([[1, 255]], np.uint16)).save(tmp_path / "wide.png")
    assert read_numbers(tmp_path / "wide.png").tolist() == [[1, 255]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert read_numbers(tmp_path / "bits.png").tolist() == [[1, 0]]
    for name, values in (
        ("more.png", np.array([[1, 300]], np.uint16)),
        ("half.tif", np.array([[0.5, 1]], np.float32)),
        ("minus.tif", np.array([[-1, 1]], np.int32)),
        ("none.tif", np.array([[np.nan]], np.float32)),
    ):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(UserError, match=r"holds numbers from .*write class numbers 0…254"):
            read_numbers(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="cannot be decoded"):
        read_numbers(tmp_path / "broken.png")


def test_bad_pairs_are_dropped_and_told(folders: Path) -> None:
    (folders / "labels" / "train" / "a.png").unlink()
    write(folders / "labels" / "train" / "b.png", np.zeros((6, 10)))
    split = open_data(data(folders))["train"]
    assert [record.image_id for record in split.records] == ["c"]
    assert split.warning_counts() == {"missing label map": 1, "wrong size": 1}
    for finding in split.findings:
        assert "\n" not in str(finding)
    assert "is 10×6, and its image 20×12" in str(split.findings[1])
    (folders / "labels" / "train" / "c.png").write_bytes(b"no image")
    assert [f.kind for f in open_data(data(folders))["train"].errors] == ["empty split"]


def test_a_label_map_without_image_is_told(folders: Path) -> None:
    (folders / "images" / "train" / "b.jpg").unlink()
    split = open_data(data(folders))["train"]
    assert [record.image_id for record in split.records] == ["a", "c"]
    (finding,) = split.findings
    assert str(finding).startswith(f"warning: {folders / 'labels' / 'train' / 'b.png'}: there is no image")


def test_the_doctor_reads_the_numbers(folders: Path) -> None:
    labels = np.full((12, 20), 2)
    labels[0, :3] = 7
    write(folders / "labels" / "train" / "b.png", labels)
    found = inspect_data(data(folders))
    (error,) = found.errors
    assert str(error.file).endswith("b.png")
    assert "numbers that mean no class (7)" in str(error)
    shares = found.statistics["train"].pixels
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["car"] == pytest.approx((237 + 5 * 0 + 12 * 10) / 720)  # b, and c's larger part
    text = "\n".join(found.lines())
    assert "3 images with label maps in 3 classes" in text
    write(folders / "labels" / "train" / "b.png", picture())
    assert "holds colors" in str(inspect_data(data(folders)).errors[0])


@pytest.mark.parametrize("number", [7, 300])
def test_a_run_refuses_numbers_that_check_refuses(folders: Path, number: int) -> None:
    labels = np.full((12, 20), 2, np.uint16)
    labels[0, :3] = number
    Image.fromarray(labels).save(folders / "labels" / "train" / "b.png")
    assert len(inspect_data(data(folders)).errors) == 1
    with pytest.raises(
        UserError, match=r"b\.png: (has numbers that mean no class \(7\)|holds numbers from 2 to 300)"
    ):
        usable_splits(data(folders), ["train", "val"])
    dataset = DetectionDataset(open_data(data(folders))["train"], None)  # as a step outside the sample would
    with pytest.raises(UserError, match=r"b\.png"):
        dataset[1]


def binary(folder: Path, numbers: list[int], classes: list[str]) -> DataConfig:
    """Four images a part, the left half of each map one number, the right half the next one."""
    (folder / "classes.json").write_text(json.dumps({"classes": classes}))
    for part in ("train", "val"):
        for i in range(4):
            write(folder / "images" / part / f"{i}.png", picture())
            halves = np.array([numbers[i % len(numbers)], numbers[(i + 1) % len(numbers)]])
            write(folder / "labels" / part / f"{i}.png", np.tile(np.repeat(halves, 10), (12, 1)))
    return data(folder)


@pytest.mark.parametrize(
    ("numbers", "classes", "message"),
    [
        (
            [0, 255],
            ["background", "polyp"],
            "'polyp' has no pixel, and every answer is right; write the number 1",
        ),
        (
            [1, 255],
            ["background", "polyp"],
            "'background' has no pixel, and every answer is right; write the number 0",
        ),
        (
            [255],
            ["background", "polyp"],
            r"no pixel of its label maps has a class \(only the numbers 255 occur\)",
        ),
        ([0], ["polyp"], "'polyp' is the only class"),
        ([0, 255], ["polyp"], "'polyp' is the only class"),
    ],
)
def test_masks_in_which_every_answer_is_right_are_refused(
    tmp_path: Path, numbers: list[int], classes: list[str], message: str
) -> None:
    config = binary(tmp_path, numbers, classes)
    assert [finding.kind for finding in inspect_data(config).errors] == ["nothing to learn"] * 2
    with pytest.raises(UserError, match=message):
        usable_splits(config, ["train", "val"])


def test_masks_of_two_numbers_that_say_something_are_not_refused(tmp_path: Path) -> None:
    for numbers in ([0, 1], [0, 1, 255]):
        config = binary(tmp_path, numbers, ["background", "polyp"])
        assert not inspect_data(config).errors
        usable_splits(config, ["train", "val"])


def test_a_rare_class_is_looked_for_in_all_maps(tmp_path: Path) -> None:
    config = binary(tmp_path, [0, 255], ["background", "polyp"])
    split = open_data(config)["train"]
    assert count_pixels(split, sample=1).findings
    first = count_pixels(split, sample=1)
    for i in range(4):  # one pixel, wherever the sample did not look
        labels = np.zeros((12, 20))
        labels[:, 10:], labels[0, 0] = 255, 1
        write(tmp_path / "labels" / "train" / f"{i}.png", labels)
        assert not count_pixels(split, sample=1).findings
        labels[0, 0] = 0
        write(tmp_path / "labels" / "train" / f"{i}.png", labels)
    assert first.counts_256[1] == 0


def test_a_class_without_a_pixel_is_reported_of_both_parts(folders: Path) -> None:
    found = [str(f) for f in inspect_data(data(folders)).findings if f.kind == "empty class"]
    assert len(found) == 1
    assert "1 classes have no pixel in val's sample: car" in found[0]


def test_folders_in_any_case(folders: Path) -> None:
    for name in ("images/train", "labels/train", "images", "labels", "classes.json"):
        (folders / name).rename((folders / name).with_name((folders / name).name.upper()))
    splits = usable_splits(data(folders), ["train", "val"])
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "val": 1}


def test_a_broken_classes_file(folders: Path) -> None:
    for content in (
        "{",
        "[]",
        '{"classes": []}',
        '{"classes": ["a", "a"]}',
        '{"classes": ["a", ""]}',
        '{"classes": ["a", 1.10]}',
        '{"classes": ["a", null]}',
        '{"classes": ["a"], "ignore_index": 999}',
        '{"classes": ["a"], "ignore_index": true}',
        "[" * 100_000,
    ):
        (folders / "classes.json").write_text(content)
        with pytest.raises(UserError, match=r"classes\.json"):
            open_data(data(folders))


@pytest.mark.parametrize("named", [True, False])
def test_more_classes_than_a_label_map_has_numbers(folders: Path, named: bool) -> None:
    names = [f"class {i}" for i in range(256)]
    (folders / "classes.json").unlink()
    if named:
        (folders / "classes.json").write_text(json.dumps({"classes": names}))
    with pytest.raises(UserError, match="256 classes; a label map has numbers of 8 bits"):
        open_data(data(folders, classes=None if named else tuple(names)))


# --- augmentation ----------------------------------------------------------------------------------------


@pytest.fixture
def telling(tmp_path: Path) -> Path:
    """Images whose color says the class: a pixel of class i is 40·i."""
    (tmp_path / "classes.json").write_text(json.dumps({"classes": list("abcde")}))
    for part in ("train", "val"):
        for i in range(4):
            labels = np.kron(RNG.integers(0, 5, (3, 4)), np.ones((16, 16)))
            write(tmp_path / "images" / part / f"{i}.png", np.repeat(40 * labels[..., None], 3, axis=2))
            write(tmp_path / "labels" / part / f"{i}.png", labels)
    return tmp_path


@pytest.mark.parametrize(
    "augment",
    [
        {"flip": 1.0},
        {"flip": 0.5, "vertical_flip": 0.5, "crop_size": (24, 30)},
        {"scale": (0.6, 1.9), "crop_size": (70, 90)},
    ],
)
def test_label_maps_stay_in_step_with_their_images(telling: Path, augment: dict[str, object]) -> None:
    split = open_data(data(telling))["train"]
    images = DetectionDataset(split, AugmentConfig(**augment), seed=3)
    for epoch in range(3):
        for i in range(len(split)):
            image, target = images[(epoch, i)]
            labels = target["semantic"]
            assert image.shape[1:] == labels.shape
            if "crop_size" in augment:
                assert tuple(labels.shape) == augment["crop_size"]
            inside = labels != 255
            off = (image[0][inside].float() - 40 * labels[inside].float()).abs()
            # Interpolation mixes colors at the borders of blocks; elsewhere the color is the class's.
            assert (off < 1).float().mean() > 0.75
            assert (image[:, ~inside] == 114).all()
            again = DetectionDataset(split, AugmentConfig(**augment), seed=3)[(epoch, i)]
            assert torch.equal(again[0], image)
            assert torch.equal(again[1]["semantic"], labels)


def test_scales_are_between_the_two(telling: Path) -> None:
    images = DetectionDataset(open_data(data(telling))["train"], AugmentConfig(flip=0, scale=(0.5, 2.0)))
    heights = [images[(epoch, 0)][0].shape[1] / 48 for epoch in range(60)]
    assert 0.49 < min(heights) < 0.7
    assert 1.8 < max(heights) < 2.01


def test_crops_of_boxes_keep_what_is_inside() -> None:
    """Scale and crop serve detection as well (large-scale jitter)."""
    from torchvision import tv_tensors

    from detdistill.data.transforms import augment_seeded, build_augment

    target = {"boxes": torch.tensor([[0.0, 0, 100, 100]]), "labels": torch.tensor([1])}
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    transform = build_augment(AugmentConfig(flip=0, scale=(2.0, 2.0), crop_size=(50, 60)))
    image, target = augment_seeded(transform, image, target, seed=0)
    assert image.shape == (3, 50, 60)
    assert target["boxes"].tolist() == [[0.0, 0.0, 60.0, 50.0]]
    assert not isinstance(target["boxes"], tv_tensors.BoundingBoxes)


def test_augmentation_by_boxes_is_refused(telling: Path) -> None:
    with pytest.raises(UserError, match=r"training\.augment\.crop goes by boxes.*crop_size"):
        DetectionDataset(open_data(data(telling))["train"], AugmentConfig(crop=0.5))


# --- real data -------------------------------------------------------------------------------------------


@pytest.mark.real
def test_all_of_camvid(shared_data: Path) -> None:
    root = shared_data / "camvid"
    found = inspect_data(data(root), sample=None)
    assert {name: stats.images for name, stats in found.statistics.items()} == {"train": 367, "val": 101}
    assert len(found.splits["train"].classes) == 11
    assert not found.errors
    assert found.statistics["train"].pixels["road"] > 0.2
    assert len(open_data(data(root, val="test"))["val"]) == 233
