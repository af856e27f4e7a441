"""Images of every kind come out as (3, H, W) uint8 RGB."""

from __future__ import annotations

import resource
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from detdistill.data.images import find_images, image_sizes, read_image
from detdistill.errors import UserError

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


# --- orientation: Pillow's exif_transpose decides ---------------------------------------------------------

XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'
ORIENTED = (
    "jpeg",
    "png",
    "webp",
    "tiff",
    "avif",
    "mpo",
    "jpeg xmp first",
    "jpeg xmp",
    "png xmp",
    "png late",
    "png late xmp",
)


def oriented(file, layout, orientation):
    """An image of (24, 40) stored pixels with this orientation tag; False where Pillow cannot write it."""
    kind = layout.split()[0]
    Image.init()  # all plugins
    if kind.upper() not in Image.SAVE:
        return False
    ramp = np.zeros((24, 40, 3), np.uint8)
    ramp[:8, :8, 0], ramp[:8, -8:, 1], ramp[-8:, :8, 2] = 250, 250, 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    tag, options = XMP.format(orientation).encode(), {"format": kind.upper()}
    image = Image.fromarray(ramp)
    if layout in ("jpeg", "png", "webp", "tiff", "avif", "mpo", "jpeg xmp first"):
        options["exif"] = exif
    elif layout == "jpeg xmp":
        options["xmp"] = tag
    elif layout == "png xmp":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", tag.decode())
        options["pnginfo"] = info
    image.save(file, **options)
    content = file.read_bytes()
    if layout == "jpeg xmp first":
        segment = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"
        file.write_bytes(
            content[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + content[2:]
        )
    elif layout.startswith("png late"):
        kind, data = b"eXIf", exif.tobytes()[6:]
        if layout.endswith("xmp"):
            kind, data = b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + tag
        chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        file.write_bytes(content[:-12] + chunk + content[-12:])
    return True


def assert_as_pillow(file):
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    upright, stored = image_sizes(file)
    assert upright == (expected.height, expected.width)
    assert stored == (24, 40)
    pixels = read_image(file)
    # JPEG decoders may round differently
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 2
    assert read_image(file, (24, 40)).shape == (3, 24, 40)


@pytest.mark.parametrize("layout", ORIENTED)
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_that_of_pillow(tmp_path, layout, orientation):
    file = tmp_path / "x.img"
    if not oriented(file, layout, orientation):
        pytest.skip(f"this Pillow does not write {layout}")
    assert_as_pillow(file)


@pytest.mark.parametrize("layout", ["jpeg", "png", "webp"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_damaged_metadata_is_no_metadata(tmp_path, layout, draw):
    """Never a refused image; where Pillow still reads an orientation, the same one."""
    file = tmp_path / "x.img"
    oriented(file, layout, 6)
    content = bytearray(file.read_bytes())
    start = {"jpeg": b"Exif\0\0", "png": b"eXIf", "webp": b"EXIF"}[layout]
    at = content.find(start) + {"jpeg": 6, "png": 4, "webp": 8}[layout]  # the tags, not the container
    for _ in range(draw.draw(st.integers(1, 6))):
        content[at + draw.draw(st.integers(0, 25))] = draw.draw(st.integers(0, 255))
    file.write_bytes(content)
    pixels = read_image(file)
    assert tuple(pixels.shape[1:]) == image_sizes(file)[0]
    try:
        expected = ImageOps.exif_transpose(Image.open(file)).size[::-1]
    except Exception:
        expected = (24, 40)
    assert tuple(pixels.shape[1:]) == expected


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp"])
def test_an_image_bomb_is_refused_by_its_header(tmp_path, kind):
    file = tmp_path / f"x.{kind}"
    Image.new("RGB", (64, 48)).save(file, kind)
    content = bytearray(file.read_bytes())
    at, size, order = {
        "png": (16, 4, "big"), "jpeg": (content.find(b"\xff\xc0") + 5, 2, "big"), "gif": (6, 2, "little"),
        "bmp": (18, 4, "little"),
    }[kind]  # fmt: skip
    for offset in (0, size):
        content[at + offset : at + offset + size] = (60000).to_bytes(size, order)
    if kind == "png":
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    file.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in (image_sizes, read_image):
        with pytest.raises(UserError, match="into tiles"):
            use(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB
