"""Numbers that no machine can serve are refused in one line, by `check` as by `train`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml

from detdistill.cli import main
from detdistill.data.formats import digits
from detdistill.data.formats.digits import digits_root
from detdistill.data.images import image_sizes, read_image
from detdistill.errors import UserError
from detdistill.models.layers import backbones
from detdistill.models.layers.backbones import Backbone
from detdistill.recipe import parse_recipe
from detdistill.recipe.reading import read_yaml

RECIPE = {
    "data": {"format": "digits", "train_size": 8, "val_size": 4, "image_size": 64},
    "student": {"family": "fcos", "backbone": "mobilenetv3_small_050", "channels": 16, "head_depth": 1},
    "training": {"max_steps": 1, "batch_size": 4, "workers": 0, "evaluate_every": 0, "device": "cpu"},
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.channels=1000000000", "less than or equal to 65536"),
        ("student.channels=60000", "GiB of memory"),
        ("training.optimizer.lr=1e300", "less than or equal to 1000"),
        ("training.augment.crop_size=[1000000,1000000]", "at most 32768"),
        ("training.augment.scale=[1e9,1e9]", "from 0.01 to 100"),
        ("training.batch_size=99999999999999999999", "less than or equal to"),
        ("training.batch_size=10000000", None),
        ("student.size=[30000,30000]", "GiB of memory"),
        ("training.augment.multi_scale=[50,60]", "by training.augment.multi_scale needs more than"),
        ("training.patience=3", "patience counts evaluations"),
        ("student.size=[32,32]", "BatchNorm has one value per channel"),
        (f"student.strides={[2**i for i in range(3, 40)]}", "strides end at 1024"),
    ],
)
def test_check_and_train_refuse_the_same(recipe, tmp_path, capsys, override, message):
    overrides = [override, *(["training.batch_size=1"] if "32,32" in override else [])]
    overrides += ["training.batch_size=16"] if "30000" in override else []
    overrides += ["training.batch_size=100000"] if "multi_scale" in override else []
    if message is None:  # 10 million images of one student: what fits depends on the input alone
        overrides, message = [override, "student.size=[64,64]"], "GiB of memory"
    for verb in ("check", "train"):
        out = ["--out", str(tmp_path / "run")] if verb == "train" else []
        assert main([verb, str(recipe), *overrides, *out]) == 2
        shown = "".join(capsys.readouterr())
        assert message in shown
        assert "Traceback" not in shown


def test_batch_norm_over_one_value_is_refused_where_the_images_decide_on_the_size(recipe, tmp_path, capsys):
    tree = {**RECIPE, "student": {**RECIPE["student"], "strides": [8, 16, 32]}}
    tree["data"] = {**tree["data"], "image_size": 64}
    recipe.write_text(yaml.safe_dump(tree))
    small = ["training.batch_size=1", "training.augment.crop_size=[24,24]"]
    assert main(["train", str(recipe), *small, "--out", str(tmp_path / "run")]) == 2
    assert "BatchNorm has one value per channel" in capsys.readouterr().err


@pytest.mark.parametrize("size", [("0", "0"), ("-1", "-1"), ("1000000", "1000000")])
def test_sizes_on_the_command_line(recipe, tmp_path, capsys, size):
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0
    for verb in ("benchmark", "export"):
        assert main([verb, str(tmp_path / "run"), "--size", *size]) == 2
        assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("what", ["fifo", "folder", "device", "loop"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, what):
    path = tmp_path / "x"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if what == "device" else path)
    for use in (read_yaml, read_image, image_sizes):
        with pytest.raises(UserError) as error:
            use(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_weights_that_cannot_be_downloaded_are_refused_at_once(monkeypatch, tmp_path):
    """An address whose name is never found, and one that never answers."""
    monkeypatch.setattr(backbones, "getproxies", dict)
    monkeypatch.setattr(backbones, "HUB_TIMEOUT_S", 0.2)
    monkeypatch.setattr(backbones.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def silent(*_: object) -> None:
        time.sleep(5)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    started = time.monotonic()
    with pytest.raises(UserError, match="not in the local cache and cannot be downloaded"):
        Backbone("mobilenetv3_small_050", (8, 16, 32), pretrained=True)
    assert time.monotonic() - started < 30
    assert (
        bool(int(os.environ.get("HF_HUB_OFFLINE", "0"))) == backbones.huggingface_hub.constants.HF_HUB_OFFLINE
    )


def test_memory_that_runs_out_is_one_line(recipe, monkeypatch, capsys):
    def full(*_, **__):
        torch.empty(2**60)

    monkeypatch.setattr("detdistill.training.train.train", full)
    assert main(["train", str(recipe)]) == 2
    assert "error: the memory is full: lower" in capsys.readouterr().err


def test_an_error_of_the_system_is_one_line_with_its_file(recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", str(recipe), "--out", str(tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error
    assert error.count("\n") == 1


@pytest.mark.skipif(digits.fcntl is None, reason="needs file locks")
def test_half_drawn_digits_of_a_killed_process_are_cleared(tmp_path, monkeypatch):
    """And not those of a process that lives."""
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path))
    script = """
import fcntl, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir()
file = (folder / ".lock").open("a"); fcntl.flock(file, fcntl.LOCK_SH)
print("drawing", flush=True); time.sleep(60)
"""
    killed, living = (
        subprocess.Popen([sys.executable, "-c", script, tmp_path / f".digits-x-{name}"], stdout=subprocess.PIPE)
        for name in ("killed", "living")
    )
    try:
        for process in (killed, living):
            assert process.stdout.readline() == b"drawing\n"
        killed.kill()
        killed.wait()
        root = digits_root(parse_recipe(RECIPE).data)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".digits-x-living", root.name])
        assert not (root / ".lock").exists()
    finally:
        living.kill()
