"""One optimization step of a student with its teachers."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detdistill.distillation.distiller import Distiller, Trainable
from detdistill.distillation.teachers import Samples
from detdistill.errors import UserError
from detdistill.models.families.detr import DETR
from detdistill.recipe import OptimizerConfig, TrainingConfig
from detdistill.seeding import mix_seed

logger = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """What one forward pass sees: images with labels, and perhaps some without."""

    labeled: Samples
    unlabeled: Samples | None = None


@dataclass(slots=True)
class StepOutcome:
    """What a step leaves for the log; tensors stay on the device until the log is due."""

    step: int
    terms: dict[str, Tensor]
    gradient_norm: Tensor | None  # of the whole gradient, before it was clipped; None: it is not clipped
    indices: list[Tensor]  # positions of its images in the training split

    @property
    def images(self) -> int:
        return len(self.indices)


def optimization_step(
    accelerator: Accelerator,
    model: nn.Module,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    step: int,
    config: TrainingConfig,
) -> StepOutcome:
    """Forward and backward on each micro-batch, then one update.

    All randomness of a step comes from (seed, step, micro-batch, process), so that a resumed run goes on
    exactly as an uninterrupted one, and a student's draws do not depend on being distilled.
    """
    scale_factor = draw_scale_factor(config, step)
    totals: dict[str, Tensor] = {}
    for i, micro_batch in enumerate(micro_batches):
        torch.manual_seed(mix_seed(config.seed, step, i, accelerator.process_index))
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                losses = losses_of(model, distiller, micro_batch, scale_factor, accelerator.device)
            accelerator.backward(torch.stack(list(losses.values())).sum() / len(micro_batches))
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(micro_batches)
    norm = None
    if config.clip_norm is not None:
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    indices = [target["index"] for micro_batch in micro_batches for target in micro_batch.labeled.targets or ()]
    return StepOutcome(step, totals, norm, indices)


def losses_of(
    model: nn.Module, distiller: Distiller, micro_batch: MicroBatch, scale_factor: float, device: torch.device
) -> dict[str, Tensor]:
    """The forward pass of teachers and student on a micro-batch: every loss term by name.

    Args:
        model: the distiller's trainable, perhaps wrapped.

    Raises:
        UserError: a BatchNorm layer has one value per channel.
    """
    seen: list[Any] = []
    for samples in micro_batch:
        if samples is not None:
            samples = replace(samples.to(device), scale_factor=scale_factor)
            seen += [samples, distiller.observe(samples)]
    try:
        losses: dict[str, Tensor] = model(*seen)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "BatchNorm has one value per channel to average over: raise training.batch_size or student.size, "
            "or give student.norm: frozen"
        ) from error
    return losses


def draw_scale_factor(config: TrainingConfig, step: int) -> float:
    """Multi-scale training: the factor on the input size, one for the whole step in every process."""
    if config.augment.multi_scale is None:
        return 1.0
    return random.Random(mix_seed(config.seed, step)).uniform(*config.augment.multi_scale)


def build_optimizer(trainable: Trainable, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over student and adapters; norms and biases are not decayed.

    Each parameter group keeps its ``base_lr``, which the schedule multiplies.
    """
    if isinstance(trainable.student, DETR) and config.name == "sgd":
        logger.warning(
            "%s hardly learns by SGD: give training.optimizer={name: adamw}", type(trainable.student).__name__
        )
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter, in_backbone, decayed in _parameters(trainable):
        groups.setdefault((in_backbone, decayed), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "lr": (lr := config.lr * (config.backbone_lr_factor if in_backbone else 1.0)),
            "base_lr": lr,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (in_backbone, decayed), parameters in groups.items()
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(settings, betas=config.betas)
    return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def _parameters(trainable: Trainable) -> Iterator[tuple[Tensor, bool, bool]]:
    for name, parameter in trainable.named_parameters():
        if parameter.requires_grad:
            in_backbone = name.startswith(("student.backbone.", "student.model.backbone."))  # of a wrapped one
            yield parameter, in_backbone, parameter.ndim > 1
