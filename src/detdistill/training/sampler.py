"""Which images make which step: a function of (seed, step) alone, so that resuming is exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from detdistill.recipe import TrainingConfig
from detdistill.seeding import mix_seed


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Yields, for every step from ``start`` to ``stop``, this process's batches of (epoch, index).

    Every epoch is a new permutation of the images, cut into steps of ``batch_size``; what is left over at its
    end is left out (it has its chance in the next permutation). A set smaller than one batch is repeated.
    Step s is the same images however many processes and micro-batches share it, and wherever the run began.

    Args:
        length: images of the dataset.
        batch_size: images of one optimizer step, over all processes and micro-batches.
        stop, start: the steps to yield, ``start`` ≤ s < ``stop``.
        seed: of the permutations.
        rank, world: this process, and how many there are.
        accumulate: micro-batches of a step; each is yielded on its own.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        stop: int,
        *,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        micro_batch_size(batch_size, world, accumulate)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop = start, stop
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = steps_per_epoch(self.length, self.batch_size)
        order: list[int] = []
        order_epoch = -1
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self._permutation(epoch), epoch
            images = order[position * self.batch_size : (position + 1) * self.batch_size]
            share = len(images) // (self.world * self.accumulate)
            for micro in range(self.accumulate):
                first = (micro * self.world + self.rank) * share
                yield [(epoch, index) for index in images[first : first + share]]

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order: list[int] = torch.randperm(self.length, generator=generator).tolist()
        return order * -(-self.batch_size // self.length)


def micro_batch_size(batch_size: int, world: int, accumulate: int) -> int:
    """Images of one forward pass in one process.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """
    if batch_size % (world * accumulate):
        raise ValueError(
            f"batch_size {batch_size} cannot be shared by {world} processes × {accumulate} micro-batches"
        )
    return batch_size // (world * accumulate)


def total_steps(config: TrainingConfig, images: int) -> int:
    """Optimizer steps of a run on so many images."""
    return config.max_steps or max(1, round(config.epochs * steps_per_epoch(images, config.batch_size)))


def steps_per_epoch(length: int, batch_size: int) -> int:
    """Full steps in one pass over ``length`` images; at least one."""
    return max(1, length // batch_size)
