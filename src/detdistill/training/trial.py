"""One training step that is thrown away: what fails in it would fail in the run."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import torch

from detdistill.data.records import Split
from detdistill.distillation.distiller import Distiller
from detdistill.errors import UserError
from detdistill.recipe import Recipe
from detdistill.seeding import mix_seed
from detdistill.training.batches import micro_batches, open_datasets
from detdistill.training.precision import DTYPES, resolve_device, resolve_precision
from detdistill.training.sampler import micro_batch_size, total_steps
from detdistill.training.step import draw_scale_factor, losses_of

MOST_IMAGES = 2  # enough for BatchNorm wherever the run has enough


@dataclass(frozen=True, slots=True)
class Trial:
    """A training step that went well.

    Attributes:
        images: of its batch, the first ones of the run.
        device: where it ran.
        seconds: wall clock of loading, forward and backward.
        losses: each term, weighted.
    """

    images: int
    device: str
    seconds: float
    losses: dict[str, float]

    def __str__(self) -> str:
        terms = "  ".join(f"{name} {value:.4g}" for name, value in self.losses.items())
        images = f"{self.images} image{'s' * (self.images > 1)}"
        return f"training step: {images} on {self.device}, {self.seconds:.1f} s: {terms}"


def try_step(recipe: Recipe, distiller: Distiller, train: Split) -> Trial:
    """Forward and backward on the first training images, as the run would begin; nothing is written.

    The batch has the images of one forward pass of one process, but no more than two. The models end on the
    run's device, with gradients and changed BatchNorm statistics.

    Raises:
        UserError: the batch cannot be shared, an image cannot be read, BatchNorm has too few values, or a loss
            is not finite or has no gradient.
        Exception: whatever else a model raises.
    """
    config, started = recipe.training, time.perf_counter()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        images = micro_batch_size(config.batch_size, world, config.accumulate)
    except ValueError as error:
        raise UserError(f"training: {error}") from None
    images = min(images * (world if config.sync_batchnorm else 1), MOST_IMAGES)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    (trainable,) = distiller.trainables
    trainable.to(device)
    if config.channels_last:
        distiller.to_channels_last()
    trainable.train()
    trainable.at_step(0, total_steps(config, len(train)))
    few = {"batch_size": images, "unlabeled_batch": None, "accumulate": 1, "workers": 0}
    batches = micro_batches(
        *open_datasets(recipe, train, trainable), config.model_copy(update=few), start=0, stop=1
    )
    torch.manual_seed(mix_seed(config.seed, 0))
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
        terms = losses_of(trainable, distiller, next(batches), draw_scale_factor(config, 0), device)
    torch.stack([term.float() for term in terms.values()]).sum().backward()
    losses = {name: float(term.detach()) for name, term in terms.items()}
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"loss term {', '.join(bad)} is not finite at the first step: "
            "evaluate student and teacher, whose weights may be damaged; in bf16 or fp16, train in fp32"
        )
    return Trial(images, str(device), time.perf_counter() - started, losses)
