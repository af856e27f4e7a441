"""Prediction: against the model itself, and what is written for which image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detdistill.commands.predict import iter_predictions, predict
from detdistill.errors import UserError
from detdistill.models import Detector, build_model, save_model
from detdistill.recipe import parse_recipe

STUDENT = {"backbone": "resnet10t", "channels": 8, "head_depth": 1, "strides": [16, 32], "score_threshold": 0.0}
CLASSES = ("bolt", "nut")


@pytest.fixture
def model() -> Detector:
    torch.manual_seed(0)
    detector = build_model(parse_recipe({"data": "digits", "student": STUDENT}).student, CLASSES)
    torch.nn.init.constant_(detector.head.cls.bias, 0.0)
    return detector.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("000000000139.png", "a.jpg", "sub/a.bmp"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / "images"


def test_predictions_are_what_the_model_finds(model: Detector, folder: Path) -> None:
    path = folder / "000000000139.png"
    (found,) = predict(model, path, threshold=0.5, device="cpu")
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    with torch.inference_mode():
        direct = model([pixels])[0]
    keep = direct["scores"] >= 0.5
    assert 0 < keep.sum() < len(keep)
    torch.testing.assert_close(found.boxes_K4, direct["boxes"][keep])
    assert found.names == [CLASSES[label] for label in direct["labels"][keep].tolist()]


def test_a_folder_is_written_as_pictures_and_rows(model: Detector, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predictions = predict(model, folder, out=out, threshold=0.0, device="cpu")
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == ["000000000139.png", "a.jpg", "predictions.json", "sub/a.bmp.png"]
    assert Image.open(out / "a.jpg").size == (700, 500)  # small images are enlarged, so that labels can be read
    rows = json.loads((out / "predictions.json").read_text())
    assert len(rows) == sum(len(prediction.scores_K) for prediction in predictions)
    assert {(row["image_id"], row["file_name"]) for row in rows} == {
        (139, "000000000139.png"), ("a.jpg", "a.jpg"), ("sub/a.bmp", "sub/a.bmp"),
    }  # fmt: skip
    for row in rows:
        x, y, width, height = row["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= 70.02
        assert y + height <= 50.02
        assert row["category"] == CLASSES[row["category_id"] - 1]
        assert row["category_id_is"] == "label + 1"  # this model was not trained on data with ids of their own


def test_batches_change_nothing(model: Detector, folder: Path) -> None:
    alone = predict(model, folder, threshold=0.5, device="cpu")
    batched = iter_predictions(model, folder, threshold=0.5, batch_size=2, device="cpu")
    for one, other in zip(alone, batched, strict=True):
        assert (one.path, one.names) == (other.path, other.names)
        torch.testing.assert_close(one.boxes_K4, other.boxes_K4)
        torch.testing.assert_close(one.scores_K, other.scores_K)


def test_a_teacher_is_drawn_on_the_right(model: Detector, folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "teacher.safetensors"
    save_model(model, weights)
    alone, both = tmp_path / "alone", tmp_path / "both"
    image = folder / "000000000139.png"
    predict(weights, image, out=alone, threshold=0.4, device="cpu")
    predict(weights, image, out=both, threshold=0.4, teacher=weights, device="cpu")
    with Image.open(both / image.name) as pair, Image.open(alone / image.name) as one:
        assert pair.size == (2 * one.width, one.height)
        left, right = pair.crop((0, 0, *one.size)), pair.crop((one.width, 0, *pair.size))
        assert left.tobytes() == one.tobytes() == right.tobytes()


def test_what_was_drawn_before_is_not_read_again(model: Detector, folder: Path) -> None:
    out = folder / "drawn"
    first = predict(model, folder, out=out, device="cpu")
    assert [p.path for p in predict(model, folder, out=out, device="cpu")] == [p.path for p in first]


def test_images_are_never_overwritten(model: Detector, folder: Path) -> None:
    before = (folder / "a.jpg").read_bytes()
    for images in (folder, folder / "a.jpg"):
        with pytest.raises(UserError, match="would overwrite"):
            predict(model, images, out=folder, device="cpu")
    assert (folder / "a.jpg").read_bytes() == before


def test_broken_images_of_a_folder_are_left_out(model: Detector, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG")
    with pytest.warns(UserWarning, match=r"left out: .*broken\.png"):
        assert len(predict(model, folder, device="cpu")) == 3
    with pytest.raises(UserError, match=r"broken\.png"):
        predict(model, folder / "broken.png", device="cpu")


def test_wrong_arguments(model: Detector, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such image or folder"):
        predict(model, tmp_path / "none", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in this folder"):
        predict(model, tmp_path / "empty", device="cpu")
    with pytest.raises(UserError, match=r"device 'tpu:9' cannot be used here"):
        predict(model, folder, device="tpu:9")


def test_a_segmenter_writes_label_maps(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    segmenter = build_model("pspnet", CLASSES, backbone="mobilenetv3_small_050", channels=8).eval()
    out = tmp_path / "out"
    found = predict(segmenter, folder, out=out, teacher=segmenter, device="cpu")
    assert len(found) == 3
    for prediction in found:
        pixels = torch.from_numpy(np.array(Image.open(prediction.path))).permute(2, 0, 1)
        with torch.inference_mode():
            direct = segmenter([pixels])[0]["semantic"]
        assert torch.equal(prediction.semantic_HW, direct)
        assert sum(prediction.shares.values()) == pytest.approx(1)
        assert prediction.names == []
    written = np.array(Image.open(out / "a.labels.png"))
    assert np.array_equal(written, found[1].semantic_HW.numpy())
    rows = json.loads((out / "predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [139, "a.jpg", "sub/a.bmp"]
    assert rows[0]["shares"] == pytest.approx(found[0].shares, abs=1e-5)


ALIKE = (
    "1.png", "01.png", "sub/1.png", "a.jpg", "a.png", "a.bmp", "a.bmp.png", "a.labels.png", "sub/a.jpg",
    "b.JPG", "b.jpg.png",
)  # fmt: skip


@pytest.mark.parametrize("is_segmenter", [False, True])
def test_images_of_like_names_share_neither_an_id_nor_a_file(
    model: Detector, tmp_path: Path, is_segmenter: bool
) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    for i, name in enumerate(ALIKE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 30), (20 * i, 0, 0)).save(folder / name)
    used = (
        build_model("pspnet", CLASSES, backbone="mobilenetv3_small_050", channels=8).eval()
        if is_segmenter
        else model
    )
    predict(used, folder, out=out, threshold=0.0, device="cpu")
    rows = json.loads((out / "predictions.json").read_text())
    named = {(row["image_id"], row["file_name"]) for row in rows}
    assert {name for _, name in named} == set(ALIKE)
    assert len({image_id for image_id, _ in named}) == len(named) == len(ALIKE)
    pictures = [path for path in out.rglob("*") if path.is_file() and path.name != "predictions.json"]
    assert len(pictures) == len(ALIKE) * (1 + is_segmenter)
    widths = sorted(Image.open(path).width for path in pictures if path.stat().st_size)
    drawn = [width for width in widths if width > 52]  # enlarged; label maps are as large as their images
    assert len(drawn) == len(set(drawn)) == len(ALIKE)
    if is_segmenter:
        maps = [width for width in widths if width <= 52]
        assert maps == [40 + i for i in range(len(ALIKE))]


def test_no_image_of_the_folder_is_overwritten_by_what_is_drawn_of_another(
    model: Detector, tmp_path: Path
) -> None:
    for name in ("a.bmp", "sub/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "a.bmp.png").symlink_to(tmp_path / "sub" / "x.png")
    before = (tmp_path / "sub" / "x.png").read_bytes()
    with pytest.raises(UserError, match="would overwrite"):
        predict(model, tmp_path, out=tmp_path, device="cpu")
    assert (tmp_path / "sub" / "x.png").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size is 0"), ({"threshold": 30}, "a score from 0 to 1"),
     ({"threshold": float("nan")}, "a score from 0 to 1"), ({"batch_size": 1.5}, "whole number")],
)  # fmt: skip
def test_arguments_that_would_find_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        predict("nowhere", tmp_path, **options)
