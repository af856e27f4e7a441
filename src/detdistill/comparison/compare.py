"""``compare``, ``sweep``, ``ablate``: arms of one recipe over seeds, under one budget, seed by seed.

Every arm is the recipe with a few settings changed; every seed gives all arms the same initialization,
order of data and augmentation. Each run is a process of its own (``detdistill train``) in ``OUT/ARM/SEED``: an
interrupted comparison goes on where it stopped, and runs may be spread over devices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from detdistill.comparison.launcher import launch, train_missing
from detdistill.comparison.result import Comparison, arms_of, write_comparison
from detdistill.comparison.study import (
    BASELINE,
    STUDY_FILE,
    Study,
    is_study,
    plan_methods,
    read_study,
    study_text,
)
from detdistill.comparison.teachers import teachers_of
from detdistill.errors import UserError, nearest
from detdistill.models.checkpoints.weights import STUDENT_FILE
from detdistill.output import output_path
from detdistill.recipe import Recipe, load_recipe, names_of
from detdistill.training.run_folder import RunFolder, differences, write_atomically


def compare(
    recipe: Path | str,
    methods: Sequence[str] = (),
    *,
    seeds: int = 3,
    overrides: Sequence[str] = (),
    teacher: Path | str | None = None,
    out: Path | str | None = None,
    jobs: int = 1,
    devices: Sequence[str] = (),
    metric: str | None = None,
    allow_unequal: bool = False,
    train: bool = True,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Train arms that differ in the method alone, over seeds, under one budget.

    Args:
        recipe: the file of a recipe with a teacher, or of a study, which names its own arms, seeds and teacher.
        methods: an arm each; ``none`` is the baseline; default: that and ``ima``.
        seeds: how many.
        overrides: of the recipe, as ``training.epochs=12``, for all arms.
        teacher: instead of the recipe's: a run, a weights file, or a recipe to train first, once.
        out: folder of the runs, default: ``runs/compare/RECIPE``; unfinished runs there are resumed.
        jobs, devices, metric, allow_unequal, train, say: as :func:`run_study` has them.

    Raises:
        UserError: as :func:`run_study`; or methods or a teacher for a study.
    """
    recipe, folder = Path(recipe), None if out is None else output_path(out)
    methods, overrides = names_of(methods, "methods"), names_of(overrides, "overrides")
    devices = names_of(devices, "devices")
    if is_study(recipe):
        if methods or teacher is not None:
            raise UserError(f"{recipe} is a study and names its own arms and teacher: leave them out")
        study = read_study(recipe, overrides, folder)
    else:
        folder = folder or Path("runs/compare") / recipe.stem
        if teacher is not None:
            overrides = [*overrides, f"teacher={teacher_weights(Path(teacher), folder, train=train)}"]
        study = plan_methods(recipe, methods or (BASELINE, "ima"), overrides, range(seeds), folder)
    return run_study(
        study, jobs=jobs, devices=devices, metric=metric, allow_unequal=allow_unequal, train=train, say=say
    )


