"""The house rules that a machine can hold: order of the rooms, light imports, no pickles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import detdistill
from detdistill import recipe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "detdistill"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_the_order_of_the_rooms() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_linter_knows_every_room() -> None:
    layers = set(
        re.findall(r'\bdetdistill\.(\w+)(?=[" ])', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    )
    here = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" and path.stem[0] != "_"}
    here |= {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert here == layers


def test_no_pickle_is_loaded() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load"):
                safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
                assert safe, f"{path.relative_to(ROOT)}:{node.lineno}: torch.load needs weights_only=True"
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in ast.unparse(node), f"{path.relative_to(ROOT)}:{node.lineno}"


# --- light imports ---------------------------------------------------------------------------------------

HEAVY = ("torch", "torchvision", "timm", "accelerate", "matplotlib", "sklearn", "numpy", "pydantic")


@pytest.mark.parametrize(
    "code",
    [
        "import detdistill; dir(detdistill); detdistill.__version__",
        "from detdistill.cli import main; main(['--help'])",
    ],
    ids=["import", "help"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    script = f"import sys; {code}; print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    assert done.stderr.strip() == "[]"
    assert seconds < 5  # 0.2 s on an idle machine; the modules above are the cause to look for


def test_a_wrong_recipe_is_refused_before_torch_is_imported() -> None:
    script = (
        "import sys; from detdistill.cli import main; code = main(['train', 'nowhere.yaml']);"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 False"
    assert done.stderr.strip() == "error: nowhere.yaml: no such recipe"


# --- public names ----------------------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    assert set(detdistill.__all__) <= set(dir(detdistill))
    for name in detdistill.__all__:
        assert getattr(detdistill, name) is not None
    assert detdistill.Recipe is recipe.Recipe


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = detdistill.trian
