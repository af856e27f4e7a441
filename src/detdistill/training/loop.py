"""Train one recipe: a baseline, or with its teacher. The same loop serves both."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor

from detdistill.data.loading import usable_splits
from detdistill.distillation.distiller import distiller_of
from detdistill.distillation.inheriting import inherit
from detdistill.errors import UserError
from detdistill.evaluation.measure import Evaluation
from detdistill.evaluation.model import evaluate_model
from detdistill.models.base import Model
from detdistill.models.build import check_targets, needs_masks
from detdistill.models.checkpoints.io import save_model
from detdistill.models.limits import require_memory_for_training
from detdistill.recipe import Recipe
from detdistill.training.batches import micro_batches, open_datasets
from detdistill.training.callbacks import (
    Callback,
    Callbacks,
    Pictures,
    Run,
    Trackers,
    installed_callbacks,
    trackers_of,
)
from detdistill.training.display import Display
from detdistill.training.models import models_of
from detdistill.training.precision import computes_bf16, resolve_device, resolve_precision
from detdistill.training.preemption import PREEMPTED, Stop, StopRequest, stop_request
from detdistill.training.run_folder import Row, RunFolder
from detdistill.training.sampler import steps_per_epoch, total_steps
from detdistill.training.schedules import learning_rate_factor
from detdistill.training.step import MicroBatch, StepOutcome, build_optimizer, optimization_step

LOG_EVERY = 20  # steps; the only regular moment at which the host waits for the device
DROWNING, DROWNING_SHARE = 10, 0.9  # of a gradient over clip_norm and of the loss: then a warning is due


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        status: "finished", "stopped early" (patience) or "out of time" (max_time).
        metrics: numbers in [0, 1] of the exported student on the validation split (COCO's, or mIoU and what
            goes with it), and ``minutes``.
        run: the run folder.
        student: the exported student file.
    """

    status: str
    metrics: dict[str, float]
    run: Path
    student: Path


