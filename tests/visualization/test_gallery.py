from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from detdistill.visualization.drawing import draw_detections
from detdistill.visualization.gallery import save_gallery

CLASSES = ("cat", "dog")


def found(scores=(0.9, 0.1)):
    boxes = torch.tensor([[2.0, 2.0, 20.0, 20.0], [30.0, 10.0, 60.0, 40.0]])
    return {"boxes": boxes, "labels": torch.tensor([0, 1]), "scores": torch.tensor(scores)}


def test_small_images_are_enlarged_and_the_given_one_is_left_alone():
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    drawn = draw_detections(image, found(), CLASSES, shortest=480)
    assert draw_detections(image, found(), CLASSES).shape == image.shape
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (3, 480, 640)
    assert image.max() == 0
    assert drawn[:, 20:201, 20:201].max() > 0


def test_only_what_passes_the_threshold_is_drawn():
    image = torch.zeros(3, 480, 640, dtype=torch.uint8)
    one, both = (draw_detections(image, found(), CLASSES, threshold) for threshold in (0.3, 0.05))
    assert (one > 0).sum() < (both > 0).sum()
    assert draw_detections(image, found(), CLASSES, 0.95).max() == 0
    truth = {key: value for key, value in found().items() if key != "scores"}
    assert (draw_detections(image, truth, CLASSES) > 0).sum() > (one > 0).sum()


def test_boxes_that_are_none_are_left_out():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 10, 5, 20], [float("nan"), 1, 2, 3], [4, 4, 4, 9]])
    broken = {"boxes": boxes, "labels": torch.tensor([0, 1, 0]), "scores": torch.ones(3)}
    assert draw_detections(image, broken, CLASSES).max() == 0


def test_nothing_found_is_no_trouble(tmp_path):
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    image = torch.full((3, 40, 60), 200, dtype=torch.uint8)
    save_gallery(
        [{"ground truth": (image, found()), "found": (image, nothing)}] * 2, CLASSES, tmp_path / "a" / "g.png"
    )
    with Image.open(tmp_path / "a" / "g.png") as picture:
        assert picture.size == (960, 640)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_are_painted_where_they_are(dtype):
    image = torch.zeros(3, 100, 120, dtype=torch.uint8)
    masks = torch.zeros(3, 1, 100, 120)
    masks[0, :, 80:84, 4:14] = 0.9  # away from box and labels, which would hide it
    masks[1, :, 90:, :] = 0.4  # not object
    masks[2, :, :5, :5] = 1  # of a detection below the threshold
    masks = masks > 0.5 if dtype == torch.bool else masks
    detections = {
        "boxes": torch.tensor([[60.0, 10, 110, 30]] * 3),
        "labels": torch.tensor([0, 0, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.1]),
        "masks": masks,
    }
    plain = {name: value for name, value in detections.items() if name != "masks"}
    for factor in (1, 2):
        drawn, without = (
            draw_detections(image, one, CLASSES, shortest=100 * factor) for one in (detections, plain)
        )
        changed = (drawn != without).any(dim=0)
        wanted = torch.zeros_like(changed)
        wanted[80 * factor : 84 * factor, 4 * factor : 14 * factor] = True
        assert torch.equal(changed, wanted)


def test_label_maps_are_painted_and_ignored_pixels_left_alone():
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    labels[:, 20:40], labels[:, 40:] = 1, 255
    drawn = draw_detections(image, {"semantic": labels}, CLASSES)
    assert drawn.shape == image.shape
    assert (drawn[:, :, 40:] == 100).all()
    colors = [tuple(drawn[:, 5, column].tolist()) for column in (5, 25, 45)]
    assert len(set(colors)) == 3
    assert drawn.unique(dim=2).shape[2] == 3  # one color a class
    larger = draw_detections(image, {"semantic": labels}, CLASSES, shortest=80)
    assert torch.equal(larger[:, ::2, ::2], drawn)


def test_a_gallery_of_label_maps_has_a_legend(tmp_path):
    image = torch.full((3, 40, 60), 255, dtype=torch.uint8)  # all white but for the legend
    unlabeled = {"semantic": torch.full((40, 60), 255)}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    for name, drawn in (("maps", unlabeled), ("boxes", nothing)):
        save_gallery([{"found": (image, drawn)}], CLASSES, tmp_path / f"{name}.png")
    dark = []
    for name in ("maps", "boxes"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        dark.append((pixels[len(pixels) // 2 :] < 128).sum())
    assert dark[0] > 100
    assert dark[1] == 0
