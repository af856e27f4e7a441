"""CIRKD: relations of pixels across the images of a batch, and to a memory (Yang et al., CVPR 2022).

With features of length 1 (the student's projected to the teacher's width for the memory), and rows of cosines
turned into distributions by a softmax with temperature τ::

    batch   = mean over pairs of images (a, b) and pixels p of a of KL(q(T_ap · T_b) ‖ q(S_ap · S_b))
    memory  = mean over labeled pixels p of KL(q(T_p · V) ‖ q(P(S)_p · V))
    L       = batch_weight · batch + pixel_weight · memory(V: pixels) + region_weight · memory(V: regions)

The memory holds, in a queue for each class, teacher features of single pixels, and of regions: the mean over a
class's pixels in an image. V is an equal number from each class's queue, drawn anew at each step. Queues begin
with random directions, as published, and grow by at most 16 pixels and one region for each class and image.

Shape legend: N images, C channels, P pixels, Q classes, L places of a queue, K draws, V contrasts.
Reduction: "mean"; the last level (of segmenters, the only one) is used.

What differs from the published code: a queue gets pixels of its own class (there, indices of the class's pixels
were used as if they were the image's, so that labels were wrong); pixels are pooled until an image has at most
``cells`` of them, and at most ``anchors`` pixels of a batch meet the memory, drawn at random, so that what is
needed in memory is bounded; torch.distributed is not needed, and where it is used all processes have the
same queues. The published whole adds `kd` with weight 1.

As published the pixels' queues are large: 20000 places of C float32 for each class, with 19 classes and 512
channels 0.8 GB, in a checkpoint too. `pixel_places` makes them smaller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from detdistill.data.records import UNLABELED
from detdistill.distillation.method import Method, PairContext, StepOutputs
from detdistill.distillation.precision import in_full_precision
from detdistill.distillation.regions import class_labels
from detdistill.models.layers.heads import avg_factor
from detdistill.recipe.methods import CIRKDOptions


class CIRKDLoss(nn.Module):
    """The distributions of the module's equation, and their divergence.

    Args:
        batch_weight, pixel_weight, region_weight: factors on the terms; a term of weight 0 is not computed.
        temperature: τ, of the cosines.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(
        self,
        *,
        batch_weight: float = 1.0,
        pixel_weight: float = 0.1,
        region_weight: float = 0.1,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.batch_weight, self.pixel_weight, self.region_weight = batch_weight, pixel_weight, region_weight
        self.temperature = temperature

    @in_full_precision
    def forward(self, student_NCP: Tensor, teacher_NCP: Tensor) -> Tensor:
        """The batch term: C may differ; the teacher is detached. Returns a scalar."""
        s_NCP, t_NCP = F.normalize(student_NCP, dim=1), F.normalize(teacher_NCP.detach(), dim=1)
        # One image at a time, computed again in the backward pass: N·P² numbers are held, not N²·P².
        terms = [
            checkpoint(self._of_an_image, *x, s_NCP, t_NCP, use_reentrant=False, preserve_rng_state=False)
            for x in zip(s_NCP, t_NCP, strict=True)
        ]
        return torch.stack(terms).mean()

    @in_full_precision
    def memory(
        self, student_KC: Tensor, teacher_KC: Tensor, contrasts_VC: Tensor, valid_K: Tensor | None = None
    ) -> Tensor:
        """A memory term: rows of length 1; the teacher is detached. Returns a scalar.

        Args:
            valid_K: bool; the rows that count (without one, the term is 0). None: all.
        """
        kl_K = self._divergence(student_KC @ contrasts_VC.T, teacher_KC.detach() @ contrasts_VC.T)
        if valid_K is None:
            return kl_K.mean()
        return (kl_K * valid_K).sum() / avg_factor(valid_K.sum())

    def _of_an_image(
        self, student_CP: Tensor, teacher_CP: Tensor, student_NCP: Tensor, teacher_NCP: Tensor
    ) -> Tensor:
        return self._divergence(student_CP.T @ student_NCP, teacher_CP.T @ teacher_NCP).mean()

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(softmax(teacher / τ) ‖ softmax(student / τ)) along the last dimension, which disappears."""
        log_s, log_t = ((x / self.temperature).log_softmax(dim=-1) for x in (student, teacher))
        return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=-1)


class Memory(nn.Module):
    """A queue of feature directions for each class; saved with the run.

    Args:
        classes, channels: numbers.
        length: places of each queue.
    """

    queue_QLC: Tensor
    next_Q: Tensor

    def __init__(self, classes: int, channels: int, length: int) -> None:
        super().__init__()
        # One place more than asked for: what must not be kept is written there.
        self.register_buffer("queue_QLC", F.normalize(torch.randn(classes, length + 1, channels), dim=2))
        self.register_buffer("next_Q", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def add(self, features_QKC: Tensor, valid_QK: Tensor) -> None:
        """Put those features that are valid in the queues of their classes, over the oldest there.

        Of several processes, which give K alike, each puts in what all have found.
        """
        features_QKC, valid_QK = of_all_processes(features_QKC), of_all_processes(valid_QK)
        length = self.queue_QLC.shape[1] - 1
        # The last ones of more than a queue holds.
        rank_QK = valid_QK.flip(1).cumsum(1).flip(1)
        valid_QK = valid_QK & (rank_QK <= length)
        place_QK = (self.next_Q[:, None] + valid_QK.cumsum(1) - 1) % length
        place_QK = torch.where(valid_QK, place_QK, length)
        at_QKC = place_QK[:, :, None].expand_as(features_QKC)
        self.queue_QLC.scatter_(1, at_QKC, features_QKC.to(self.queue_QLC.dtype))
        self.next_Q.copy_((self.next_Q + valid_QK.sum(1)) % length)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(Q·count, C): so many of each class, at the same random places."""
        length = self.queue_QLC.shape[1] - 1
        device = self.queue_QLC.device
        places = torch.randperm(length, generator=generator, device=device)[:count]
        return self.queue_QLC[:, places].flatten(0, 1)


class CIRKD(Method):
    """:class:`CIRKDLoss` on the last level."""

    requires = frozenset({"labels"})

    def __init__(self, context: PairContext, options: CIRKDOptions) -> None:
        super().__init__()
        self.level = context.matching.levels[-1]
        self.loss = CIRKDLoss(
            batch_weight=options.batch_weight,
            pixel_weight=options.pixel_weight,
            region_weight=options.region_weight,
            temperature=options.temperature,
        )
        self.cells, self.anchors = options.cells, options.anchors
        self.class_count = count = len(context.student.classes)
        self.of_each = {
            "pixel": math.ceil(options.pixel_contrasts / count),
            "region": math.ceil(options.region_contrasts / count),
        }
        width = self.level.teacher_channels
        self.memories = nn.ModuleDict()
        if options.pixel_weight:
            self.memories["pixel"] = Memory(count, width, options.pixel_places)
        if options.region_weight:
            self.memories["region"] = Memory(count, width, options.region_places)
        if self.memories:
            self.project = nn.Sequential(
                nn.Conv2d(self.level.student_channels, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 1, bias=False),
            )

    def forward(self, step: StepOutputs) -> Tensor:
        teacher = step.teacher[self.level.teacher_stride]
        student = step.alignment(step.student[self.level.student_stride], teacher)
        terms = []
        if self.loss.batch_weight:
            ours, theirs = (pooled(x, self.cells).flatten(2) for x in (student, teacher))
            terms.append(self.loss.batch_weight * self.loss(ours, theirs))
        if self.memories:
            labels_NP = class_labels(step.teacher_batch, teacher).flatten(1)
            s_NCP = F.normalize(self.project(student).flatten(2).float(), dim=1)
            t_NCP = F.normalize(teacher.flatten(2).float(), dim=1)
            if self.training:
                self._remember(t_NCP, labels_NP, step.generator)
            labeled = (labels_NP != UNLABELED).flatten()
            rows_K, valid_K = random_places(labeled, self.anchors, step.generator)
            s_KC, t_KC = (x.transpose(1, 2).flatten(0, 1)[rows_K] for x in (s_NCP, t_NCP))
            for name, weight in (("pixel", self.loss.pixel_weight), ("region", self.loss.region_weight)):
                if weight:
                    contrasts_VC = self._memory(name).draw(self.of_each[name], step.generator)
                    terms.append(weight * self.loss.memory(s_KC, t_KC, contrasts_VC, valid_K))
        return torch.stack(terms).sum() if terms else student.float().sum() * 0

    def _memory(self, name: str) -> Memory:
        memory = self.memories[name]
        assert isinstance(memory, Memory)
        return memory

    @torch.no_grad()
    def _remember(self, t_NCP: Tensor, labels_NP: Tensor, generator: torch.Generator) -> None:
        is_NQP = labels_NP[:, None] == torch.arange(self.class_count, device=labels_NP.device)[:, None]
        if "region" in self.memories:
            with torch.autocast(t_NCP.device.type, enabled=False):
                sums_NQC = is_NQP.to(t_NCP.dtype) @ t_NCP.transpose(1, 2)
            # Of a direction, the sum serves as the mean.
            means_QNC = F.normalize(sums_NQC, dim=2).transpose(0, 1)
            self._memory("region").add(means_QNC, is_NQP.any(dim=2).T)
        if "pixel" in self.memories:
            places_NQK, valid_NQK = random_places(is_NQP, PIXELS_OF_A_CLASS, generator)
            at_NCM = places_NQK.flatten(1)[:, None].expand(-1, t_NCP.shape[1], -1)  # M = Q·K
            found_NQKC = t_NCP.gather(2, at_NCM).transpose(1, 2).unflatten(1, places_NQK.shape[1:])
            self._memory("pixel").add(
                found_NQKC.transpose(0, 1).flatten(1, 2), valid_NQK.transpose(0, 1).flatten(1)
            )


PIXELS_OF_A_CLASS = 16  # that each image adds to the memory, as published


def of_all_processes(x: Tensor) -> Tensor:
    """The process's own x and the others', one after the other along dimension 1."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return x
    shares = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(shares, x.contiguous())
    return torch.cat(shares, dim=1)


def pooled(x_NCHW: Tensor, cells: int) -> Tensor:
    """The map averaged over 2×2 cells, again and again, until an image has no more than so many."""
    while x_NCHW.shape[-2] * x_NCHW.shape[-1] > cells and min(x_NCHW.shape[-2:]) > 1:
        x_NCHW = F.avg_pool2d(x_NCHW, 2, ceil_mode=True)
    return x_NCHW


def random_places(wanted: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random places along the last dimension, wanted ones first; the host does not wait for how many there are.

    Args:
        wanted: bool (..., P).

    Returns:
        (..., K) places, K at most ``count``, and whether each is wanted at all.
    """
    draw = torch.rand(wanted.shape, generator=generator, device=wanted.device) + 1
    best = (draw * wanted).topk(min(count, wanted.shape[-1]), dim=-1)
    return best.indices, best.values > 0
