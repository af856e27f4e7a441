"""Pairs of pictures: their size, their boxes' places, and the bytes that they may take."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from detdistill.report.pictures import draw_pairs, shrunk

NONE = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}


def found(*box):
    return {"boxes": torch.tensor([box]).float(), "labels": torch.tensor([0]), "scores": torch.tensor([0.9])}


def pixels(drawing):
    with Image.open(BytesIO(drawing.jpeg)) as picture:
        assert picture.size == (drawing.width, drawing.height)
        return np.asarray(picture.convert("RGB")).astype(int)


def test_boxes_shrink_with_their_image():
    image = torch.zeros(3, 1280, 2560, dtype=torch.uint8)
    ((before, after),) = draw_pairs([(image, NONE, found(400, 800, 1200, 1200))], ["cat"])
    assert (after.width, after.height) == (640, 320)
    assert pixels(before).max() < 30
    rows, columns = np.nonzero(pixels(after).max(axis=2) > 60)
    assert (rows.max(), columns.max()) == (pytest.approx(300, abs=3), pytest.approx(300, abs=3))
    assert columns.min() == pytest.approx(100, abs=3)


def test_label_maps_shrink_with_their_image():
    labels_HW = torch.zeros(1280, 2560, dtype=torch.uint8)
    labels_HW[:, 1280:] = 255  # has no color
    image = torch.zeros(3, 1280, 2560, dtype=torch.uint8)
    ((before, after),) = draw_pairs(
        [(image, {"semantic": labels_HW}, {"semantic": labels_HW[:, :1].expand(1280, 2560)})], ["cat"]
    )
    assert (before.width, before.height) == (after.width, after.height) == (640, 320)
    assert pixels(before)[:, :310].max() > 60
    assert pixels(before)[:, 330:].max() < 30
    assert pixels(after).max(axis=2).min() > 60


def test_masks_shrink_with_their_image():
    masks = torch.zeros(1, 1280, 2560)
    masks[:, 800:1200, 400:1200] = 0.9
    image = torch.zeros(3, 1280, 2560, dtype=torch.uint8)
    one = found(400, 800, 1200, 1200)
    for shaped in (masks, masks[:, None], masks > 0.5):
        ((before, after),) = draw_pairs([(image, one, {**one, "masks": shaped})], ["cat"])
        assert pixels(before)[240:290, 150:280].max() < 30
        assert pixels(after)[240:290, 150:280].max(axis=2).min() > 50


def test_small_images_are_enlarged():
    ((before, _),) = draw_pairs([(torch.zeros(3, 64, 80, dtype=torch.uint8), NONE, NONE)], ["cat"])
    assert (before.width, before.height) == (400, 320)


def test_noise_keeps_to_the_bytes():
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (3, 640, 640), dtype=torch.uint8)
    images = [(noise, NONE, found(1, 1, 99, 99))] * 8
    free = draw_pairs(images, ["cat"], most_bytes=10**9)
    for most in (1_200_000, 100_000):
        pairs = draw_pairs(images, ["cat"], most_bytes=most)
        assert 0 < sum(len(drawing.jpeg) for pair in pairs for drawing in pair) <= most
        assert pairs[0][0].width < free[0][0].width
    assert len(draw_pairs(images, ["cat"], most_bytes=1_200_000)) == 8
    assert draw_pairs(images, ["cat"], most_bytes=10) == []


def test_a_file_is_shrunk_and_a_damaged_one_is_an_error(tmp_path):
    Image.fromarray(np.zeros((3000, 900, 4), np.uint8)).save(tmp_path / "a.png")
    drawing = shrunk(tmp_path / "a.png")
    assert pixels(drawing).shape == (1600, 480, 3)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match="identify"):
        shrunk(tmp_path / "b.png")
