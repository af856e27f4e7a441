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
from detdistill.recipe import recipe as config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "detdistill"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = ("config", "data", "models", "distillation", "evaluation", "report", "training", "experiments", "cli")


def room_of(module: str) -> str:
    """``detdistill.data.formats.coco`` is in the room ``data``."""
    return module.split(".")[1] if module.startswith("detdistill.") else ""


def imports_of(path: Path) -> set[str]:
    """Every detdistill module that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: write imports whole, not relative"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module for module in found if module.startswith("detdistill")}


def test_each_room_imports_only_from_those_before_it() -> None:
    for path in SOURCES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in ROOMS:
            continue
        later = set(ROOMS[ROOMS.index(room) + 1 :])
        wrong = {module for module in imports_of(path) if room_of(module) in later}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)} from a later room"


def test_import_linter_agrees() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_linter_knows_every_room() -> None:
    layers = set(re.findall(r'"detdistill\.(\w+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
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
    assert detdistill.Recipe is config.Recipe


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = detdistill.trian