def train(
    recipe: Recipe,
    run: Path,
    *,
    resume: bool = True,
    student: Model | None = None,
    teacher: Model | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a recipe in a run folder, going on where an earlier call left off.

    Args:
        recipe, run: what is trained, and in which folder.
        resume: go on; else start anew.
        student, teacher: objects for the sections that say ``python``. The student ends with the weights that
            were measured and exported: the averaged ones with ``ema``, the best after early stopping.
        callbacks: what watches the run, in addition to those of the recipe.

    Raises:
        UserError: the recipe, data, teacher or folder is not usable, or a loss is not finite.
        SystemExit: with code 75, after saving, on SIGTERM or SIGUSR1.
        KeyboardInterrupt: after saving, on Ctrl-C; at once on a second one.
    """
    folder = RunFolder(run)
    folder.require_apart(recipe.data)
    with folder.held(), stop_request() as request:
        folder.open(recipe, resume=resume)
        done = folder.ended(recipe) if resume else None
        if done is not None:
            if student is not None:
                student.exported.load_state_dict(load_file(folder.student_file))
            return TrainResult(done["status"], done["metrics"], run, folder.student_file)
        return _Trainer(recipe, folder, student, teacher, request, callbacks).run()


class _Trainer:
    """The state of one run, and its loop."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        student: Model | None,
        teacher: Model | None,
        request: StopRequest,
        callbacks: Sequence[Callback],
    ) -> None:
        self.recipe, self.config, self.folder, self.request = recipe, recipe.training, folder, request
        trackers, own = trackers_of(self.config.trackers), installed_callbacks(self.config.callbacks)
        with_masks = needs_masks(recipe.student) if student is None else student.needs_masks
        splits = usable_splits(recipe.data, ("train", "val"), with_masks=with_masks)
        folder.keep_to_data(splits)
        self.train_split, self.val_split = splits["train"], splits["val"]
        check_targets(recipe.student, self.train_split, student)
        if PartialState._shared_state:
            # Accelerate keeps one state for the process and refuses another precision or device: a second run
            # in this process starts from a new one (but stays in the group of processes, if there is one).
            AcceleratorState._reset_state(reset_partial_state=PartialState().num_processes == 1)
        device = resolve_device(self.config.device)
        on_cpu = device.type == "cpu"
        self.precision = resolve_precision(self.config.precision, device)
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(self.precision, self.precision),
            cpu=on_cpu,
            log_with=trackers or None,
            project_dir=folder.path,
            # All processes write the same into buffers that matter, and only the first one's are exported.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.display = Display(self.accelerator.is_main_process)
        watching: list[Callback] = [self.display]
        if trackers:
            watching.append(Trackers(self.accelerator, trackers))
        if self.config.pictures:
            watching.append(Pictures())
        self.callbacks = Callbacks([*watching, *own, *callbacks], enabled=self.accelerator.is_main_process)
        if self.precision != "fp32" and on_cpu and not computes_bf16(device):
            self.display.note(
                f"warning: this processor has no instructions for {self.precision} and emulates it, some ten "
                "times as slowly: give training.precision=auto"
            )
        for kind, count in (self.train_split.warning_counts() + self.val_split.warning_counts()).items():
            self.display.note(f"dropped or fixed: {count} × {kind} (see `detdistill check`)")

        set_seed(self.config.seed)
        student, teacher = models_of(recipe, self.train_split.classes, student, teacher)
        require_memory_for_training(recipe, student, self.train_split)
        student.category_ids = self.train_split.numeric_ids
        if recipe.inherit and not folder.has_checkpoint:  # a run that goes on has learnt since
            assert teacher is not None
            self.display.note(inherit(student, teacher))
        if self.config.sync_batchnorm and self.accelerator.num_processes > 1:
            # timm's own: torch's would drop the activation that is part of timm's BatchNormAct2d
            student = convert_sync_batchnorm(student)
        self.distiller = distiller_of(student, teacher, recipe.methods, seed=self.config.seed)
        (self.trainable,) = self.distiller.trainables
        if self.config.channels_last:
            self.distiller.to_channels_last()
        optimizer = build_optimizer(self.trainable, self.config.optimizer)
        self.model, self.optimizer = self.accelerator.prepare(self.trainable, optimizer)
        self.ema = ModelEmaV3(student, self.config.ema, use_warmup=True) if self.config.ema else None

        self.datasets = open_datasets(recipe, self.train_split, self.trainable)
        if (unlabeled := self.datasets[1]) is not None:
            able = ", ".join(self.trainable.without_labels())
            self.display.note(f"{len(unlabeled)} images without labels, from which {able} teaches")
        self.steps_per_epoch = steps_per_epoch(len(self.train_split), self.config.batch_size)
        self.total_steps = total_steps(self.config, len(self.train_split))
        self.step = self.saved = self.evaluated = 0
        self.best, self.evaluations_since_best = -1.0, 0
        self.seconds = 0.0
        self.pending: list[StepOutcome] = []
        self.warned = False

    # --- the loop --------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        try:
            self.folder.begin(self.recipe, write=self.accelerator.is_main_process)
            self.accelerator.wait_for_everyone()
            self._resume()
            status = "finished"
            started = time.perf_counter() - self.seconds
            self.log_started = time.perf_counter()
            loader = micro_batches(
                *self.datasets,
                self.config,
                start=self.step,
                stop=self.total_steps,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
            )
            self.display.start(self.recipe.name, self.step, self.total_steps)
            self.display.note(self._budget())
            self._tell("on_start")
            while self.step < self.total_steps:
                if self._due(self.config.evaluate_every) and self.evaluated < self.step:
                    self._evaluate()
                if self.config.patience and self.evaluations_since_best >= self.config.patience:
                    self._save()
                    return self._finish("stopped early", self._back_to_best())
                self._step(list(itertools.islice(loader, self.config.accumulate)))
                self.seconds = time.perf_counter() - started
                if self.step % LOG_EVERY == 0:
                    self._flush()
                stop, late = self._agree(bool(self.request), started)
                if stop or self.step % self.config.checkpoint_every == 0 or self._due(1):
                    self._save()
                if stop:
                    raise Stop
                if late:
                    status = "out of time"
                    break
            evaluation = self._evaluate()
            self._save()
            return self._finish(status, evaluation)
        except Stop:
            if self.saved < self.step:
                self._save()
            self.display.note(f"stopped at step {self.step}; the same command resumes from there")
            if self.request.interrupted:
                raise KeyboardInterrupt from None
            raise SystemExit(PREEMPTED) from None
        except KeyboardInterrupt:
            self.display.note(
                f"interrupted at step {self.step}; the same command resumes from step {self.saved}"
            )
            raise
        finally:
            self.display.stop()

    def _budget(self) -> str:
        key = "epochs" if self.config.max_steps is None else "max_steps"
        epochs = self.total_steps / self.steps_per_epoch
        return f"{self.total_steps:,} steps, {epochs:.4g} epochs (set by training.{key})"

    def _step(self, micro_batches: list[MicroBatch]) -> None:
        factor = learning_rate_factor(self.config.schedule, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.trainable.at_step(self.step, self.total_steps)
        self.model.train()
        outcome = optimization_step(
            self.accelerator, self.model, self.distiller, self.optimizer, micro_batches, self.step, self.config
        )
        self.pending.append(outcome)
        if self.ema is not None:
            self.ema.update(self.trainable.student, self.step)
        self.step += 1

    def _due(self, epochs: float) -> bool:
        """Whether a multiple of so many epochs ends with the last step."""
        if epochs == 0:
            return False
        every = max(1, round(epochs * self.steps_per_epoch))
        return self.step % every == 0

    def _agree(self, preempted: bool, started: float) -> tuple[bool, bool]:
        """(preempted, out of time), the same in every process."""
        limit = self.config.max_time
        flags = [preempted, limit is not None and time.perf_counter() - started > limit * 60]
        if self.accelerator.num_processes > 1:
            if self.step % LOG_EVERY:
                return False, False
            tensor = torch.tensor(flags, dtype=torch.int32, device=self.accelerator.device)
            flags = (self.accelerator.reduce(tensor, "sum") > 0).tolist()
        return flags[0], flags[1]

    # --- what is written -------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Average the pending steps' losses into a row; here a non-finite one is found."""
        if not self.pending:
            return
        names = list(dict.fromkeys(name for outcome in self.pending for name in outcome.terms))
        zero = torch.zeros((), device=self.accelerator.device)
        values = torch.stack([
            torch.stack([outcome.terms.get(name, zero).float() for name in names]) for outcome in self.pending
        ])  # fmt: skip
        self._refuse_non_finite(values.cpu(), names)
        mean = self.accelerator.reduce(values.mean(0), "mean").tolist()
        total = sum(mean)
        distilled = sum(value for name, value in zip(names, mean, strict=True) if name in self.trainable.terms)
        now = time.perf_counter()
        images = sum(outcome.images for outcome in self.pending) * self.accelerator.num_processes
        row: Row = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "loss": total,
            **{f"loss/{name}": value for name, value in zip(names, mean, strict=True)},
            **{f"weight/{name}": value for name, value in self.trainable.applied_weights().items()},
            "distill_share": distilled / total if total else 0.0,
            "images_per_second": images / (now - self.log_started),
        }
        norms = [outcome.gradient_norm for outcome in self.pending if outcome.gradient_norm is not None]
        if norms:
            row["gradient_norm"] = float(torch.stack(norms).mean())
            self._warn_of_drowning(row)
        self.pending.clear()
        self._log(row)
        self._tell("on_log", row)
        self.log_started = time.perf_counter()

    def _warn_of_drowning(self, row: Row) -> None:
        """Warn once when clipping leaves the detection loss little effect next to a method's gradient."""
        limit, share = self.config.clip_norm, row["distill_share"]
        if self.warned or limit is None or row["gradient_norm"] < DROWNING * limit or share < DROWNING_SHARE:
            return
        self.warned = True
        worst = max(self.trainable.terms, key=lambda name: row.get(f"loss/{name}", 0.0))
        self.display.note(
            f"warning: step {self.step}: gradients of norm {row['gradient_norm']:.0f} are clipped to {limit:g} "
            f"and {share:.0%} of the loss is distillation, so the detection loss has little effect. Lower the "
            f"weight of {worst}, or give `{worst}: {{weight: auto, ratio: 0.3}}`"
        )

    def _refuse_non_finite(self, values: Tensor, names: list[str]) -> None:
        for outcome, row in zip(self.pending, values, strict=True):
            bad = [name for name, value in zip(names, row.tolist(), strict=True) if not math.isfinite(value)]
            if bad:
                ids = [str(self.train_split.records[int(i)].image_id) for i in outcome.indices]
                saved = self.folder.checkpoint_file if self.folder.has_checkpoint else "none yet"
                fix = "lower training.optimizer.lr or training.clip_norm, or train in fp32"
                if outcome.step == 0:  # before any update
                    fix = "evaluate student and teacher, whose weights may be damaged, or train in fp32"
                raise UserError(
                    f"loss term {', '.join(bad)} is not finite at step {outcome.step} (images "
                    f"{', '.join(ids)}); {fix}; last checkpoint: {saved}"
                )

    def _log(self, row: Row) -> None:
        if self.accelerator.is_main_process:
            self.folder.log(row)

    def _tell(self, event: str, *args: object) -> None:
        run = Run(self.recipe, self.folder.path, self.step, self.total_steps, self.display.note)
        self.callbacks.call(event, run, *args)

    def _evaluate(self) -> Evaluation:
        self._flush()
        exported = self._exported()
        if self.accelerator.num_processes > 1:
            # Each process has BatchNorm statistics of its own images: those of the first are exported.
            for buffer in exported.buffers():
                torch.distributed.broadcast(buffer, src=0)
        evaluation = self._evaluation(exported)
        self.evaluated = self.step
        numbers = evaluation.numbers()
        row: Row = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4), **numbers}
        self._log(row)
        main = numbers[evaluation.main] if math.isfinite(numbers[evaluation.main]) else 0.0
        self.evaluations_since_best += 1
        if main > self.best:
            self.best, self.evaluations_since_best = main, 0
            if self.accelerator.is_main_process:
                save_model(exported, self.folder.best_file)
        if self.accelerator.is_main_process:
            self.folder.write_csv()
        self._tell("on_evaluate", row, evaluation)
        self.log_started = time.perf_counter()
        return evaluation

    def _evaluation(self, model: Model) -> Evaluation:
        return evaluate_model(
            model,
            self.val_split,
            batch_size=max(1, self.config.batch_size // self.accelerator.num_processes),
            workers=self.config.workers,
            precision="bf16" if self.precision == "bf16" else "fp32",
            progress=self.request.raise_if_asked,
        )

    def _back_to_best(self) -> Evaluation:
        """Restore the best weights after early stopping, and measure them."""
        self.accelerator.wait_for_everyone()
        exported = self._exported()
        exported.exported.load_state_dict(load_file(self.folder.best_file))
        return self._evaluation(exported)

    def _finish(self, status: str, evaluation: Evaluation) -> TrainResult:
        if self.ema is not None:  # the caller's student object is to be what was measured
            self.trainable.student.load_state_dict(self.ema.module.state_dict())
        for warning in evaluation.warnings():
            self.display.note(warning)
        metrics = {**evaluation.numbers(), "minutes": self.seconds / 60, "steps": float(self.step)}
        if self.accelerator.is_main_process:
            save_model(self._exported(), self.folder.student_file)
            self.folder.write_result(status, metrics, evaluation.per_class, evaluation.main)
        self._tell("on_end", status, metrics, evaluation)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return TrainResult(status, metrics, self.folder.path, self.folder.student_file)

    def _exported(self) -> Model:
        """The student as it would be deployed now: averaged weights where there are any."""
        if self.ema is None:
            return self.trainable.student
        averaged = self.ema.module
        assert isinstance(averaged, Model)
        return averaged

    # --- resuming --------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._flush()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            self.folder.save_checkpoint({
                "step": self.step,
                "evaluated": self.evaluated,
                "processes": self.accelerator.num_processes,
                "pair": self.trainable.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "scaler": scaler.state_dict() if scaler else None,
                "best": self.best,
                "evaluations_since_best": self.evaluations_since_best,
                "seconds": self.seconds,
            })  # fmt: skip
        self.saved = self.step

    def _resume(self) -> None:
        state = self.folder.load_checkpoint()
        if state is None:
            if self.accelerator.is_main_process:
                self.folder.forget_after(0)
            return
        self.trainable.load_state_dict(state["pair"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.saved, self.evaluated = self.step, state.get("evaluated", self.step)
        self.best, self.evaluations_since_best = state["best"], state["evaluations_since_best"]
        if self.accelerator.is_main_process:
            again = self.evaluated < self.step or self.step == self.total_steps
            self.folder.forget_after(self.step, evaluation=again)
        self.accelerator.wait_for_everyone()
        self.display.note(f"resumed at step {self.step}")
        before, now = state.get("processes"), self.accelerator.num_processes
        if before not in (None, now):
            self.display.note(
                f"warning: resumed with {now} instead of {before} processes: each sees other images and random "
                "numbers, so the result is not exactly that of an uninterrupted run"
            )
