"""The built-in dataset: disjoint, exact, and the same every time."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from detdistill.data.formats.digits import digits_of, digits_root, write_digits
from detdistill.data.loading import open_data
from detdistill.errors import UserError
from detdistill.recipe import DataConfig


def _hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    write_digits(root, 30, 10, 128)
    return root


def test_same_arguments_same_bytes_and_more_images_keep_the_first(small, tmp_path):
    write_digits(tmp_path / "again", 30, 10, 128)
    assert _hashes(tmp_path / "again") == _hashes(small)
    write_digits(tmp_path / "more", 32, 10, 128)
    more = _hashes(tmp_path / "more")
    assert all(more[name] == value for name, value in _hashes(small).items() if name.startswith("train/"))
    write_digits(tmp_path / "other", 2, 1, 128, seed=1)
    assert _hashes(tmp_path / "other")["train/000000.png"] != _hashes(small)["train/000000.png"]


def test_train_and_val_share_no_digit():
    everything = {image.tobytes() for image in load_digits().images / 16.0}
    train, val = ({image.tobytes() for image in digits_of(split)[0]} for split in ("train", "val"))
    assert train.isdisjoint(val)
    assert train | val == everything
    assert set(digits_of("val")[1].tolist()) == set(range(10))


def test_boxes_and_areas_are_those_of_the_masks(small):
    """pycocotools decodes the masks; boxes must be tight around them and masks must not overlap."""
    coco = COCO(small / "annotations" / "instances_train.json")
    assert len(coco.imgs) == 30
    for image_id in coco.imgs:
        covered = np.zeros((128, 128), int)
        for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
            mask = coco.annToMask(annotation)
            rows, columns = np.nonzero(mask)
            x, y, w, h = annotation["bbox"]
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x, y, x + w, y + h)
            assert annotation["area"] == mask.sum() > 0
            covered += mask
        assert covered.max() == 1


def test_every_image_has_one_to_eight_digits_and_reads_without_findings(tmp_path):
    config = DataConfig(format="digits", root=tmp_path / "d", train_size=40, val_size=10, image_size=64)
    splits = open_data(config)
    assert {name: len(split) for name, split in splits.items()} == {"train": 40, "val": 10}
    for split in splits.values():
        assert split.findings == []
        assert split.classes == tuple("0123456789")
        assert all(1 <= len(record.labels_K) <= 8 for record in split.records)


def test_the_cache_is_drawn_once_and_never_over_something_else(tmp_path, monkeypatch):
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "cache"))
    config = DataConfig(format="digits", train_size=2, val_size=1, image_size=64)
    root = digits_root(config)
    assert root.parent == tmp_path / "cache"
    drawn = (root / "train" / "000000.png").stat().st_mtime_ns
    assert digits_root(config) == root
    assert (root / "train" / "000000.png").stat().st_mtime_ns == drawn
    assert digits_root(config.model_copy(update={"train_size": 3})) != root
    assert len(list((tmp_path / "cache").iterdir())) == 2  # and no half-drawn ones
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        digits_root(config.model_copy(update={"root": tmp_path / "mine"}))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        digits_root(config.model_copy(update={"root": tmp_path / "file" / "below"}))
