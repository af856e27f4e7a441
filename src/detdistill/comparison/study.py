"""What to compare: arms of one recipe, over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detdistill.errors import UserError
from detdistill.recipe import load_recipe
from detdistill.recipe.reading import read_yaml
from detdistill.text import require_folder_name

BASELINE = "baseline"
MOST_SEEDS = 1000
STUDY_FILE = "study.yaml"
"""In a comparison's folder: what was compared, as a study that can be read again."""

# Table 5 of the paper: plain imitation, then one part of IMA after another. Raw maps have the teacher's own
# scale, on which α = 1 is what `mimic` has; standardized ones have the paper's 10.
_RAW = {
    "importance": {"kind": "none"}, "alpha": 1.0, "standardize": {"student": False, "teacher": False},
}  # fmt: skip
ABLATION: Mapping[str, Any] = {
    "KD": {"ima": {**_RAW, "mask": {"ratio": 0.0}}},
    "+ mask": {"ima": {**_RAW, "mask": {"ratio": 0.5, "keep_dc": True}}},
    "+ standardization": {"ima": {"preset": "paper", "importance": {"kind": "none"}}},
    "+ scale deflation": {"ima": {"preset": "paper"}},
}


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared.

    Attributes:
        recipe: the file that every arm starts from.
        arms: by name, the overrides that make it; the first is the baseline.
        seeds: of the runs.
        out: folder of the runs and the tables.
        unequal: settings of the budget that differ between the arms, where that was allowed.
        inheriting: the arms that start from their teacher's neck and head, where not all arms start alike.
    """

    recipe: Path
    arms: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    out: Path
    unequal: tuple[str, ...] = ()
    inheriting: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse arms whose runs would lie outside ``out`` or in one folder.

        Raises:
            UserError: the name of such an arm.
        """
        taken: dict[str, str] = {}
        for arm in self.arms:
            try:
                folder = require_folder_name(_folder_name(arm), "arm")
            except ValueError as error:
                raise UserError(str(error)) from None
            other = taken.setdefault(folder.casefold(), arm)
            if other != arm:
                raise UserError(f"the arms {other!r} and {arm!r} would share a folder: rename one")

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    @property
    def unequal_start(self) -> str:
        """What to say of the initialization where it is not the same for all arms; else nothing."""
        if not self.inheriting:
            return ""
        return f"not the same start: {', '.join(self.inheriting)} began with the teacher's neck and head"

    def run_folder(self, arm: str, seed: int) -> Path:
        return self.out / _folder_name(arm) / str(seed)


def _folder_name(arm: str) -> str:
    return arm.replace("/", "÷").replace("\\", "÷")


def plan_methods(
    recipe: Path, methods: Sequence[str], overrides: Sequence[str], seeds: Sequence[int], out: Path
) -> Study:
    """One arm for each method; ``none`` is the baseline, and comes first.

    Raises:
        UserError: a method twice, or no method.
    """
    names = [BASELINE if name in ("none", "alone", BASELINE) else name for name in methods]
    if len(set(names)) < len(names) or set(names) <= {BASELINE}:
        raise UserError(f"--methods {' '.join(methods)}: name at least one method, and each once")
    names.sort(key=lambda name: name != BASELINE)
    arms = {name: (*overrides, *_arm_overrides(None if name == BASELINE else name)) for name in names}
    return Study(recipe, arms, tuple(seeds), out)


