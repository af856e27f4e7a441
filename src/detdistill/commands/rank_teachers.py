"""``rank-teachers``: what can be told of candidate teachers before a long run.

The teacher's quality (AP, of segmenters mIoU), its features' agreement with the student's (linear CKA), what a
training step with it costs, and how much larger it is. The recommendation goes by quality, and by cost among
candidates that are as good; what the other numbers are worth is told in docs/choosing-a-teacher.md.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from detdistill.data.loading import DetectionDataset, collate, make_loader, usable_splits
from detdistill.data.records import Split
from detdistill.distillation.classes import match_classes
from detdistill.distillation.pair import Pair
from detdistill.distillation.teachers import Samples
from detdistill.errors import UserError
from detdistill.evaluation.evaluate import as_model, choose_device
from detdistill.evaluation.model import evaluate_model, main_number
from detdistill.evaluation.similarity import feature_agreement
from detdistill.models import build_model, load_teacher
from detdistill.models.base import Model, Target
from detdistill.models.build import check_targets, needs_masks
from detdistill.models.checkpoints.weights import find_weights
from detdistill.recipe import Recipe, TrainingConfig, load_recipe
from detdistill.recipe.models import SavedModelConfig
from detdistill.training.precision import DTYPES, resolve_precision
from detdistill.training.step import build_optimizer

TIE = 0.01  # of quality: what two seeds of one training may differ by


@dataclass(frozen=True, slots=True)
class TeacherScore:
    """What was measured of a candidate.

    Attributes:
        teacher: the run folder or file, as it was given.
        what: family and backbone.
        quality: by the ranking's metric, on the validation split, in [0, 1].
        gap: ``quality`` less that of the baseline, where that is known.
        cka_start: by the student's stride, linear CKA of its matched level and the teacher's; of the student as
            the run would start it, with BatchNorm in training mode, as the first step sees it.
        cka_trained: the same of the trained baseline, in evaluation mode, where there is one.
        step_cost: time of a training step with this teacher over that of the baseline.
        parameters: of the whole model.
        parameter_ratio: over the student's.
    """

    teacher: str
    what: str
    quality: float
    gap: float | None
    cka_start: dict[int, float]
    cka_trained: dict[int, float] | None
    step_cost: float
    parameters: int
    parameter_ratio: float


@dataclass(frozen=True, slots=True)
class TeacherRanking:
    """Candidates, best first.

    Attributes:
        scores: of the candidates that can teach this student.
        refused: of the others, (teacher, why).
        methods: with which the step was timed.
        images: of the validation split, on which features were compared.
        metric: what quality is measured by: "AP", of segmenters "mIoU".
        measured_images, val_images: on how many of its images it was measured.
        student_quality: of the trained baseline, on the same images, or None.
    """

    scores: tuple[TeacherScore, ...]
    refused: tuple[tuple[str, str], ...]
    methods: tuple[str, ...]
    images: int
    metric: str
    measured_images: int
    val_images: int
    student_quality: float | None

    @property
    def recommendation(self) -> str:
        """In words: which, why, and on what that rests."""
        if not self.scores:
            return "none of the candidates can teach this student"
        best = self.scores[0]
        lines = [f"recommended: {best.teacher} ({self._reason()})"]
        nearest = max(self.scores, key=lambda score: mean_cka(score.cka_trained))
        ckas = mean_cka(nearest.cka_trained), mean_cka(best.cka_trained)
        if ckas[0] > ckas[1]:
            lines.append(
                f"but the features of {nearest.teacher} are nearer to the trained student's (CKA "
                f"{ckas[0]:.3f}, not {ckas[1]:.3f}), which told more than {self.metric} where it was tried: "
                f"compare the two"
            )
        if best.gap is not None and best.gap <= 0:
            lines.append("no candidate is better than the baseline: a gain is less likely, not impossible")
        lines.append(
            f"by {self.metric} on {self.measured_images} of {self.val_images} validation images, and by the "
            f"cost of a step within {100 * TIE:.0f} {self.metric} of the best (docs/choosing-a-teacher.md)"
        )
        return "\n".join(lines)

    def _reason(self) -> str:
        best, *others = self.scores
        if not others:
            return "the only one"
        equals = [score.teacher for score in _equals(self.scores) if score is not best]
        if equals:
            return f"as good as {', '.join(equals)}, at the least cost"
        return f"{100 * (_comparable(best) - max(map(_comparable, others))):.1f} {self.metric} ahead"


def mean_cka(by_stride: Mapping[int, float] | None) -> float:
    """Mean over the levels; NaN where there is none."""
    return statistics.mean(by_stride.values()) if by_stride else math.nan


def rank_teachers(
    recipe: Recipe | str | Path,
    teachers: Sequence[str | Path],
    overrides: Iterable[str] = (),
    *,
    student: Model | str | Path | None = None,
    images: int = 64,
    limit: int | None = None,
    rounds: int = 5,
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> TeacherRanking:
    """Score candidate teachers of a recipe's student; nothing is trained or written.

    A candidate that cannot teach this student is among ``refused``, and the others are ranked.

    Args:
        recipe: the student's recipe, or its file; its own teacher, if any, is not a candidate. Its methods, or
            ``ima`` where it has none, are those whose step is timed.
        teachers: run folders or weights files.
        overrides: as ``training.batch_size=4``; only for a file.
        student: the same student trained alone (a run folder or file): then the gap to its quality, and how
            its features agree, are told too.
        images: of the validation split, evenly spread, on which features are compared.
        limit: measure quality on so many images instead of all: quicker, and rougher.
        rounds: timed steps of each pair, in turns, after one that is not timed.
        device: ``auto``, ``cpu``, ``cuda:1``, …
        say: told, a line at a time, what is done.

    Raises:
        UserError: no candidate is named, or the recipe, its data, its student or the trained one is of no use.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    if not teachers:
        raise UserError("name at least one teacher: a run folder or a weights file")
    if images < 1 or rounds < 1:
        raise UserError(f"images is {images} and rounds {rounds}: both must be at least 1")
    where = choose_device(device)
    splits = usable_splits(recipe.data, ("train", "val"), with_masks=needs_masks(recipe.student))
    train, val = splits["train"], splits["val"]
    check_targets(recipe.student, train)
    torch.manual_seed(recipe.training.seed)
    start = build_model(recipe.student, train.classes).to(where)
    trained = None if student is None else _like(start, student).to(where)

    pairs, refused = _pairs(teachers, start, recipe, train.classes)
    say(f"{len(pairs)} of {len(teachers)} candidates can teach this student; timing steps")
    batch = _first_batch(train, start, recipe.training, where)
    costs = step_costs(start, pairs, *batch, recipe.training, rounds)
    measure = _Measure(recipe.training, start, trained, val, images, limit)
    student_quality = None
    if trained is not None:
        student_quality = measure.quality(trained)
        say(f"baseline: {measure.metric} {100 * student_quality:.1f}")
    scores = []
    for name, pair in pairs.items():
        scores.append(measure.score(name, pair, costs[name], student_quality))
        say(f"{name}: {measure.metric} {100 * scores[-1].quality:.1f}")
    return TeacherRanking(
        scores=tuple(_ranked(scores)),
        refused=tuple(refused),
        methods=tuple(method.name for method in recipe.methods) or ("ima",),
        images=min(images, len(val)),
        metric=measure.metric,
        measured_images=min(limit or len(val), len(val)),
        val_images=len(val),
        student_quality=student_quality,
    )


