"""What came out of a comparison: arms by seeds, a verdict in words, and ``comparison.json`` to keep it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from detdistill import __version__
from detdistill.comparison.study import STUDY_FILE, Study
from detdistill.comparison.teachers import UsedTeacher, changed_teachers
from detdistill.data.text import read_file
from detdistill.errors import UserError
from detdistill.evaluation.paired import Paired, paired
from detdistill.text import markdown_table
from detdistill.training.run_folder import write_atomically

Runs = dict[str, dict[int, Path]]
"""Run folders by arm and seed."""

DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a file raises that another program, or half a disk, has written."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm's numbers.

    Attributes:
        name: of the arm.
        metrics: by seed, those of the finished runs.
        paired: its metric (in points) against the baseline's; None for the baseline itself.
        failed: seeds whose run ended without a result.
    """

    name: str
    metrics: dict[int, dict[str, float]]
    paired: Paired | None = None
    failed: tuple[int, ...] = ()

    def points(self, metric: str) -> dict[int, float]:
        """A metric by seed, times 100."""
        return {seed: 100 * of[metric] for seed, of in self.metrics.items() if metric in of}

    def mean(self, metric: str) -> float:
        values = [value for value in self.points(metric).values() if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came out of a study, as far as it has been run; ``teachers`` are those of its runs."""

    study: Study
    metric: str
    arms: list[Arm] = field(default_factory=list)
    teachers: tuple[UsedTeacher, ...] = ()

    @property
    def unfair(self) -> list[str]:
        """Why a difference between the arms need not be the method's; usually nothing."""
        unequal = self.study.unequal
        told = [f"the arms differ in {', '.join(unequal)}"] if unequal else []
        return told + changed_teachers(self.teachers)

    @property
    def command(self) -> str | None:
        """What makes the whole comparison again, in a folder beside it; None of one that has no study."""
        study = self.study
        if not (study.out / STUDY_FILE).is_file():
            return None
        words = ["detdistill", "compare", (study.out / STUDY_FILE).as_posix(), "--metric", self.metric]
        words += ["--allow-unequal"] if study.unequal else []
        return shlex.join([*words, "--out", f"{study.out.as_posix()}-again"])

    @property
    def verdict(self) -> str:
        """In words, a line for each arm: what the seeds can tell of it."""
        others = [arm for arm in self.arms if arm.paired is not None]
        if not others:
            return "nothing to compare yet: no seed has been run by the baseline and another arm"
        base = self.study.baseline
        lines = []
        for arm in others:
            assert arm.paired is not None
            said = arm.paired.verdict
            if said in ("better", "worse"):
                said = f"{said} than {base}"
            lines.append(
                f"{arm.name}: {said} ({arm.paired} {self.metric}, {_seeds(len(arm.paired.differences))})"
            )
        lines += [f"not a fair comparison: {why}" for why in self.unfair]
        if self.study.unequal_start:
            lines.append(self.study.unequal_start)
        return "\n".join(lines)

    def rows(self) -> list[tuple[str, ...]]:
        """(arm, each seed, mean, paired difference, wins, verdict), as printed."""
        rows = []
        for arm in self.arms:
            by_seed = arm.points(self.metric)
            cells = [
                f"{by_seed[s]:.1f}" if s in by_seed else "failed" if s in arm.failed else ""
                for s in self.study.seeds
            ]
            if arm.paired is None:
                gain = wins = verdict = ""
            else:
                gain, verdict = str(arm.paired), arm.paired.verdict
                won = sum(d > 0 for d in arm.paired.differences.values())
                wins = f"{won}/{len(arm.paired.differences)}"
            mean = arm.mean(self.metric)
            rows.append((arm.name, *cells, "" if math.isnan(mean) else f"{mean:.1f}", gain, wins, verdict))
        return rows

    def columns(self) -> tuple[str, ...]:
        seeds = (f"seed {seed}" for seed in self.study.seeds)
        return ("arm", *seeds, "mean", f"paired difference in {self.metric} (95%)", "wins", "verdict")

    def markdown(self) -> str:
        return markdown_table([self.columns(), *self.rows()])


def arms_of(
    numbers: Mapping[str, dict[int, dict[str, float]]],
    metric: str,
    failed: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> list[Arm]:
    """Arms with their difference to the first.

    Args:
        numbers: by arm and seed.
        metric: what they are compared by.
        failed: each arm's seeds that could not be trained.
    """
    base, *others = (Arm(name, metrics, None, failed.get(name, ())) for name, metrics in numbers.items())
    points = base.points(metric)
    return [base, *(replace(arm, paired=paired(arm.points(metric), points)) for arm in others)]


def write_comparison(comparison: Comparison) -> None:
    """``comparison.json`` beside the runs."""
    study = comparison.study
    content = {
        "version": __version__,
        "command": comparison.command,
        "recipe": str(study.recipe),
        "teachers": [teacher.as_dict() for teacher in comparison.teachers],
        "seeds": list(study.seeds),
        "baseline": study.baseline,
        "metric": comparison.metric,
        "unequal": list(study.unequal),
        "inheriting": list(study.inheriting),
        "arms": [
            {
                "name": arm.name,
                "overrides": list(study.arms[arm.name]),
                "runs": {
                    str(s): str(study.run_folder(arm.name, s).relative_to(study.out)) for s in arm.metrics
                },
                "metrics": {str(s): _finite(m) for s, m in arm.metrics.items()},
                "failed": list(arm.failed),
                "paired": None
                if arm.paired is None
                else {
                    "differences": {str(s): d for s, d in arm.paired.differences.items()},
                    "mean": arm.paired.mean,
                    "interval": arm.paired.interval,
                    "verdict": arm.paired.verdict,
                },
            }
            for arm in comparison.arms
        ],
        "verdict": comparison.verdict,
    }
    write_atomically(study.out / "comparison.json", json.dumps(content, indent=1))


def load_comparison(folder: Path) -> tuple[Comparison, Runs]:
    """A comparison as it was written, the baseline first, and the folders of its runs.

    Raises:
        UserError: ``comparison.json`` is damaged.
    """
    file = folder / "comparison.json"
    try:
        content = json.loads(read_file(file))
        metric, baseline = str(content["metric"]), content["baseline"]
        told = {str(arm["name"]): arm for arm in content["arms"]}
        told = {baseline: told[baseline], **told}  # the baseline first
        numbers = {name: _by_seed(arm["metrics"]) for name, arm in told.items()}
        runs = {
            name: {int(seed): folder / run for seed, run in arm["runs"].items()} for name, arm in told.items()
        }
        study = Study(
            Path(content["recipe"]),
            {name: tuple(map(str, arm["overrides"])) for name, arm in told.items()},
            tuple(int(seed) for seed in content["seeds"]),
            folder,
            tuple(map(str, content["unequal"])),
            tuple(map(str, content.get("inheriting", ()))),  # of comparisons before there was inheriting
        )
        failed = {name: tuple(int(seed) for seed in arm["failed"]) for name, arm in told.items()}
        arms = arms_of(numbers, metric, failed)
        teachers = tuple(map(UsedTeacher.of_dict, content.get("teachers", ())))
    except DAMAGED as error:
        raise UserError(
            f"{file}: damaged ({error!r}); `detdistill compare` with --table writes it anew"
        ) from error
    return Comparison(study, metric, arms, teachers), runs


def _by_seed(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[int, dict[str, float]]:
    return {
        int(seed): {name: math.nan if value is None else float(value) for name, value in numbers.items()}
        for seed, numbers in metrics.items()
    }


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in metrics.items()}


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"
