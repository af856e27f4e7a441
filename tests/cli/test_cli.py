"""The command line from outside: what each verb prints and writes, and each exit code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import BaseModel

from detdistill import cli
from detdistill.cli import main
from detdistill.cli.printing import write_json
from detdistill.errors import UserError
from detdistill.recipe import parse_recipe

DIGITS = """
name: tiny
data: {format: digits, train_size: 8, val_size: 4, image_size: 64}
student: {family: fcos, backbone: mobilenetv3_small_050, channels: 8, head_depth: 1, strides: [16, 32]}
training: {epochs: 1, batch_size: 4, workers: 0, device: cpu, optimizer: {lr: 0.001}}
"""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny recipe, in a folder that is also the working one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(DIGITS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector of digits whose every cell is a detection."""
    from detdistill.models import build_model, save_model

    torch.manual_seed(0)
    section = parse_recipe({
        "data": "digits",
        "student": {"backbone": "mobilenetv3_small_050", "channels": 8, "head_depth": 1, "strides": [16, 32]},
    }).student  # fmt: skip
    model = build_model(section, [str(digit) for digit in range(10)])
    torch.nn.init.constant_(model.head.cls.bias, 0.0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(model, path)
    return path


def command(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The program itself, in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "detdistill", *map(str, arguments)],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **options,
    )  # fmt: skip


def test_closed_streams_are_no_bug(tmp_path: Path) -> None:
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(f"{sys.executable} -m detdistill models {closed}", shell=True, check=False)
        assert done.returncode == 0


# --- exit codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["--version"], ["train", "--help"], ["methods"], ["methods", "fgd"], ["models"]],
)
def test_what_succeeds_is_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert not err


def test_each_summary_fits_one_line_of_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    commands = capsys.readouterr().out.split("Commands:\n")[1].splitlines()
    assert len(commands) > 15
    assert [line for line in commands if line.endswith("...") or not line.endswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "RECIPE"),
        (["methods", "imma"], "did you mean 'ima'?"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["train", "tiny.yaml", "--fersh"], "--fersh"),
        (["train", "tiny.yaml", "training.epochs=x"], "override 'training.epochs=x': training.epochs: "),
        (["train", "tiny.yaml", "training.epoch=1"], "did you mean 'epochs'?"),
        (["evaluate", "nowhere", "--data", "digits"], "nowhere: no such weights file or run folder"),
        (["evaluate", "x", "--data", "digits", "--metric", "mape"], "--metric"),
        (["evaluate", "x", "--data", "digits", "--batch-size", "0"], "--batch-size"),
        (["predict", "x", "nowhere.jpg"], "nowhere.jpg: no such image or folder"),
        (["predict", "x", ".", "--threshold", "2"], "--threshold"),
        (["train", "tiny.yaml", "--out="], "--out= is empty: give a value"),
        (["train", "tiny.yaml", "--out", ""], "an argument is empty"),
        (["evaluate", "x", "--data", "digits", "--json", "."], ".: is a folder; give --json a file's name"),
        (["evaluate", "x", "--data", "digits", "--json=~/x/y"], "HOME/x: cannot be made (Not a directory)"),
        (["export", "x", "--out", "HOME/y.onnx"], "HOME: cannot be made (File exists)"),
        (["train", "tiny.yaml", "data={root: ., train: ~/no/a.json, val: b.json}"], "HOME/no/a.json"),
        (["train", "tiny.yaml", "student.weights=~/no"], "HOME/no: no such weights"),
    ],
)
def test_what_the_user_can_mend_is_2_and_one_line(
    arguments: list[str], said: str, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("HOME", "HOME")
    Path("HOME").write_text("a file, in which there are no folders")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_with_the_file() -> None:
    with pytest.raises(UserError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        write_json(Path("/dev/full"), {"AP": 0.5})


class _Section(BaseModel):
    size: int


def _raise_validation_error() -> None:
    _Section.model_validate({"size": "x"})


def _raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("mend this"), 2, "error: mend this\n"),
        (torch.OutOfMemoryError("tried to allocate"), 2, "error: the memory is full: lower the batch size"),
        (UnicodeEncodeError("utf-8", "a\ud800b", 1, 2, "surrogates"), 2, "error: 'a\\ud800b' is no valid text"),
        (
            OSError(errno.ENOSPC, "No space left on device", "last.pt"),
            2,
            "error: last.pt: No space left on device\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RuntimeError("Symlink loop from '/a'"), 2, "error: Symlink loop from '/a'\n"),
        (RuntimeError("a bug"), 1, "RuntimeError: a bug\nThis is a bug in detdistill: please report it"),
        (OSError(errno.EINVAL, "odd"), 1, "Traceback (most recent call last)"),
    ],
)
def test_each_kind_of_failure_has_its_code(
    error: BaseException, code: int, said: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("detdistill.training.train.train", _raiser(error))
    assert main(["train", str(recipe)]) == code
    err = capsys.readouterr().err
    assert said in err
    assert ("Traceback" in err) == (code == 1)


def test_pydantic_errors_are_the_users(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("detdistill.training.train.train", lambda *_, **__: _raise_validation_error())
    assert main(["train", str(recipe)]) == 2
    assert capsys.readouterr().err.startswith("error: size: Input should be a valid integer")


def test_a_preempted_run_keeps_its_code(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detdistill.training.train.train", _raiser(SystemExit(75)))
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe)])
    assert caught.value.code == 75


