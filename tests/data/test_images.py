"""Images of every kind come out as (3, H, W) uint8 RGB."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from detdistill.config import UserError
from detdistill.data.images import find_images, image_sizes, read_image

MODES = ("L", "RGB", "RGBA", "P", "1", "LA")
FORMATS = [(s, m) for s in ("png", "bmp", "tiff", "webp") for m in MODES if (s, m) != ("bmp", "LA")]


@pytest.mark.parametrize(("suffix", "mode"), FORMATS)
def test_modes_and_formats(tmp_path, suffix, mode):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    image = rgb.convert(mode)
    file = tmp_path / f"x.{suffix}"
    image.save(file, lossless=True) if suffix == "webp" else image.save(file)
    pixels = read_image(file)
    assert pixels.shape == (3, 6, 9)
    assert pixels.dtype == torch.uint8
    expected = np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)
    if mode not in ("RGBA", "LA"):  # what is under transparent pixels is anybody's guess
        np.testing.assert_array_equal(pixels.numpy(), expected)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_keep_their_range(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"x.{suffix}")
    pixels = read_image(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(pixels[0].numpy(), ramp >> 8)
    assert pixels.shape == (3, 6, 8)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_turned_photograph_is_seen_upright_unless_its_labels_lie(tmp_path, suffix):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white on the left, as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(file, exif=exif)
    assert image_sizes(file) == ((32, 16), (16, 32))
    for upright in (read_image(file), read_image(file, (32, 16))):
        assert upright.shape == (3, 32, 16)
        assert upright[0, 2, 8] > 250  # white has come to the top
    lying = read_image(file, (16, 32))
    assert lying.shape == (3, 16, 32)
    assert lying[0, 8, 2] > 250


@pytest.mark.parametrize("content", [None, b"", b"no image at all", "cut"])
def test_broken_files_are_named(tmp_path, content):
    file = tmp_path / "broken.jpg"
    if content == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:1000])
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.jpg") as caught:
        read_image(file)
    assert "\n" not in str(caught.value)


def test_a_turned_webp_is_seen_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "x.webp"
    Image.new("RGB", (32, 16)).save(file, exif=exif)
    assert image_sizes(file)[0] == (32, 16)
    assert read_image(file).shape == (3, 32, 16)
    assert read_image(file, (16, 32)).shape == (3, 16, 32)


@pytest.mark.parametrize(
    ("pixels", "taken"),
    [
        (np.linspace(0, 1, 48, dtype=np.float32), False),  # Pillow makes it black
        (np.linspace(0, 65535, 48).astype(np.int32), False),  # Pillow makes it white
        (np.linspace(0, 255, 48, dtype=np.float32), True),
        (np.linspace(0, 255, 48).astype(np.int32), True),
    ],
)
def test_numbers_of_32_bits_are_taken_where_they_are_those_of_8(tmp_path, pixels, taken):
    file = tmp_path / "x.tif"
    Image.fromarray(pixels.reshape(6, 8)).save(file)
    if taken:
        np.testing.assert_array_equal(read_image(file)[0].numpy(), pixels.reshape(6, 8).astype(np.uint8))
        return
    with pytest.raises(UserError, match="save it with 8 or 16 bits"):
        read_image(file)


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_an_image_that_pillow_refuses_for_its_size_is_told(tmp_path, monkeypatch, suffix):
    file = tmp_path / f"x.{suffix}"
    Image.new("RGB", (64, 64)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="into tiles"):
        image_sizes(file)
    if suffix == "bmp":
        with pytest.raises(UserError, match="into tiles"):
            read_image(file)


def test_links_to_folders_are_followed_and_circles_left(tmp_path):
    store, folder = tmp_path / "store", tmp_path / "images"
    for place in (store / "deep", folder):
        place.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(place / "x.png")
    (folder / "linked").symlink_to(store)
    (store / "back").symlink_to(folder)
    assert find_images(folder) == [folder / "linked" / "deep" / "x.png", folder / "x.png"]
