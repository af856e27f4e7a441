"""Names and paths are shown as they are: no markup, emoji codes or formulas, nothing a terminal obeys."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread

import detdistill
from detdistill.cli import main
from detdistill.cli.printing import say, show
from detdistill.comparison.study import Study
from detdistill.errors import UserError
from detdistill.output import output_json
from detdistill.recipe import parse_recipe
from detdistill.recipe.reading import read_yaml
from detdistill.text import markdown_table, printable, require_folder_name
from detdistill.training.display import Display
from detdistill.visualization.plots import save_figure

PACKAGE = Path(detdistill.__file__).parent
NAMES = ("[/b]x", "[red]y[/red]", "road:car:red", "a|b", "$x^$", "é", "caf\udce9", "\x1b[31mred", "\u202eabc")


def as_shown(name: str) -> str:
    return name.replace("\udce9", "\\xe9").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_shows_a_name_as_it_is(name, capsys):
    say(name)
    show((name, "AP"), [(name, 1)])
    display = Display(enabled=True)
    display.start(name, 0, 1)
    display.note("done")
    shown = capsys.readouterr().out
    assert shown.count(as_shown(name)) == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_progress_bar_shows_a_name_as_it_is(name, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    display = Display(enabled=True)
    display.console = type(display.console)(
        force_terminal=True, color_system=None, width=200, markup=False, emoji=False
    )
    display.start(name, 0, 1)
    display.stop()
    assert as_shown(name) in capsys.readouterr().out


def test_an_encoding_without_the_character_shows_an_escape():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert printable("√é\n", stream) == "\\u221a\\xe9\n"
    assert printable("√é", io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) == "√é"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_command_line_prints_in_any_code_page(encoding, tmp_path):
    """Its own dashes and roots, too, and file names that are no UTF-8."""
    missing = os.fsencode(tmp_path) + b"/caf\xe9.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "detdistill", "check", missing],
        env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert b"caf\\xe9.yaml" in done.stderr
    assert b"Traceback" not in done.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "detdistill", "methods", "ima"],
        env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr


def test_markdown_cells_do_not_break_their_table():
    lines = markdown_table([("a|b", "c\nd"), ("\\|", "x")]).splitlines()
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {3}


@pytest.mark.parametrize("name", ["$x^$", "$\\frac{$", "a$b", "$x$", "\x1b[31m", "caf\udce9"])
def test_pictures_show_dollars_and_not_formulas(name, tmp_path):
    def draw(title: str, file: str) -> np.ndarray:
        figure = Figure(figsize=(4, 2), layout="constrained")
        axes = figure.subplots()
        axes.plot([1, 2], label=title)
        axes.legend()
        axes.set_title(title)
        save_figure(figure, tmp_path / file, dpi=50)
        return imread(tmp_path / file)

    drawn = draw(name, "a.png")
    if name == "$x$":  # a formula would be narrower than its text
        assert not np.array_equal(drawn, draw("x", "b.png"))


def test_everything_that_is_shown_passes_these_functions():
    """No second console, and no figure that is saved elsewhere."""
    found = {"Console(": set(), ".savefig(": set()}
    for path in PACKAGE.rglob("*.py"):
        for call, files in found.items():
            if call in path.read_text(encoding="utf-8"):
                files.add(path.relative_to(PACKAGE).as_posix())
    assert found["Console("] == {"cli/printing.py", "training/display.py", "commands/demo.py"}
    assert found[".savefig("] == {"visualization/plots.py"}


BAD_NAMES = (
    "",
    ".",
    "..",
    "a/../../b",
    "/etc/x",
    "../x",
    "a//b",
    "a\\..\\b",
    "C:x",
    "~/x",
    "a\0b",
    "a\nb",
    " a",
    "x" * 300,
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_cannot_leave_the_runs_folder(name, tmp_path):
    with pytest.raises(ValueError, match="use a plain name"):
        require_folder_name(name, "the name")
    with pytest.raises(UserError, match=r"name.*use a plain name"):
        parse_recipe({"name": name, "data": "digits", "student": {}})


@pytest.mark.parametrize("name", ["..", ".", "", "a\0b", "x" * 300])
def test_an_arm_cannot_leave_the_comparisons_folder(name, tmp_path):
    with pytest.raises(UserError, match="use a plain name"):
        Study(tmp_path, {"baseline": (), name: ()}, (0,), tmp_path / "out")


def test_arms_that_would_share_a_folder_are_refused(tmp_path):
    for a, b in (("a/b", "a÷b"), ("IMA", "ima")):
        with pytest.raises(UserError, match="would share a folder"):
            Study(tmp_path, {a: (), b: ()}, (0,), tmp_path)
    study = Study(tmp_path, {"a/../b": ()}, (0,), tmp_path / "out")
    assert study.run_folder("a/../b", 0).parent.parent == tmp_path / "out"


@pytest.mark.parametrize("name", ["student-a", "exp/student 1", "ü", "alpha 0.1", "{ima: {alpha: 5}}"])
def test_plain_names_are_taken(name):
    assert require_folder_name(name, "the name") == name


def test_yaml_aliases_that_multiply_end_at_once(tmp_path):
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"bomb\.yaml: more than 100,000 values"):
        read_yaml(file)
    file.write_text(yaml.safe_dump({"a": list(range(50_000))}))
    assert len(read_yaml(file)["a"]) == 50_000
    file.write_text("a: " + "[" * 20_000 + "]" * 20_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_yaml(file)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_without_a_guard_loads_its_images_itself(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing
        multiprocessing.set_start_method("{method}")
        from detdistill.data.formats.digits import digits_root
        from detdistill.recipe import DataConfig
        from detdistill.data.loading import DetectionDataset, make_loader, open_data
        data = DataConfig(format="digits", train_size=4, val_size=4, image_size=64)
        split = open_data(data)["val"]
        print("batches", len(list(make_loader(DetectionDataset(split, None), 2, workers=2))))
        """)
    )
    environment = {**os.environ, "DETDISTILL_CACHE": str(tmp_path / "cache")}
    for guard in ("", 'if __name__ == "__main__": pass\n'):
        if guard:  # and with a guard they are loaded by processes, as asked
            lines = script.read_text().splitlines()
            script.write_text(
                "import multiprocessing\n"
                + 'if __name__ == "__main__":\n'
                + textwrap.indent("\n".join(lines), "    ")
            )
        done = subprocess.run(
            [sys.executable, script], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "batches 2" in done.stdout
        assert ("which worker processes need" in done.stderr) == (not guard)


def test_a_picture_that_fails_does_not_cost_a_run_its_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("detdistill.training.callbacks.save_samples", lambda *_: 1 / 0)
    monkeypatch.setattr("detdistill.training.callbacks.plot_curves", lambda *_: 1 / 0)
    recipe = {
        "data": {"format": "digits", "train_size": 8, "val_size": 4, "image_size": 64},
        "student": {"family": "fcos", "backbone": "mobilenetv3_small_050", "channels": 16, "head_depth": 1},
        "training": {"max_steps": 1, "batch_size": 4, "workers": 0, "evaluate_every": 0, "device": "cpu"},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(file), "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "result.json").is_file()
    shown = capsys.readouterr().out
    assert shown.count("was not drawn (ZeroDivisionError") == 2


def test_json_replaces_nothing_but_its_own_kind(tmp_path):
    annotations, rows, numbers = (tmp_path / f"{name}.json" for name in ("val", "rows", "numbers"))
    annotations.write_text('{"images": [], "annotations": []}')
    rows.write_text("[]")
    numbers.write_text('{"AP": 0.5}')
    assert output_json(rows, "--results", list) == rows
    assert output_json(numbers, "--json", dict) == numbers
    assert output_json(tmp_path / "new.json", "--json", dict)
    for path, kind in ((annotations, dict), (annotations, list), (numbers, list), (rows, dict)):
        with pytest.raises(UserError, match="no earlier output of --x: give another name"):
            output_json(path, "--x", kind)
    with pytest.raises(UserError, match=r"ends in \.json"):
        output_json(tmp_path / "student.safetensors", "--json", dict)
    assert annotations.read_text().startswith('{"images"')


def test_a_deleted_working_folder_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["check", "../recipe.yaml"]) == 2
    assert "the working folder was deleted" in capsys.readouterr().err
