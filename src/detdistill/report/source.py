"""What a report is about: a comparison or a run, read from folders that may be unfinished or damaged."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detdistill.comparison.compare import unequal_budgets
from detdistill.comparison.result import Arm, Comparison, Runs, arms_of, load_comparison
from detdistill.comparison.study import BASELINE, Study
from detdistill.comparison.teachers import teachers_of
from detdistill.data.text import read_file
from detdistill.errors import UserError
from detdistill.recipe import Recipe
from detdistill.training.run_folder import Row, RunFolder
from detdistill.visualization.plots import COLORS

DISTILLED = "distilled"
TEACHER_COLOR = 2  # after the baseline's 0 and the best arm's 1


@dataclass(frozen=True, slots=True)
class Subject:
    """What is reported.

    Attributes:
        comparison: the arms' numbers; of a single run, one arm.
        runs: the folders of the runs.
        teacher: the teacher's run, if it has been found.
        notes: what is missing.
    """

    comparison: Comparison
    runs: Runs
    teacher: Path | None
    notes: tuple[str, ...]

    @property
    def best(self) -> Arm | None:
        """The arm that is told first: of those that are better, else of all, the one with the highest mean."""
        others = [arm for arm in self.comparison.arms if arm.paired is not None]
        return max(others, key=_merit, default=None)

    @property
    def shown(self) -> dict[str, Path]:
        """``baseline`` and ``distilled`` of the first seed that both have, or ``run``."""
        base, best = self.comparison.arms[0], self.best
        if best is not None and best.paired is not None:
            for seed in best.paired.differences:
                if seed in self.runs[base.name] and seed in self.runs[best.name]:
                    return {BASELINE: self.runs[base.name][seed], DISTILLED: self.runs[best.name][seed]}
        found = [run for arm in self.runs.values() for run in arm.values()]
        return {"run": found[0]} if found else {}

    @property
    def colors(self) -> dict[str, tuple[int, bool]]:
        """By arm: its color, the same all over the page, and whether it is dashed (no color was left)."""
        best = self.best
        others = [arm.name for arm in self.comparison.arms[1:] if arm is not best]
        taken = {self.comparison.arms[0].name: 0} | ({best.name: 1} if best is not None else {})
        taken |= {name: i for i, name in enumerate(others, start=TEACHER_COLOR + 1)}
        return {name: (i % len(COLORS), i >= len(COLORS)) for name, i in taken.items()}


def _merit(arm: Arm) -> tuple[bool, float]:
    assert arm.paired is not None
    return arm.paired.verdict == "better", arm.paired.mean


def read_subject(folder: Path, baseline: Path | None = None, teacher: Path | None = None) -> Subject:
    """Read a comparison's folder, or a run's, perhaps with the run of the baseline.

    Raises:
        UserError: it is neither, ``comparison.json`` is damaged, or a run that was named is none.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise UserError(f"{folder}: {kind}; give the folder that `compare`, `demo` or `train` wrote")
    for given in (baseline, teacher):
        if given is not None and not is_run(given):
            raise UserError(
                f"{given}: no run folder (it has no recipe.yaml); give the folder that `train` wrote"
            )
    if (folder / "comparison.json").is_file():
        if baseline is not None:
            raise UserError(f"{folder} is a comparison, which has its baseline: leave --baseline out")
        comparison, runs = load_comparison(folder)
    elif is_run(folder):
        comparison, runs = _of_runs(folder, baseline)
    else:
        raise UserError(
            f"{folder}: neither a comparison (comparison.json) nor a run (recipe.yaml); give the folder that "
            "`compare`, `demo` or `train` wrote"
        )
    notes = _missing(comparison, runs)
    if teacher is None:
        teacher, why = _find_teacher(runs)
        notes += [why] if why else []
    return Subject(comparison, runs, teacher, tuple(notes))


def is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file()