def run_study(
    study: Study,
    *,
    jobs: int = 1,
    devices: Sequence[str] = (),
    metric: str | None = None,
    allow_unequal: bool = False,
    train: bool = True,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Run what is missing of a study, and compare.

    Args:
        study: from one of the ``plan_`` functions or :func:`read_study`.
        jobs: runs at a time; with devices, as many as there are devices.
        devices: as ``cuda:0``, or ``cuda:0,1`` for runs on two GPUs each; each takes one run at a time.
            None: the recipe's own.
        metric: of the runs' results, by which the arms are compared; default: the runs' main one.
        allow_unequal: let the arms' budgets differ; the table then says so.
        train: False compares what is there.
        say: takes a line for each run that ends.

    Raises:
        UserError: an arm cannot be read, the budgets differ, or the folder holds runs with other settings;
            nothing has been run then.
        SystemExit: with code 75 when it was stopped by SIGTERM; every run has saved.
    """
    recipes = {name: load_recipe(study.recipe, overrides) for name, overrides in study.arms.items()}
    unequal = unequal_budgets(recipes)
    if unequal and not allow_unequal:
        raise UserError(
            f"the arms' budgets differ in {', '.join(unequal)}: a gain would mean nothing; give all arms the "
            "same, or --allow-unequal"
        )
    study = replace(study, unequal=tuple(unequal), inheriting=tuple(inheriting_arms(recipes)))
    for device in devices:
        launch(device)
    strange = strange_runs(study, recipes)
    if strange:
        message = f"{study.out} holds runs with other settings than the arms have now: {'; '.join(strange[:3])}"
        if train:
            raise UserError(f"{message}; choose another --out, or delete them")
        warnings.warn(message, stacklevel=2)
    failed: set[tuple[str, int]] = set()
    if train:
        study.out.mkdir(parents=True, exist_ok=True)
        write_atomically(study.out / STUDY_FILE, study_text(study))
        failed = train_missing(study, recipes, jobs, devices, say)
    comparison = read_comparison(study, metric, failed)
    if any(arm.metrics for arm in comparison.arms):
        _write(comparison)
    return comparison


def unequal_budgets(recipes: Mapping[str, Recipe]) -> list[str]:
    """Settings of data, student and training in which recipes differ."""
    first, *others = recipes.values()
    found = {
        key
        for other in others
        for key in differences(first, other, free=("seed", "workers", "device", "checkpoint_every"))
        if key.partition(".")[0] in ("data", "student", "training")
    }
    return sorted(found)


def inheriting_arms(recipes: Mapping[str, Recipe]) -> list[str]:
    """Arms that start from their teacher's neck and head; none where all start from the same one's."""
    starts = [recipe.teacher if recipe.inherit else None for recipe in recipes.values()]
    if all(start == starts[0] for start in starts):
        return []
    return [name for name, recipe in recipes.items() if recipe.inherit]


def strange_runs(study: Study, recipes: Mapping[str, Recipe]) -> list[str]:
    """Ended runs in a study's folder with other settings than their arm has now, and what differs, a line each.

    Those that have not ended are refused by :meth:`RunFolder.open` when they go on.
    """
    strange = []
    for arm, recipe in recipes.items():
        for seed in study.seeds:
            folder = RunFolder(study.run_folder(arm, seed))
            if folder.result_file.is_file() and folder.recipe_file.is_file():
                try:
                    found = [key for key in folder.differences(recipe) if key != "training.seed"]
                except UserError as error:  # of another version, or damaged
                    found = [str(error)]
                if found:
                    strange.append(f"{arm}/{seed} ({', '.join(found[:5])})")
    return strange


def read_comparison(
    study: Study, metric: str | None = None, failed: Iterable[tuple[str, int]] = ()
) -> Comparison:
    """The numbers of the runs that are finished; by their main one (AP, mIoU) unless a metric is given.

    Raises:
        UserError: finished runs have no such metric.
    """
    failed = set(failed)
    found: dict[str, dict[int, dict[str, float]]] = {}
    main = "AP"
    for name in study.arms:
        results = {seed: RunFolder(study.run_folder(name, seed)).result() for seed in study.seeds}
        found[name] = {seed: result["metrics"] for seed, result in results.items() if result is not None}
        main = next((result["main"] for result in results.values() if result is not None), main)
    metric = metric or main
    known = {key for runs in found.values() for metrics in runs.values() for key in metrics}
    if known and metric not in known:
        raise UserError(f"the runs have no metric {metric!r}; {nearest(metric, known)}")
    lost = {name: tuple(seed for seed in study.seeds if (name, seed) in failed) for name in found}
    runs = {arm: [study.run_folder(arm, seed) for seed in seeds] for arm, seeds in found.items()}
    return Comparison(study, metric, arms_of(found, metric, lost), teachers_of(runs))


def _write(comparison: Comparison) -> None:
    """``table.md`` and ``comparison.json`` beside the runs."""
    table = f"{comparison.markdown()}\n\n{comparison.verdict}\n"
    write_atomically(comparison.study.out / "table.md", table)
    write_comparison(comparison)


def teacher_weights(teacher: Path, out: Path, *, train: bool = True) -> Path:
    """A teacher for every arm: a run or file as it is; a recipe's is in OUT/teacher, trained first, once."""
    if teacher.suffix not in (".yaml", ".yml"):
        return teacher
    if train:
        from detdistill.training.train import train as train_recipe

        train_recipe(teacher, out=out / "teacher")
    return out / "teacher" / STUDENT_FILE