def test_our_warnings_are_one_line_and_others_are_left(recipe: Path, monkeypatch: Any, capsys: Any) -> None:
    def warn(*_: Any, **__: Any) -> None:
        warnings.warn_explicit("ours", UserWarning, cli.__file__, 1)
        warnings.warn_explicit("theirs", UserWarning, "elsewhere.py", 7)
        raise UserError("end")

    monkeypatch.setattr("detdistill.training.train.train", warn)
    main(["train", str(recipe)])
    err = capsys.readouterr().err
    assert "warning: ours\n" in err
    assert "elsewhere.py:7: UserWarning: theirs" in err


# --- the program itself ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_from_outside_is_plain_text_and_resumes(recipe: Path) -> None:
    first = command("train", "tiny.yaml", "--out", "run", cwd=recipe.parent)
    assert first.returncode == 0, first.stderr
    assert "finished: AP " in first.stdout
    assert "student: run/student.safetensors" in first.stdout
    assert "\x1b" not in first.stdout + first.stderr
    assert (recipe.parent / "run" / "student.safetensors").is_file()
    other = command("train", "tiny.yaml", "training.seed=1", "--out", "run", cwd=recipe.parent)
    assert other.returncode == 2
    assert other.stderr.startswith("error: run holds a run of another recipe (training.seed")
    assert other.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signalled_run(recipe: Path, sent: signal.StepOutputs, code: int) -> None:
    arguments = ["train", "tiny.yaml", "training.epochs=100000", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "detdistill", *arguments],
        cwd=recipe.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
        # a shell starts background jobs, such as this test may be in, deaf to SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    metrics = recipe.parent / "run" / "metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or metrics.exists():
            break
        time.sleep(0.1)
    process.send_signal(sent)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "; the same command resumes from there" in out
    assert (recipe.parent / "run" / "checkpoints" / "last.pt").is_file()


# --- verbs -----------------------------------------------------------------------------------------------


def test_check_says_that_a_recipe_can_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "train: 8 images" in out
    assert "fcos mobilenetv3_small_050" in out
    assert "this recipe can run" in out


def test_check_shows_how_a_pair_meets(recipe: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe), "student.channels=16", f"teacher={weights}", "methods=[ima]"]) == 0
    out = capsys.readouterr().out
    assert f"weights from {weights}" in out
    assert "1×1 adapter 16→8" in out


