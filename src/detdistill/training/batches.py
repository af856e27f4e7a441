"""What a run sees, step by step: labelled images, and perhaps some without labels beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from detdistill.config import TrainingConfig, UserError
from detdistill.data.loading import DetectionDataset, make_loader
from detdistill.data.unlabelled import UnlabelledImages
from detdistill.seeding import mix_seed
from detdistill.training.sampler import StepSampler
from detdistill.training.step import MicroBatch

UNLABELLED_SEED = 1  # beside the run's own: else images without labels came in the order of the others


def micro_batches(
    labelled: DetectionDataset,
    unlabelled: UnlabelledImages | None,
    config: TrainingConfig,
    accelerator: Accelerator,
    start: int,
    stop: int,
) -> Iterator[MicroBatch]:
    """This process's micro-batches of the steps ``start`` ≤ s < ``stop``.

    Raises:
        UserError: a step's images cannot be shared by the processes and their micro-batches.
    """

    def batches(dataset: DetectionDataset | UnlabelledImages, size: int, seed: int) -> Iterator[Any]:
        try:
            sampler = StepSampler(
                len(dataset),
                size,
                start=start,
                stop=stop,
                seed=seed,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                accumulate=config.accumulate,
            )
        except ValueError as error:
            raise UserError(f"training: {error}") from None
        return iter(make_loader(dataset, sampler, config.workers))

    own = batches(labelled, config.batch_size, config.seed)
    if unlabelled is None:
        return (MicroBatch(images, targets, []) for images, targets in own)
    size = config.unlabelled_batch or config.batch_size
    others = batches(unlabelled, size, mix_seed(config.seed, UNLABELLED_SEED))
    both = zip(own, others, strict=True)
    return (MicroBatch(images, targets, more) for (images, targets), (more, _) in both)
