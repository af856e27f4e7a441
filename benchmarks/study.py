"""Paired study: methods on one recipe over seeds, each against the first arm, difference by difference.

    python benchmarks/study.py benchmarks/studies/ima_digits.yaml --jobs 2

A study file names a recipe, a teacher, seeds and arms. An arm is an entry of a recipe's ``methods``, or null
for the student alone; it may instead be a list of overrides (``key.sub=value``). Two runs of one seed share
initialisation, data order and augmentation, so their difference is what the arm did. Runs go to
``runs/studies/STUDY/ARM/SEED`` and are resumed or reused; ``--table`` prints what is there without training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--arms", nargs="*", help="only these")
    parser.add_argument("--seeds", type=int, nargs="*", help="instead of the study's")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    study = yaml.safe_load(args.study.read_text())
    arms = {name: overrides(study["arms"][name], study["teacher"]) for name in args.arms or study["arms"]}
    seeds = args.seeds or study["seeds"]
    out = Path("runs/studies") / args.study.stem
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [
                pool.submit(train, study["recipe"], changes, seed, out / name / str(seed))
                for seed in seeds
                for name, changes in arms.items()
            ]
        for run in runs:
            run.result()  # raises what went wrong
    print(table(out, list(study["arms"]), study["seeds"]))


def overrides(arm: str | dict | list[str] | None, teacher: str) -> list[str]:
    if arm is None or isinstance(arm, list):
        return arm or []
    return [f"teacher={teacher}", f"methods={json.dumps([arm])}"]


def train(recipe: str, changes: list[str], seed: int, run: Path) -> None:
    if (run / "result.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "detdistill",
        "train",
        recipe,
        *changes,
        f"training.seed={seed}",
        "--out",
        str(run),
    ]
    with (run / "log.txt").open("a") as log:
        code = subprocess.run(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ).returncode
    print(f"{run}: {'done' if code == 0 else f'exit {code}, see log.txt'}", flush=True)


def table(out: Path, arms: list[str], seeds: list[int]) -> str:
    """Markdown: AP of every seed, mean paired difference to the first arm, its standard error, wins."""
    ap = {
        arm: {seed: result["AP"] * 100 for seed in seeds if (result := metrics(out / arm / str(seed)))}
        for arm in arms
    }
    lines = [
        "| arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | paired difference | wins |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    for arm in arms:
        if not ap[arm]:
            continue
        cells = [f"{ap[arm][seed]:.1f}" if seed in ap[arm] else "" for seed in seeds]
        differences = [ap[arm][seed] - ap[arms[0]][seed] for seed in ap[arm] if seed in ap[arms[0]]]
        spread = (
            statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        )
        gain = (
            "" if arm == arms[0] or not differences else f"{statistics.mean(differences):+.2f} ± {spread:.2f}"
        )
        wins = "" if arm == arms[0] else f"{sum(d > 0 for d in differences)}/{len(differences)}"
        lines.append(
            f"| {arm} | {' | '.join(cells)} | {statistics.mean(ap[arm].values()):.1f} | {gain} | {wins} |"
        )
    return "\n".join(lines)


def metrics(run: Path) -> dict[str, float] | None:
    file = run / "result.json"
    return json.loads(file.read_text())["metrics"] if file.exists() else None


if __name__ == "__main__":
    main()
