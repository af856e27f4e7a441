"""What can befall a run folder: others that write there, full disks, and things that are moved."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys

import pytest

from detdistill.config import DataConfig, UserError
from detdistill.data.loading import open_data
from detdistill.training import loop
from detdistill.training.loop import train
from detdistill.training.run_folder import RunFolder


@pytest.fixture
def boards(tmp_path, make_recipe):
    """A copy of the digits that can be moved."""
    split = open_data(make_recipe().data)["train"]
    return shutil.copytree(split.source.parent.parent, tmp_path / "boards")


def _begun(recipe, run, monkeypatch, step=2):
    """A run that was stopped after so many steps."""
    original = loop.optimisation_step

    def stopped(*args, **kwargs):
        outcome = original(*args, **kwargs)
        if outcome.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimisation_step", stopped)
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
    folder.save_checkpoint({"step": 1})

    def full(state, file):
        file.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(UserError, match=r"last\.pt: cannot be written, with \d+ MiB free there"):
        folder.save_checkpoint({"step": 2})
    assert list((tmp_path / "checkpoints").iterdir()) == [folder.checkpoint_file]
    assert folder.load_checkpoint() == {"step": 1}