def result_of(run: Path) -> dict[str, Any] | None:
    """``result.json`` of a run; None where it is absent or damaged."""
    try:
        return RunFolder(run).result()
    except (UserError, OSError):
        return None


def rows_of(run: Path) -> list[Row]:
    """The rows of ``metrics.jsonl`` that can be read."""
    rows: list[Row] = []
    try:
        lines = read_file(RunFolder(run).metrics_file).decode("utf-8", errors="replace").splitlines()
    except UserError:
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            rows.append({key: value for key, value in row.items() if isinstance(value, int | float)})
    return rows


def recipe_of(run: Path) -> Recipe | None:
    """A run's recipe; None where it is not one of this version's."""
    try:
        return RunFolder(run).recipe()
    except (UserError, OSError, ValueError):
        return None


def json_of(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none to be read."""
    try:
        content = json.loads(read_file(file))
    except (UserError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _of_runs(run: Path, baseline: Path | None) -> tuple[Comparison, Runs]:
    """A run by itself, or a comparison of one seed."""
    folders = {run.resolve().name: run} if baseline is None else {BASELINE: baseline, DISTILLED: run}
    recipes = {name: recipe for name, path in folders.items() if (recipe := recipe_of(path)) is not None}
    seed = next((recipe.training.seed for recipe in recipes.values()), 0)
    numbers: dict[str, dict[int, dict[str, float]]] = {}
    main = "AP"
    for name, path in folders.items():
        result = result_of(path)
        numbers[name] = {} if result is None else {seed: result["metrics"]}
        main = main if result is None else result["main"]
    unequal = unequal_budgets(recipes) if len(recipes) == 2 else []
    if len(recipes) == 2 and recipes[BASELINE].training.seed != recipes[DISTILLED].training.seed:
        unequal.append("training.seed")
    study = Study(run / "recipe.yaml", dict.fromkeys(folders, ()), (seed,), run, tuple(unequal))
    runs = {name: {seed: path} for name, path in folders.items()}
    teachers = teachers_of({name: [path] for name, path in folders.items()})
    return Comparison(study, main, arms_of(numbers, main), teachers), runs


def _missing(comparison: Comparison, runs: Runs) -> list[str]:
    notes = []
    metric, seeds = comparison.metric, comparison.study.seeds
    for arm in comparison.arms:
        absent = [seed for seed in seeds if seed not in arm.metrics and seed not in arm.failed]
        if arm.failed:
            notes.append(f"{arm.name}: {_listed(arm.failed)} failed; log.txt in its folder says why")
        if absent:
            notes.append(f"{arm.name}: {_listed(absent)} not finished, so without a result")
        unmeasured = [
            seed for seed, numbers in arm.metrics.items() if math.isnan(numbers.get(metric, math.nan))
        ]
        if unmeasured:
            notes.append(f"{arm.name}: {_listed(unmeasured)} without {metric} in the result")
        for seed, run in runs[arm.name].items():
            if not is_run(run):
                notes.append(f"{arm.name}, seed {seed}: no run in {run}, so without curves and classes")
                continue
            if not rows_of(run):
                notes.append(f"{arm.name}, seed {seed}: no metrics.jsonl to read, so without curves")
            if seed in arm.metrics and result_of(run) is None:
                notes.append(f"{arm.name}, seed {seed}: no result.json to read, so not in the means by class")
    return notes


def _find_teacher(runs: Runs) -> tuple[Path | None, str]:
    """The run that the recipes name as teacher, or why there is none."""
    named = ""
    for arm in runs.values():
        for run in arm.values():
            recipe = recipe_of(run)
            weights = recipe.teacher.weights if recipe is not None and recipe.teacher is not None else None
            if weights is None:
                continue
            named = str(weights)
            for folder in (Path(named), Path(named).parent):
                if is_run(folder) and result_of(folder) is not None:
                    return folder, ""
    if not named:
        return None, ""
    return None, f"the teacher ({named}) is no finished run to be found from here, so without its numbers"


def _listed(seeds: list[int] | tuple[int, ...]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
