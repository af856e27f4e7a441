"""Did the scores of rank-teachers foretell which teacher would help? Their correlation with the distilled AP.

    detdistill rank-teachers recipes/deeppcb/baseline.yaml --teachers A B C --student ALONE --json ranking.json
    detdistill compare benchmarks/studies/teachers_deeppcb.yaml
    python benchmarks/teacher_scores.py ranking.json runs/studies/teachers_deeppcb/comparison.json

Arms and scores meet by the teacher's path. The distilled AP is the mean over the seeds that all arms have.
Correlations over a handful of teachers prove nothing: with three, one order in six is the right one by chance.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranking", type=Path, help="written by rank-teachers --json")
    parser.add_argument("comparison", type=Path, help="comparison.json of the study")
    args = parser.parse_args()
    scores = {score["teacher"]: score for score in json.loads(args.ranking.read_text())["scores"]}
    distilled = distilled_ap(json.loads(args.comparison.read_text()))
    teachers = sorted(scores.keys() & distilled.keys(), key=lambda teacher: -distilled[teacher])
    if len(teachers) < 3:
        raise SystemExit("fewer than three teachers have both a score and finished runs of the same seeds")
    columns = {name: [column(scores[teacher]) for teacher in teachers] for name, column in SCORES.items()}
    columns = {name: values for name, values in columns.items() if all(map(math.isfinite, values))}
    truth = [distilled[teacher] for teacher in teachers]

    print("| teacher | distilled AP | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for i, teacher in enumerate(teachers):
        cells = (f"{values[i]:.3g}" for values in columns.values())
        print(f"| {teacher} | {truth[i]:.1f} | {' | '.join(cells)} |")
    for what, measure in (("Pearson's r", pearson), ("Spearman's ρ", spearman)):
        cells = (f"{measure(values, truth):+.2f}" for values in columns.values())
        print(f"| {what} with the distilled AP | | {' | '.join(cells)} |")


def cka(name: str, score: dict) -> float:
    by_level = score[name] or {}
    return statistics.mean(by_level.values()) if by_level and None not in by_level.values() else math.nan


SCORES = {
    "teacher's AP": lambda score: math.nan if score["quality"] is None else 100 * score["quality"],
    "CKA at the start": lambda score: cka("cka_start", score),
    "CKA, trained": lambda score: cka("cka_trained", score),
    "step": lambda score: score["step_cost"],
    "parameters, ×": lambda score: score["parameter_ratio"],
}


def distilled_ap(comparison: dict) -> dict[str, float]:
    """Mean AP × 100 by the teacher's path."""
    arms = {
        override.removeprefix("teacher="): arm["metrics"]
        for arm in comparison["arms"]
        for override in arm["overrides"]
        if override.startswith("teacher=") and override != "teacher=null" and arm["metrics"]
    }
    seeds = set.intersection(*(set(metrics) for metrics in arms.values())) if arms else set()
    return {
        teacher: 100 * statistics.mean(metrics[seed]["AP"] for seed in seeds)
        for teacher, metrics in arms.items()
        if seeds
    }


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """NaN where one of the two is the same for all."""
    return statistics.correlation(x, y) if len(set(x)) > 1 < len(set(y)) else math.nan


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    return pearson(ranks(x), ranks(y))


def ranks(values: Sequence[float]) -> list[float]:
    """Equal values share their mean rank."""
    return [sum(v < value for v in values) + sum(v == value for v in values) / 2 for value in values]


if __name__ == "__main__":
    main()
