"""Which teachers the runs of a comparison had, so that a reader can find them, and see where they differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detdistill.errors import UserError
from detdistill.models.checkpoints.weights import file_hash, find_weights
from detdistill.training.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class UsedTeacher:
    """A teacher of some of a comparison's runs.

    Attributes:
        weights: as the runs' recipes name them: a run, a file, ``torchvision``.
        sha256: of their file, as it was when the runs started; None where it is not one file.
        arms: whose runs had it.
        run: the finished run that they are from, if it is still to be found and they are still its weights.
        metrics: the numbers of that run.
    """

    weights: str
    sha256: str | None
    arms: tuple[str, ...]
    run: Path | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        numbers = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        run = None if self.run is None else self.run.as_posix()
        return {
            "weights": self.weights,
            "sha256": self.sha256,
            "arms": list(self.arms),
            "run": run,
            "metrics": numbers,
        }

    @classmethod
    def of_dict(cls, told: Mapping[str, Any]) -> UsedTeacher:
        numbers = {name: math.nan if value is None else float(value) for name, value in told["metrics"].items()}
        run = None if told["run"] is None else Path(told["run"])
        return cls(str(told["weights"]), told["sha256"], tuple(map(str, told["arms"])), run, numbers)


def teachers_of(runs: Mapping[str, Iterable[Path]]) -> tuple[UsedTeacher, ...]:
    """The teachers of runs, by arm, as their folders tell it; runs that cannot be read are passed over."""
    arms: dict[tuple[str, str | None], dict[str, None]] = {}
    for arm, folders in runs.items():
        for folder in map(RunFolder, folders):
            try:
                teacher = folder.recipe().teacher
                known = (
                    folder.teacher_file.read_text(encoding="utf-8") if folder.teacher_file.is_file() else None
                )
            except (UserError, OSError, ValueError):
                continue
            if teacher is not None and teacher.weights is not None:
                arms.setdefault((str(teacher.weights), known), {})[arm] = None
    return tuple(_described(weights, known, tuple(of)) for (weights, known), of in arms.items())


def changed_teachers(teachers: Iterable[UsedTeacher]) -> list[str]:
    """A line for each file that was not the same one for all of the runs that name it."""
    contents: dict[str, list[UsedTeacher]] = {}
    for teacher in teachers:
        if teacher.sha256 is not None:
            contents.setdefault(teacher.weights, []).append(teacher)
    return [
        f"the teacher {weights} changed between the runs: "
        + "; ".join(f"{', '.join(of.arms)} had {str(of.sha256)[:8]}" for of in found)
        for weights, found in contents.items()
        if len(found) > 1
    ]


def _described(weights: str, known: str | None, arms: tuple[str, ...]) -> UsedTeacher:
    for folder in (Path(weights), Path(weights).parent):
        try:
            if not (folder / "recipe.yaml").is_file() or file_hash(find_weights(weights)) != known:
                continue
            result = RunFolder(folder).result()
            if result is not None:
                return UsedTeacher(weights, known, arms, folder, result["metrics"])
        except (UserError, OSError):
            continue
    return UsedTeacher(weights, known, arms)
