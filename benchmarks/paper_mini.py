"""The paper's tables in miniature: small pairs on small sets instead of R101 to R50 on COCO.

    python benchmarks/paper_mini.py                  # run what is missing, write docs/paper-mini.md; hours
    python benchmarks/paper_mini.py --only 1 5 --jobs 2
    python benchmarks/paper_mini.py --table          # run nothing, write the page from what is there

Each table is a study of `benchmarks/studies/`. Interrupted, the same command goes on. What has not been run is
named on the page.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from detdistill.commands.benchmark import benchmark
from detdistill.comparison.compare import run_study
from detdistill.comparison.result import Comparison
from detdistill.comparison.study import read_study
from detdistill.recipe import load_recipe
from detdistill.training.run_folder import RunFolder
from detdistill.training.train import train

PAGE = Path("docs/paper-mini.md")
STUDIES = Path("benchmarks/studies")


@dataclass(frozen=True)
class Table:
    """One table of the paper.

    Attributes:
        title: what it shows there, and on what here.
        study: the file's stem.
        teachers: recipes that make its teachers, as FOLDER/NAME; they are trained to runs/FOLDER/NAME.
        metric: by which arms are compared.
        read: what its numbers say, or where that is said.
    """

    title: str
    study: str
    teachers: tuple[str, ...]
    metric: str = "AP"
    read: str = ""


TABLES = {
    "1": Table(
        "one kind of detector, method by method: FCOS to FCOS on DeepPCB",
        "methods_deeppcb",
        ("deeppcb/teacher",),
        read="What the numbers say: [methods.md](methods.md).",
    ),
    "2": Table(
        "other detectors: Cascade R-CNN to Faster R-CNN on DeepPCB",
        "cascade_faster_deeppcb",
        ("deeppcb/teacher-cascade",),
    ),
    "3": Table("GFL to GFL on DeepPCB", "gfl_deeppcb", ("deeppcb/teacher-gfl",)),
    "5": Table(
        "IMA's parts: FCOS to FCOS on digits",
        "ima_digits",
        ("digits/teacher",),
        read="`mimic` is the first row of the paper's table (KD), `mask alone` the second; then come\n"
        "standardization (`with mask, without importance`) and scale deflation (`with mask`), at α = 100; "
        "`paper`\nis the last row at the published α = 10. What the numbers say: [ima.md](ima.md).",
    ),
    "7": Table(
        "semantic segmentation: DeepLabV3 to PSPNet on CamVid", "camvid", ("camvid/teacher",), metric="mIoU"
    ),
    "8": Table("the loss weight: IMA on digits", "weight_digits", ("digits/teacher",)),
}
COSTS = ("recipes/deeppcb/baseline.yaml", "recipes/deeppcb/teacher.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*TABLES, "6"], help="these tables")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    parts = [HEAD]
    for number, table in TABLES.items():
        run = not args.table and (not args.only or number in args.only)
        parts.append(section(number, table, compared(table, args.jobs, run)))
    parts.append(costs())
    args.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(args.out)


HEAD = """# The paper in miniature

Written by `python benchmarks/paper_mini.py` (`make paper-mini`) from the runs that there are: small
detectors on small sets and two CPU cores, with nothing but the questions in common with the paper's tables.
AP × 100 of the last weights; the paired difference is to the baseline with the same seed, with its 95%
interval. Hours are by the runs' own clocks, on cores shared with other work."""


def compared(table: Table, jobs: int, run: bool) -> Comparison:
    study = read_study(STUDIES / f"{table.study}.yaml")
    if run:
        for teacher in table.teachers:
            if RunFolder(Path("runs") / teacher).result() is None:
                train(Path("recipes") / f"{teacher}.yaml", out=Path("runs") / teacher)
    return run_study(study, jobs=jobs, metric=table.metric, train=run)


def section(number: str, table: Table, comparison: Comparison) -> str:
    done = [arm for arm in comparison.arms if arm.metrics]
    missing = [arm.name for arm in comparison.arms if not arm.metrics]
    runs = sum(len(arm.metrics) for arm in done)
    planned = len(comparison.arms) * len(comparison.study.seeds)
    hours = sum(metrics.get("minutes", 0.0) for arm in done for metrics in arm.metrics.values()) / 60
    recipe = load_recipe(comparison.study.recipe)
    lines = [f"## Table {number}: {table.title}", ""]
    for teacher in table.teachers:
        result = RunFolder(Path("runs") / teacher).result()
        told = (
            "not trained yet"
            if result is None
            else f"{table.metric} {100 * result['metrics'][table.metric]:.1f}"
        )
        lines.append(f"Teacher: `recipes/{teacher}.yaml`, {told}.")
    student = recipe.student
    lines += [
        f"Student: {student.family} on {student.backbone}, `{comparison.study.recipe.as_posix()}`.",
        "",
        "```console",
        f"$ detdistill compare {(STUDIES / table.study).as_posix()}.yaml --metric {table.metric}",
        "```",
        "",
    ]
    if not done:
        return "\n".join([*lines, "Not run yet."])
    shown = {arm.name for arm in done}
    rows = [comparison.columns(), *(row for row in comparison.rows() if row[0] in shown)]
    rows.insert(1, ("---",) * len(rows[0]))
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"{runs} of {planned} runs, {hours:.1f} hours."]
    if missing:
        lines.append(f"Not run yet: {'; '.join(missing)}.")
    if table.read:
        lines += ["", table.read]
    return "\n".join(lines)


def costs() -> str:
    """Table 6, measured as the page is written."""
    found = benchmark(COSTS, runs=10)
    lines = [
        "## Table 6: what they cost",
        "",
        "```console",
        f"$ detdistill benchmark {' '.join(COSTS)}",
        "```",
        "",
        "| model | M parameters | G multiply-adds | ms, median | ms, 90% |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {cost.parameters / 1e6:.2f} | {cost.macs / 1e9:.2f} | {1000 * cost.latency[50]:.1f} "
        f"| {1000 * cost.latency[90]:.1f} |"
        for name, cost in found.items()
    ]
    first = next(iter(found.values()))
    return "\n".join(
        [*lines, "", f"{first.size[0]} × {first.size[1]} pixels, {first.device}, 10 runs in turns."]
    )


if __name__ == "__main__":
    main()
