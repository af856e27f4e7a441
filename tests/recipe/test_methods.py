"""A recipe's methods: refused where they are wrong, and listed, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from detdistill.errors import UserError
from detdistill.recipe import MethodConfig, load_recipe
from detdistill.recipe.methods import METHODS, IMAOptions, MethodOptions, read_options, register
from detdistill.recipe.reading import OF_EVERY_METHOD

HEAD = "data: /data/pcb\nstudent: {backbone: resnet18}\nteacher: runs/teacher\n"
HEAVY = ("torch", "torchvision", "timm")


def run(code: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; {code}; print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import detdistill.recipe.methods", ""),
        ("import detdistill.distillation.methods", ""),
        ("from detdistill.cli import main; main(['methods'])", "CWD: where each channel looks"),
        ("from detdistill.cli import main; main(['methods', 'fgd'])", "focal and global distillation"),
        ("from detdistill.cli import main; main(['models'])", "RetinaNet"),
    ],
)
def test_methods_are_listed_without_torch(code: str, said: str) -> None:
    done = run(code)
    assert done.stderr.strip() == "[]"
    assert said in done.stdout


def test_every_page_is_read_without_importing_its_file() -> None:
    code = (
        "from detdistill.recipe.methods import METHODS;"
        "print(sum(options.page() not in (None, options.__doc__) for options in METHODS.values()))"
    )
    done = run(code)
    assert done.stderr.strip() == "[]"
    assert int(done.stdout) == len(METHODS) == 24


@pytest.mark.parametrize(
    ("methods", "line", "said"),
    [
        ("methods: [imma]", 4, "methods.0.name: no method 'imma'; did you mean 'ima'?"),
        ("methods:\n  - ima:\n      alhpa: 5", 6, "'methods.0.options.alhpa' of ima; did you mean 'alpha'?"),
        ("methods:\n  ima:\n    alhpa: 5", 6, "'methods.0.options.alhpa' of ima; did you mean 'alpha'?"),
        ("methods:\n  - name: ima\n    options:\n      alpha: x", 7, "valid number (got 'x')"),
        (
            "methods:\n  - mimic\n  - ima:\n      weight: 1\n      mask:\n        ratoi: 0.5",
            9,
            "'methods.1.options.mask.ratoi' of ima's mask; did you mean 'ratio'?",
        ),
        ("methods:\n  - ima:\n      weight: -1", 6, "methods.0.weight: give a number of at least 0"),
        ("methods: [{pkd: {alpha: true}}]", 4, "methods.0.options.alpha: input should be a valid number"),
        ("methods: [{pkd: {preset: anchors}}]", 4, "pkd has no preset 'anchors'; did you mean 'anchor'?"),
        ("methods: [{mimic: {preset: anchor}}]", 4, "mimic has no preset 'anchor'; it has none"),
        ("methods: [{cwd: {tau: 0}}]", 4, "methods.0.options.tau: input should be greater than 0"),
    ],
)
def test_a_wrong_method_is_refused_with_its_line(tmp_path: Path, methods: str, line: int, said: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{HEAD}{methods}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(file)
    assert str(error.value).startswith(f"{file}:{line}: ")
    assert said in str(error.value)


def test_a_wrong_option_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(HEAD + "methods: [{ima: {alhpa: 5}}]\n", encoding="utf-8")
    done = run(f"from detdistill.cli import main; print(main(['train', {str(file)!r}]))")
    assert done.stdout.strip() == "2"
    assert done.stderr.splitlines()[-1] == "[]"


def test_an_override_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(HEAD + "methods: [{ima: {alpha: 5}}]\n", encoding="utf-8")
    for override in ("methods.ima.options.alpha=x", "methods.0.options.alpha=x", "methods=[imma]"):
        with pytest.raises(UserError, match=r"^override "):
            load_recipe(file, [override])


def test_what_was_given_is_kept_and_nothing_else() -> None:
    config = MethodConfig(name="ima", options={"mask": {"ratio": 0.2}})
    assert config.options == {"mask": {"ratio": 0.2}}
    assert IMAOptions(alpha=5.0).over({"alpha": 1.0, "mask": {"ratio": 0.0}}).given == {
        "alpha": 5.0,
        "mask": {"ratio": 0.0},
    }


@pytest.mark.parametrize("name", METHODS)
def test_presets_are_right(name: str) -> None:
    for preset in METHODS[name].presets.values():
        assert METHODS[name].model_validate(preset).given == preset


@pytest.mark.parametrize("name", METHODS)
def test_no_option_hides_behind_one_of_every_method(name: str) -> None:
    """In the short form they stand next to each other."""
    assert not METHODS[name].model_fields.keys() & {"name", "options", *OF_EVERY_METHOD}


@pytest.mark.parametrize(
    "options",
    [
        {"loss_weight": "x"}, {"loss_weight": 2, "alpha": "x"}, {"loss_weight": 2, "preset": ["paper"]},
        {"mask_ratio": "x"}, {"loss_weight": -2}, {"importance": ["none"]}, {"mask_ratio": 0.5, "mask": 3},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:ima. .* deprecated")
def test_a_wrong_value_of_a_deprecated_key_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^ima: "):
        read_options("ima", options)


def test_a_deprecated_key_is_warned_of_once(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(HEAD + "methods: [{ima: {mask_ratio: 0.2, eps: 0.1}}]\n", encoding="utf-8")
    done = run(f"from detdistill.cli import main; main(['check', {str(file)!r}]); sys.stderr.write('\\n')")
    said = [line for line in done.stderr.splitlines() if "deprecated" in line]
    assert said == [
        "warning: ima: mask_ratio, eps are deprecated: write {mask: {ratio: 0.2}, standardize: {eps: 0.1}}"
    ]


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'cwd' is registered twice"):

        @register("cwd", "somewhere:Other")
        class Other(MethodOptions):
            pass


def test_crosskds_old_key_is_read_with_a_deprecation_line():
    with pytest.warns(FutureWarning, match="normalise is deprecated: write normalize"):
        options = read_options("crosskd", {"normalise": "centerness"})
    assert options.normalize == "centerness"