def _pairs(
    teachers: Sequence[str | Path], start: Model, recipe: Recipe, classes: Sequence[str]
) -> tuple[dict[str, Pair], list[tuple[str, str]]]:
    """Each candidate with a student of its own, and the candidates that cannot teach it, with the reason."""
    pairs: dict[str, Pair] = {}
    refused: list[tuple[str, str]] = []
    seen: dict[Path, str] = {}
    for name in map(str, teachers):
        try:
            file = find_weights(name).resolve()
            if file in seen:
                raise UserError(f"the same file as {seen[file]}: name each teacher once")
            seen[file] = name
            teacher = load_teacher(SavedModelConfig(weights=name), classes)
            if not match_classes(classes, teacher.classes).pairs:
                known = ", ".join(teacher.classes[:3]) + ", …" * (len(teacher.classes) > 3)
                raise UserError(f"knows {known} and none of the data's classes: it cannot be measured here")
            pair = Pair(copy.deepcopy(start), teacher, recipe.methods or ["ima"])
        except UserError as error:
            refused.append((name, str(error)))
            continue
        pairs[name] = pair.to(next(start.parameters()).device)
    return pairs, refused


@dataclass(frozen=True, slots=True)
class _Measure:
    """Measures candidates in the same way, one after another."""

    config: TrainingConfig
    start: Model
    trained: Model | None
    val: Split
    images: int
    limit: int | None

    def score(self, name: str, pair: Pair, step_cost: float, student_quality: float | None) -> TeacherScore:
        teacher, matching = pair.teacher, pair.matching
        assert teacher is not None
        assert matching is not None

        def agreement(student: Model) -> dict[int, float]:
            return feature_agreement(student, teacher, matching, self._batches())

        parameters = _parameters(teacher)
        quality = self.quality(teacher)
        return TeacherScore(
            teacher=name,
            what=teacher.description,
            quality=quality,
            gap=None if student_quality is None else quality - student_quality,
            cka_start=agreement(copy.deepcopy(self.start).train()),  # a copy: BatchNorm's averages move
            cka_trained=None if self.trained is None else agreement(self.trained),
            step_cost=step_cost,
            parameters=parameters,
            parameter_ratio=parameters / _parameters(self.start),
        )

    @property
    def metric(self) -> str:
        return main_number(self.start)

    def quality(self, model: Model) -> float:
        batch_size, workers = _micro_batch(self.config), self.config.workers
        evaluation = evaluate_model(model, self.val, batch_size=batch_size, workers=workers, limit=self.limit)
        return evaluation.numbers()[evaluation.main]

    def _batches(self) -> Iterator[list[Tensor]]:
        """Validation images in batches that differ by one at most: BatchNorm wants none of a single image."""
        count = min(self.images, len(self.val))
        spread = [i * len(self.val) // count for i in range(count)]
        batches = -(-count // _micro_batch(self.config))
        parts = [spread[i::batches] for i in range(batches)]
        device = next(self.start.parameters()).device
        for images, _ in make_loader(DetectionDataset(self.val, None), parts, self.config.workers):
            yield [image.to(device, non_blocking=True) for image in images]


def step_costs(
    student: Model,
    pairs: Mapping[str, Pair],
    images: Sequence[Tensor],
    targets: Sequence[Target],
    config: TrainingConfig,
    rounds: int = 5,
) -> dict[str, float]:
    """Time of each pair's training step over that of the baseline, without loading.

    All take turns, so that a machine whose speed drifts treats them alike; of the ratios of one round's steps
    the median over the rounds. The pairs are trained by it.

    Args:
        student: as the pairs have it; copied.
        images, targets: a batch, on the models' device.
        config: precision, optimizer and memory format.
        rounds: after one that is not timed.
    """
    alone = Pair(copy.deepcopy(student))
    turns = [alone, *pairs.values()]
    if config.channels_last:
        for pair in turns:
            pair.distiller.to_channels_last()
    optimizers = [build_optimizer(pair, config.optimizer) for pair in turns]
    seconds: list[list[float]] = [[] for _ in turns]
    for i in range(rounds + 1):
        for pair, optimizer, own in zip(turns, optimizers, seconds, strict=True):
            pair.train()
            pair.at_step(1, 2)  # whatever the schedule, the methods have weight, and `auto` does not measure
            begin = time.perf_counter()
            _step(pair, optimizer, images, targets, config)
            if i:
                own.append(time.perf_counter() - begin)
    return {
        name: statistics.median(a / b for a, b in zip(own, seconds[0], strict=True))
        for name, own in zip(pairs, seconds[1:], strict=True)
    }


def _step(
    pair: Pair,
    optimizer: torch.optim.Optimizer,
    images: Sequence[Tensor],
    targets: Sequence[Target],
    config: TrainingConfig,
) -> None:
    device = images[0].device
    precision = resolve_precision(config.precision, device)
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
        loss = torch.stack(list(pair(images, targets).values())).sum()
    loss.backward()
    if config.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(pair.parameters(), config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _first_batch(
    train: Split, student: Model, config: TrainingConfig, device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    dataset = DetectionDataset(train, None, with_masks=student.needs_masks)
    count = min(_micro_batch(config), len(train))
    images, targets = collate([dataset[i * len(train) // count] for i in range(count)])
    samples = Samples(images, targets).to(device)
    return list(samples.images), list(samples.targets or ())


def _micro_batch(config: TrainingConfig) -> int:
    return config.batch_size // config.accumulate


def _like(start: Model, student: Model | str | Path) -> Model:
    """The trained student, if it is built as the recipe's."""
    trained = as_model(student).eval()
    ours, theirs = ({n: t.shape for n, t in model.state_dict().items()} for model in (start, trained))
    if ours != theirs:
        raise UserError(f"{student}: is another model than the recipe's student; give a run of this recipe")
    return trained


def _ranked(scores: Sequence[TeacherScore]) -> Iterator[TeacherScore]:
    """By quality; those within ``TIE`` of the best that is left, by cost."""
    rest = list(scores)
    while rest:
        equals = _equals(rest)
        yield from sorted(equals, key=lambda score: score.step_cost)
        rest = [score for score in rest if score not in equals]


def _equals(scores: Sequence[TeacherScore]) -> list[TeacherScore]:
    """Those as good as the best."""
    floor = max(map(_comparable, scores)) - TIE
    return [score for score in scores if _comparable(score) >= floor]


def _comparable(score: TeacherScore) -> float:
    """Its quality; NaN (nothing to find) as 0."""
    return 0.0 if math.isnan(score.quality) else score.quality


def _parameters(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())
