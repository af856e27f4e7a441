"""Samples of the real loader carry key and view, which identify the pixels within a run and a split."""

from __future__ import annotations

import pytest
import torch

from detdistill.data.loading import DetectionDataset, open_data
from detdistill.data.unlabeled import UnlabeledImages
from detdistill.recipe import AugmentConfig, DataConfig, TrainingConfig
from detdistill.training.batches import micro_batches

AUGMENT = AugmentConfig(flip=0.5, photometric=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = DataConfig(
        format="digits",
        root=tmp_path_factory.mktemp("digits") / "set",
        train_size=12,
        val_size=6,
        image_size=96,
    )
    return open_data(config)["train"]


def samples(split, files, start, stop, *, workers=0, augment=AUGMENT):
    """Labeled and unlabeled samples of some steps."""
    training = TrainingConfig(batch_size=4, accumulate=2, workers=workers, seed=3, max_steps=6)
    labeled = DetectionDataset(split, augment, training.seed)
    more = UnlabeledImages(files, AUGMENT, training.seed, label_maps=False)
    return [
        each
        for micro in micro_batches(labeled, more, training, start, stop)
        for each in (micro.labeled, micro.unlabeled)
    ]


def named(found):
    return [(each.keys, each.views) for each in found]


@pytest.fixture(scope="module")
def files(data):
    return [record.path for record in data.records][:8]


def test_keys_and_views_depend_neither_on_workers_nor_on_where_a_run_began(data, files):
    whole = samples(data, files, 0, 6)
    assert named(samples(data, files, 0, 6, workers=2)) == named(whole)
    resumed = samples(data, files, 4, 6)
    assert named(resumed) == named(whole)[-len(resumed) :]


def test_key_and_view_identify_the_pixels_of_a_run(data, files):
    """Equal names have equal pixels, and another epoch is another view of the same image."""
    pixels, views = {}, {}
    for each in samples(data, files, 0, 6)[::2]:
        for image, key, view in zip(each.images, each.keys, each.views, strict=True):
            assert torch.equal(pixels.setdefault((key, view), image), image)
            views.setdefault(key, set()).add(view)
    assert views.keys() == {str(record.image_id) for record in data.records}
    assert {len(of_image) for of_image in views.values()} == {2}


def test_images_without_augmentation_have_no_view(data, files):
    labeled = samples(data, files, 0, 1, augment=None)[0]
    assert labeled.views == (None, None)
    assert all(key is not None for key in labeled.keys)
