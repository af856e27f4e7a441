"""What can befall a run folder: others that write there, full disks, and things that are moved."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

from detdistill.data.loading import open_data
from detdistill.errors import UserError
from detdistill.recipe import DataConfig, parse_recipe
from detdistill.training import loop
from detdistill.training.checkpoint import load_checkpoint, save_checkpoint
from detdistill.training.loop import train
from detdistill.training.run_folder import RunFolder

from .test_loop import assert_same_student


@pytest.fixture
def boards(tmp_path, make_recipe):
    """A copy of the digits that can be moved."""
    split = open_data(make_recipe().data)["train"]
    return shutil.copytree(split.source.parent.parent, tmp_path / "boards")


def _begun(recipe, run, monkeypatch, step=2):
    """A run that was stopped after so many steps."""
    original = loop.optimization_step

    def stopped(*args, **kwargs):
        outcome = original(*args, **kwargs)
        if outcome.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimization_step", stopped)
        with pytest.raises(SystemExit):
            train(recipe, run)


def test_a_run_goes_on_with_a_moved_dataset_and_teacher(
    boards, tmp_path, make_recipe, teacher_file, monkeypatch, capsys
):
    def recipe(data, teacher):
        return make_recipe(data=DataConfig(root=data), teacher=str(teacher), methods=["ima"])

    teacher = shutil.copy(teacher_file, tmp_path / "teacher.safetensors")
    _begun(recipe(boards, teacher), tmp_path / "run", monkeypatch)
    moved = shutil.move(boards, tmp_path / "elsewhere")
    moved_teacher = shutil.move(teacher, tmp_path / "other.safetensors")
    (tmp_path / "run").rename(tmp_path / "moved run")
    train(recipe(moved, moved_teacher), tmp_path / "moved run")
    assert "resumed at step 2" in capsys.readouterr().out
    assert RunFolder(tmp_path / "moved run").recipe().data.root == moved


def test_other_annotations_are_refused_in_the_old_place_and_a_new_one(
    boards, tmp_path, make_recipe, monkeypatch
):
    recipe = make_recipe(data=DataConfig(root=boards))
    _begun(recipe, tmp_path / "run", monkeypatch)
    other = shutil.copytree(boards, tmp_path / "other")
    for root in (boards, other):
        file = root / "annotations" / "instances_train.json"
        data = json.loads(file.read_text())
        data["annotations"].pop()
        file.write_text(json.dumps(data))
    with pytest.raises(UserError, match="other annotations"):
        train(recipe, tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.root differ"):
        train(make_recipe(data=DataConfig(root=other)), tmp_path / "run")
    assert train(recipe, tmp_path / "run", resume=False).status == "finished"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no record locks")
def test_a_folder_in_which_another_process_trains_is_refused(make_recipe, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', "
        "flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "checkpoints" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is training here"):
            train(make_recipe(training={"max_steps": 1}), tmp_path, resume=False)
        other.communicate()
    assert train(make_recipe(training={"max_steps": 1}), tmp_path).status == "finished"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("unexpected pos 8 vs 0")]
)
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, error):
    folder = RunFolder(tmp_path)
    folder.checkpoint_file.parent.mkdir()
    state = {"step": 1, "pair": {}, "optimizer": {}}
    folder.save_checkpoint(state)

    def full(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(UserError, match=r"last\.pt: cannot be written, with \d+ MiB free there"):
        folder.save_checkpoint({"step": 2})
    assert list((tmp_path / "checkpoints").iterdir()) == [folder.checkpoint_file]
    assert folder.load_checkpoint() == state


# --- damaged files, and signals in every moment -------------------------------------------------------------


def _damage(file, how):
    content = file.read_bytes()
    if how == "flipped bit":  # in the middle of the largest tensor
        with zipfile.ZipFile(file) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        at = largest.header_offset + 200 + largest.file_size // 2
        content = content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
    else:
        content = {"empty": b"", "half": content[: len(content) // 2], "zeros": bytes(len(content))}[how]
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "half", "zeros", "flipped bit"])
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_resumes_exactly(
    make_recipe, tmp_path, monkeypatch, how
):
    recipe = make_recipe(training={"checkpoint_every": 2})
    train(recipe, tmp_path / "whole")
    _begun(recipe, tmp_path / "run", monkeypatch, step=5)
    last, previous = (tmp_path / "run" / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    _damage(last, how)
    with pytest.raises(
        UserError, match=r"last\.pt: damaged .*delete it to resume from .*previous\.pt, or .*--fresh"
    ) as error:
        train(recipe, tmp_path / "run")
    assert "\n" not in str(error.value)
    last.unlink()
    train(recipe, tmp_path / "run")
    assert_same_student(tmp_path / "whole", tmp_path / "run")
    _damage(last, how)
    _damage(previous, how)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="no other checkpoint is left: start the run anew with --fresh"):
        train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", resume=False)
    assert_same_student(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_that_cannot_be_read_back_does_not_replace_the_last_one(tmp_path, monkeypatch):
    file = tmp_path / "last.pt"
    state = {"step": 1, "pair": {"a": torch.ones(1000)}, "optimizer": {}}
    save_checkpoint(file, state)

    def lossy(content, opened):
        torch_save(content, opened)
        opened.seek(-2000, 2)
        opened.write(b"\0" * 100)

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", lossy)
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(file, {**state, "step": 2})
    assert load_checkpoint(file)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b'{"step": 1, "a\n{"step": 2}\n', r"metrics\.jsonl:1: damaged"),
        ("metrics.jsonl", b"\x80\xff", "no text"),
        ("data.sha256", b"\x80\xff", "no text"),
        ("recipe.yaml", b"\x80\xff", "--fresh"),
        ("recipe.yaml", b"student: [", "--fresh"),
    ],
)
def test_damaged_files_of_a_run_are_named_with_the_way_on(
    make_recipe, tmp_path, monkeypatch, name, content, message
):
    recipe, run = make_recipe(), tmp_path / "run"
    _begun(recipe, run, monkeypatch)
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        train(recipe, run)
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    assert train(recipe, run, resume=False).status == "finished"


def test_the_half_row_of_a_killed_run_is_left_out(make_recipe, tmp_path, monkeypatch):
    _begun(make_recipe(), tmp_path / "run", monkeypatch)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    train(make_recipe(), tmp_path / "run")
    assert [row["step"] for row in RunFolder(tmp_path / "run").metrics()] == [2, 3, 6, 7, 7]


def test_an_ended_run_is_not_written_again(make_recipe, teacher_file, tmp_path):
    recipe = make_recipe(teacher=str(teacher_file), methods=["ima"], training={"max_steps": 1})
    train(recipe, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"}
    train(recipe, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"} == before


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("at", ["step", "evaluation", "last evaluation"])
def test_a_run_stopped_at_any_moment_resumes_exactly(make_recipe, tmp_path, monkeypatch, number, ends, at):
    """Also one that was stopped while it was evaluated: the evaluation is made again."""
    recipe = make_recipe(training={"evaluate_every": 1, "batch_size": 4, "checkpoint_every": 1000})
    train(recipe, tmp_path / "whole")
    name = "optimization_step" if at == "step" else "evaluate_model"
    original, calls = getattr(loop, name), []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2 if at == "last evaluation" else 1):
            signal.raise_signal(number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, name, stopped)
        with pytest.raises(ends):
            train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run")
    assert_same_student(tmp_path / "whole", tmp_path / "run")
    a, b = (
        [
            {k: v for k, v in row.items() if k != "images_per_second"}
            for row in RunFolder(tmp_path / run).metrics()
        ]
        for run in ("whole", "run")
    )
    evaluations = [[row for row in rows if "AP" in row] for rows in (a, b)]
    assert evaluations[0] == evaluations[1]


def test_another_number_of_processes_is_said_not_to_be_exact(make_recipe, tmp_path, monkeypatch, capsys):
    recipe, run = make_recipe(), tmp_path / "run"
    _begun(recipe, run, monkeypatch)
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    assert state["processes"] == 1
    save_checkpoint(run / "checkpoints" / "last.pt", {**state, "processes": 4})
    train(recipe, run)
    assert "resumed with 1 instead of 4 processes" in capsys.readouterr().out


def test_a_second_interrupt_does_not_wait_for_the_step(make_recipe, tmp_path, monkeypatch):
    def slow(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second interrupt was not heard")

    monkeypatch.setattr(loop, "optimization_step", slow)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(), tmp_path / "run")


WAITING = """
import ctypes, time
from detdistill.training import preemption
preemption.PATIENCE_S = 0.5
with preemption.stop_request():
    print("ready", flush=True)
    # as a collective operation does: a call in C during which the interpreter runs no handler
    ended = time.monotonic() + 60
    while time.monotonic() < ended:
        ctypes.CDLL(None).usleep(60_000_000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to wait for")
def test_a_process_that_waits_for_another_one_ends_by_itself(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "process 1 waits for one that has stopped" in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_in_a_run_folder_are_refused_instead_of_waited_for(tmp_path):
    folder = RunFolder(tmp_path)
    for file, read in ((folder.result_file, folder.result), (folder.metrics_file, folder.metrics)):
        os.mkfifo(file)
        with pytest.raises(UserError, match=f"{file.name}: is a pipe or a device"):
            read()


# --- starting anew ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"student": {"backbone": "nonsense"}},
        {"teacher": "nowhere", "methods": ["mimic"]},
        {"methods": [{"crosskd": {"depth": 9}}]},
        {"data": {"root": "nowhere"}},
        {"student": {"size": (30000, 30000)}},
    ],
)
def test_a_fresh_run_that_cannot_start_leaves_what_was_there(make_recipe, teacher_file, tmp_path, fault):
    train(make_recipe(training={"max_steps": 1}), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
    recipe = make_recipe(**{"teacher": str(teacher_file), "methods": ["mimic"], **fault})
    with pytest.raises(UserError):
        train(recipe, tmp_path, resume=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_run_does_not_replace_the_weights_that_it_needs(make_recipe, tmp_path, role):
    run = tmp_path / "run"
    train(make_recipe(training={"max_steps": 1}), run)
    before = (run / "student.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(run)
    for weights in (run, tmp_path / "link", run / "best.safetensors"):
        requires = {"teacher": str(weights), "methods": ["mimic"]}
        requires = requires if role == "teacher" else {"student": {"weights": str(weights)}}
        for resume in (True, False):
            with pytest.raises(UserError, match="which the recipe needs: choose another run folder"):
                train(make_recipe(**requires), run, resume=resume)
    assert (run / "student.safetensors").read_bytes() == before


# --- where a run may be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "refused"),
    [
        ("", True),
        ("images/train", True),
        ("images/train/run", True),
        ("images/run", False),
        ("runs/x", False),
        ("more", True),
        ("more/run", True),
        ("../run", False),
        ("run-\udce9", True),
    ],
)
def test_a_run_is_not_written_among_the_images_of_its_dataset(tmp_path, run, refused):
    root = tmp_path / "data"
    for name in ("images/train", "more"):
        (root / name).mkdir(parents=True)
        (root / name / "1.png").write_bytes(b"")
    data = DataConfig(root=root, unlabeled="more")
    before = set(tmp_path.rglob("*"))
    folder = RunFolder(root / run)
    if not refused:
        folder.require_apart(data)
        return
    with pytest.raises(UserError, match="choose another folder") as error:
        train(parse_recipe({"data": data.model_dump(), "student": {}}), root / run)
    assert "\n" not in str(error.value)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["student.safetensors", "recipe.yaml", "checkpoints/last.pt"])
def test_a_folder_in_a_files_place_is_refused_before_training(tmp_path, make_recipe, name):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{name}: is a folder, and the run writes a file there"):
        train(make_recipe(), tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, make_recipe):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run/checkpoints: cannot be made \(Not a directory\)"):
        train(make_recipe(), tmp_path / "file" / "run")


def test_a_finished_run_without_its_weights_says_how_to_get_them_back(make_recipe, tmp_path):
    recipe = make_recipe(training={"max_steps": 1})
    done = train(recipe, tmp_path)
    before = done.student.read_bytes()
    done.student.unlink()
    with pytest.raises(UserError, match=r"student\.safetensors: missing.*delete .*result\.json"):
        train(recipe, tmp_path)
    (tmp_path / "result.json").unlink()
    train(recipe, tmp_path)
    assert done.student.read_bytes() == before
