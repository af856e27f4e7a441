"""What a run sees, step by step: labeled images, and perhaps some without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from detdistill.data.loading import DetectionDataset, make_loader
from detdistill.data.records import Split
from detdistill.data.unlabeled import UnlabeledImages, find_unlabeled
from detdistill.distillation.distiller import Trainable
from detdistill.distillation.teachers import Samples
from detdistill.errors import UserError
from detdistill.models.base import Target
from detdistill.recipe import Recipe, TrainingConfig
from detdistill.seeding import mix_seed
from detdistill.training.sampler import StepSampler
from detdistill.training.step import MicroBatch

UNLABELED_SEED = 1  # mixed with the run's own: else images without labels came in the order of the others


def open_datasets(
    recipe: Recipe, train: Split, trainable: Trainable
) -> tuple[DetectionDataset, UnlabeledImages | None]:
    """The labeled images of a run, and those without labels, if there are any and methods to learn from them.

    Raises:
        UserError: no method can use images without labels, or one of them is missing.
    """
    augment, seed = recipe.training.augment, recipe.training.seed
    labeled = DetectionDataset(train, augment, seed, with_masks=trainable.student.needs_masks)
    if recipe.data.unlabeled is None or not trainable.terms:
        return labeled, None
    trainable.without_labels()
    files = find_unlabeled(recipe.data)
    return labeled, UnlabeledImages(files, augment, seed, label_maps=train.has_label_maps)


def micro_batches(
    labeled: DetectionDataset,
    unlabeled: UnlabeledImages | None,
    config: TrainingConfig,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[MicroBatch]:
    """This process's micro-batches of the steps ``start`` ≤ s < ``stop``.

    Raises:
        UserError: a step's images cannot be shared by the processes and their micro-batches.
    """

    def batches(dataset: DetectionDataset | UnlabeledImages, size: int, seed: int) -> Iterator[Any]:
        try:
            sampler = StepSampler(
                len(dataset),
                size,
                start=start,
                stop=stop,
                seed=seed,
                rank=rank,
                world=world,
                accumulate=config.accumulate,
            )
        except ValueError as error:
            raise UserError(f"training: {error}") from None
        return iter(make_loader(dataset, sampler, config.workers))

    own = batches(labeled, config.batch_size, config.seed)
    if unlabeled is None:
        return (MicroBatch(_samples(labeled, *batch)) for batch in own)
    size = config.unlabeled_batch or config.batch_size
    others = batches(unlabeled, size, mix_seed(config.seed, UNLABELED_SEED))
    both = zip(own, others, strict=True)
    return (
        MicroBatch(_samples(labeled, *batch), replace(_samples(unlabeled, *more), targets=None))
        for batch, more in both
    )


def _samples(
    dataset: DetectionDataset | UnlabeledImages, images: list[Tensor], targets: list[Target]
) -> Samples:
    keys = tuple(dataset.key(int(target["index"])) for target in targets)
    views = [target.pop("view", None) for target in targets]
    return Samples(
        images, targets, keys=keys, views=tuple(None if view is None else int(view) for view in views)
    )