def test_check_tells_data_errors_and_exits_with_2(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [{"id": i, "file_name": f"{i}.png", "width": 32, "height": 32} for i in range(14)]
    rows = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81} for i in range(14)]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "part"}]}
    folder = recipe.parent / "set"
    folder.mkdir()
    for name in ("train", "val"):
        (folder / f"{name}.json").write_text(json.dumps(content))
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    assert main(["check", str(recipe), "data={root: set, train: train.json, val: val.json}"]) == 2
    lines = capsys.readouterr().out.splitlines()
    missing = [line for line in lines if line.startswith("error: ")]
    assert len([line for line in missing if ".png" in line]) == 10  # 13 are missing in each part
    assert any("16 more" in line for line in lines), lines
    assert lines[-1] == "Found 26 errors. Fix them before training."


def test_evaluate_prints_and_writes_the_twelve_numbers(weights: Path, recipe: Path, capsys: Any) -> None:
    assert (
        main(["evaluate", str(weights), "--data", str(recipe), "--workers", "0", "--json", "out/n.json"]) == 0
    )
    out = capsys.readouterr().out
    numbers = json.loads(Path("out/n.json").read_text())
    for name in ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL"):
        assert name in out.split()
        assert numbers[name] is None or 0 <= numbers[name] <= 1
    assert list(numbers["per_class"]) == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("whole", [True, False])
def test_evaluate_knows_the_data_of_a_run(weights: Path, recipe: Path, capsys: Any, whole: bool) -> None:
    run = recipe.parent / "run"
    run.mkdir()
    shutil.copy(weights, run / "student.safetensors")
    arguments = ["evaluate", str(run if whole else run / "student.safetensors"), "--workers", "0"]
    assert main(arguments) == 2
    assert "give --data" in capsys.readouterr().err
    shutil.copy(recipe, run / "recipe.yaml")
    assert main(arguments) == 0
    assert "instances_val.json" in capsys.readouterr().out


def test_numbers_are_written_where_the_reader_of_the_table_has_gone(weights: Path, recipe: Path) -> None:
    line = f"{sys.executable} -m detdistill evaluate {weights} --data {recipe} --workers 0 --json n.json | true"
    subprocess.run(line, shell=True, check=False, capture_output=True, cwd=recipe.parent)
    assert "AP" in json.loads((recipe.parent / "n.json").read_text())


def test_evaluate_with_the_voc_metric(weights: Path, recipe: Path, capsys: Any) -> None:
    arguments = ["evaluate", str(weights), "--data", str(recipe), "--workers", "0", "--metric", "voc"]
    assert main([*arguments, "--limit", "2", "--results", "out/found.json"]) == 0
    assert "mAP50" in capsys.readouterr().out
    rows = json.loads(Path("out/found.json").read_text())
    assert {"image_id", "category_id", "category", "bbox", "score"} == set(rows[0])
    assert len({row["image_id"] for row in rows}) == 2


def test_predict_writes_pictures_and_a_file(weights: Path, recipe: Path, capsys: Any) -> None:
    folder = recipe.parent / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("7.png", "sub/b.jpg"):
        Image.new("RGB", (70, 50), "gray").save(folder / name)
    assert main(["predict", str(weights), str(folder), "--out", "drawn", "--threshold", "0.4"]) == 0
    assert "2 images, " in capsys.readouterr().out
    assert Path("drawn/7.png").is_file()
    assert Path("drawn/sub/b.jpg").is_file()
    rows = json.loads(Path("drawn/predictions.json").read_text())
    assert {row["image_id"] for row in rows} == {7, "b"}
    assert all(row["score"] >= 0.4 for row in rows)


def test_demo_passes_on_what_was_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("detdistill.commands.demo.demo", lambda **given: asked.update(given))
    assert main(["demo", "--out", str(tmp_path), "--seed", "1", "--seed", "2"]) == 0
    assert (asked["out"], tuple(asked["seeds"])) == (tmp_path, (1, 2))


def test_models_lists_names_of_backbones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--backbones", "resnet1*"]) == 0
    assert "resnet18" in capsys.readouterr().out.splitlines()
