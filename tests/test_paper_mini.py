"""The paper in miniature: every study can be planned, and the page tells what was run and what was not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from detdistill.comparison.compare import unequal_budgets
from detdistill.comparison.study import read_study
from detdistill.distillation.methods import METHODS
from detdistill.recipe import load_recipe

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    recipes = {name: load_recipe(study.recipe, changes) for name, changes in study.arms.items()}
    assert {method.name for recipe in recipes.values() for method in recipe.methods} <= METHODS.keys()
    if "--allow-unequal" not in path.read_text(encoding="utf-8"):
        assert not unequal_budgets(recipes)
    assert f"benchmarks/studies/{path.name}" in path.read_text(encoding="utf-8"), "its head says how to run it"


def test_the_page_tells_what_there_is(tmp_path: Path) -> None:
    for folder in ("benchmarks", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    runs = {
        "deeppcb/teacher": 0.4,
        "studies/methods_deeppcb/baseline/0": 0.1,
        "studies/methods_deeppcb/pkd/0": 0.25,
    }
    for name, value in runs.items():
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        metrics = {"AP": value, "minutes": 30.0}
        (folder / "result.json").write_text(
            json.dumps({"status": "finished", "metrics": metrics, "per_class": {}})
        )
    command = [sys.executable, "benchmarks/paper_mini.py", "--table", "--out", "page.md"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    first = page[page.index("## Table 1") : page.index("## Table 2")]
    assert "AP 40.0." in first
    assert "| pkd | 25.0 |" in first
    assert "+15.0" in first
    assert "2 of 30 runs, 1.0 hours." in first
    assert "Not run yet: mimic; ima; fgd" in first
    assert "| mimic |" not in first
    assert "Not run yet." in page[page.index("## Table 8") :]
    assert "| baseline student | 0.60 |" in page[page.index("## Table 6") :]