def plan_sweep(
    recipe: Path, key: str, values: Sequence[str], overrides: Sequence[str], seeds: Sequence[int], out: Path
) -> Study:
    """The baseline, and one arm for each value of a setting (Table 8 sweeps ``distill.weight``).

    ``distill.KEY`` is a setting of the recipe's only method. A setting of the training gives no common
    baseline: the first value is it.

    Raises:
        UserError: no values, or ``distill`` where there is not exactly one method.
    """
    if not values or len(set(values)) < len(values):
        raise UserError(f"{key}: give several values, each once, as {key}=0.1,1,10")
    base = load_recipe(recipe, overrides)
    arms: dict[str, tuple[str, ...]] = {}
    if key.startswith("distill."):
        if len(base.methods) != 1:
            raise UserError(f"{key}: the recipe has {len(base.methods)} methods; say methods.NAME.KEY=…")
        setting, name = key.removeprefix("distill."), base.methods[0].name
        own = setting in type(base.methods[0]).model_fields
        key = f"methods.{name}.{setting}" if own else f"methods.{name}.options.{setting}"
    if key.startswith("methods."):
        arms[BASELINE] = (*overrides, *_arm_overrides(None))
    short = key.rpartition(".")[2]
    arms |= {f"{short} {value}": (*overrides, f"{key}={value}") for value in values}
    return Study(recipe, arms, tuple(seeds), out)


def plan_ablation(recipe: Path, overrides: Sequence[str], seeds: Sequence[int], out: Path) -> Study:
    """Table 5: the baseline, imitation, and IMA's parts one after another."""
    arms = {BASELINE: _arm_overrides(None), **{name: _arm_overrides(arm) for name, arm in ABLATION.items()}}
    return Study(recipe, {name: (*overrides, *changes) for name, changes in arms.items()}, tuple(seeds), out)


def read_study(path: Path, overrides: Sequence[str] = (), out: Path | None = None) -> Study:
    """A study file: ``recipe``, ``arms``, ``seeds`` (a list, or how many); ``teacher`` overrides the recipe's.

    An arm is an entry of ``methods``, null for the baseline, or a list of overrides. Paths are relative to
    the working folder. Its runs are in ``runs/studies/STEM`` by default; a ``study.yaml`` that a comparison
    has written goes on in its own folder.

    Raises:
        UserError: the file cannot be read, or says something else.
    """
    tree = read_yaml(path)
    known = {"recipe", "teacher", "seeds", "arms"}
    if not isinstance(tree, dict) or not {"recipe", "arms"} <= tree.keys() <= known:
        raise UserError(f"{path}: a study has the keys recipe, arms and perhaps teacher, seeds")
    if not isinstance(tree["recipe"], str) or not tree["recipe"]:
        raise UserError(f"{path}: recipe is the path of a recipe file; got {tree['recipe']!r:.60}")
    if not isinstance(tree["arms"], dict) or not tree["arms"]:
        raise UserError(f"{path}: arms are written NAME: METHOD, one to a line")
    seeds = tree.get("seeds", 3)
    if isinstance(seeds, int) and not isinstance(seeds, bool) and 0 < seeds <= MOST_SEEDS:
        seeds = list(range(seeds))
    is_list = isinstance(seeds, list) and 0 < len(seeds) <= MOST_SEEDS
    if not is_list or not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
        raise UserError(
            f"{path}: seeds are a list as [0, 1, 2], or how many, at most {MOST_SEEDS}; got {str(seeds)[:60]}"
        )
    teacher = [f"teacher={tree['teacher']}"] if tree.get("teacher") else []
    arms = {
        str(name): (*overrides, *(teacher if arm is not None else []), *_arm_overrides(arm))
        for name, arm in tree["arms"].items()
    }
    folder = path.parent if path.name == STUDY_FILE else Path("runs/studies") / path.stem
    return Study(Path(tree["recipe"]), arms, tuple(seeds), out or folder)


def study_text(study: Study) -> str:
    """A study as the file that :func:`read_study` reads."""
    tree = {
        "recipe": study.recipe.as_posix(),
        "seeds": list(study.seeds),
        "arms": {name: list(overrides) for name, overrides in study.arms.items()},
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)


def is_study(path: Path) -> bool:
    """Whether a file is a study and no recipe."""
    try:
        tree = read_yaml(path)
    except UserError:
        return False
    return isinstance(tree, dict) and "arms" in tree


def _arm_overrides(arm: Any) -> tuple[str, ...]:
    if arm is None:
        return ("teacher=null", "methods=[]", "inherit=false")
    if isinstance(arm, list):
        return tuple(str(item) for item in arm)
    return (f"methods={json.dumps([arm])}",)
