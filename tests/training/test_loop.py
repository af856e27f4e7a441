"""The loop from the outside: what a run leaves, and that interrupting it changes nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torchvision.io import write_png

from detdistill.errors import UserError
from detdistill.recipe import dump_recipe
from detdistill.training import loop, precision
from detdistill.training.loop import train
from detdistill.training.run_folder import differences

from .conftest import DATA


def weights(run):
    return load_file(run / "student.safetensors")


def assert_same_student(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)


def interrupt_after(monkeypatch, step):
    original = loop.optimization_step

    def interrupted(*args, **kwargs):
        outcome = original(*args, **kwargs)
        if outcome.step == step:
            signal.raise_signal(signal.SIGTERM)
        return outcome

    monkeypatch.setattr(loop, "optimization_step", interrupted)


def train_until(step, recipe, run, monkeypatch):
    """Train, and be stopped by a signal after that step."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        with pytest.raises(SystemExit) as stopped:
            train(recipe, run)
    assert stopped.value.code == 75


@pytest.mark.parametrize("step", [1, 3])  # in mid-epoch, and the first of the second epoch of 3 steps
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_interrupted_and_resumed_is_uninterrupted(
    make_recipe, teacher_file, tmp_path, monkeypatch, optimizer, step
):
    recipe = make_recipe(
        training={"optimizer": {"name": optimizer, "lr": 0.001}, "accumulate": 2},
        student={"norm": "batch", "family": "faster_rcnn", "strides": None},
        teacher=str(teacher_file),
        # masks of their own, a running margin, tokens that stop learning, a weight that is measured
        methods=[
            {"ima": {"preset": "paper"}},
            {"mgd": {"strides": [16]}},
            {"cofd": {"strides": [16]}},
            {"maskd": {"strides": [16], "token_fraction": 0.5}},
            {"mimic": {"weight": "auto"}},
        ],
    )
    train(recipe, tmp_path / "whole")
    train_until(step, recipe, tmp_path / "parts", monkeypatch)
    assert not (tmp_path / "parts" / "student.safetensors").exists()
    result = train(recipe, tmp_path / "parts")
    assert result.status == "finished"
    assert_same_student(tmp_path / "whole", tmp_path / "parts")
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    for key in ("pair", "ema"):
        assert all(torch.equal(value, parts[key][name]) for name, value in whole[key].items())
    assert any(not torch.equal(v, whole["pair"]["student." + k]) for k, v in whole["ema"].items())
    last = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])
        for run in ("whole", "parts")
    ]
    assert last[0]["AP"] == last[1]["AP"]


def test_weight_zero_is_the_plain_run_bit_for_bit(make_recipe, teacher_file, tmp_path):
    train(make_recipe(training={"max_steps": 3}), tmp_path / "plain")
    off = make_recipe(training={"max_steps": 3}, teacher=str(teacher_file), methods=[{"ima": {"weight": 0}}])
    train(off, tmp_path / "off")
    assert_same_student(tmp_path / "plain", tmp_path / "off")
    on = make_recipe(training={"max_steps": 3}, teacher=str(teacher_file), methods=["ima"])
    train(on, tmp_path / "on")
    with pytest.raises(AssertionError):
        assert_same_student(tmp_path / "plain", tmp_path / "on")


def test_an_inheriting_run_starts_from_the_teachers_neck_and_head_and_only_once(
    make_recipe, teacher_file, tmp_path, monkeypatch, capsys
):
    pair = {"student": {"channels": 24}, "teacher": str(teacher_file), "inherit": True}
    still = {"max_steps": 1, "optimizer": {"lr": 1e-30}, "ema": None, "seed": 1}
    train(make_recipe(student={"channels": 24}, training=still), tmp_path / "alone")
    train(make_recipe(**pair, training=still), tmp_path / "start")
    start, alone = weights(tmp_path / "start"), weights(tmp_path / "alone")
    for name, value in load_file(teacher_file).items():
        given = alone if name.startswith("backbone.") else {name: value}
        torch.testing.assert_close(start[name], given[name], rtol=0, atol=1e-20)
    assert (start["head.cls.weight"] - alone["head.cls.weight"]).abs().max() > 1e-3

    capsys.readouterr()
    recipe = make_recipe(**pair)
    train(recipe, tmp_path / "whole")
    train_until(3, recipe, tmp_path / "parts", monkeypatch)
    train(recipe, tmp_path / "parts")
    assert_same_student(tmp_path / "whole", tmp_path / "parts")
    assert capsys.readouterr().out.count("inherited from the teacher") == 2


def test_a_method_that_drowns_the_task_is_told_once(make_recipe, teacher_file, tmp_path, capsys):
    for alpha, warnings in ((1e6, 1), (1.0, 0)):
        method = {"mimic": {"alpha": alpha}}
        train(make_recipe(teacher=str(teacher_file), methods=[method]), tmp_path / str(alpha))
        said = capsys.readouterr().out
        assert said.count("the detection loss has little effect") == warnings
        assert said.count("`mimic: {weight: auto, ratio: 0.3}`") == warnings


def test_max_steps_replaces_epochs_and_the_log_says_which(make_recipe, tmp_path, capsys):
    for budget, steps, line in (
        ({"max_steps": 7, "epochs": 1}, 7, "7 steps, 2.333 epochs (set by training.max_steps)"),
        ({"max_steps": None, "epochs": 1}, 3, "3 steps, 1 epochs (set by training.epochs)"),
    ):
        result = train(make_recipe(training=budget), tmp_path / str(steps))
        assert result.metrics["steps"] == steps
        assert line in capsys.readouterr().out


def test_a_run_that_spelled_out_default_weights_is_the_same_recipe(make_recipe, teacher_file):
    """As run folders of 0.1 have them."""
    short = make_recipe(teacher=str(teacher_file), methods=["ima"])
    spelled = make_recipe(teacher=str(teacher_file), methods=[{"ima": {"weight": 1.0, "ratio": 10.0}}])
    other = make_recipe(teacher=str(teacher_file), methods=[{"ima": {"weight": 2.0}}])
    assert differences(spelled, short) == []
    assert differences(other, short) == ["methods"]


def test_what_a_run_leaves(make_recipe, teacher_file, tmp_path):
    recipe = make_recipe(
        teacher=str(teacher_file), methods=["ima"], training={"evaluate_every": 1, "pictures": True}
    )
    result = train(recipe, tmp_path)
    assert result.status == "finished"
    for name in (
        "recipe.yaml", "environment.json", "metrics.csv", "metrics.jsonl", "curves.png", "samples.png",
        "checkpoints/last.pt", "student.safetensors", "result.json",
    ):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss" in row]
    assert all(0 < row["distill_share"] < 1 for row in logged)
    assert all(
        row["loss"] == pytest.approx(sum(v for k, v in row.items() if k.startswith("loss/")), rel=1e-5)
        for row in logged
    )
    assert [row["step"] for row in rows if "AP" in row] == [3, 6, 7]
    assert not any("adapter" in name or "teacher" in name for name in weights(tmp_path))


def test_a_finished_run_is_not_run_again_and_another_recipe_is_refused(make_recipe, tmp_path):
    first = train(make_recipe(training={"max_steps": 2}), tmp_path)
    before = (tmp_path / "student.safetensors").stat().st_mtime_ns
    again = train(make_recipe(training={"max_steps": 2}), tmp_path).metrics
    assert again == pytest.approx(first.metrics, nan_ok=True)
    assert (tmp_path / "student.safetensors").stat().st_mtime_ns == before
    other = make_recipe(training={"max_steps": 2, "seed": 5})
    with pytest.raises(UserError, match=r"training\.seed differ"):
        train(other, tmp_path)
    train(other, tmp_path, resume=False)
    assert (tmp_path / "student.safetensors").stat().st_mtime_ns != before


@pytest.mark.parametrize("at", [0, 4])
def test_a_loss_that_is_not_finite_stops_with_term_step_and_images(make_recipe, tmp_path, monkeypatch, at):
    original = loop.optimization_step

    def poisoned(*args, **kwargs):
        outcome = original(*args, **kwargs)
        if outcome.step == at:
            outcome.terms["bbox_regression"] = torch.tensor(float("nan"))
        return outcome

    monkeypatch.setattr(loop, "optimization_step", poisoned)
    with pytest.raises(UserError) as error:
        train(make_recipe(training={"checkpoint_every": 2}), tmp_path)
    message = str(error.value)
    assert f"bbox_regression is not finite at step {at}" in message
    assert "\n" not in message
    ids = message.split("(images ")[1].split(")")[0].split(", ")
    assert len(ids) == 8
    # what was saved before the loss went wrong is still there
    assert (tmp_path / "checkpoints" / "last.pt").exists() == (at > 0)


def test_a_run_can_stop_early_or_run_out_of_time(make_recipe, tmp_path):
    hopeless = {"evaluate_every": 1, "patience": 1, "optimizer": {"lr": 1e-12}, "max_steps": 60}
    assert train(make_recipe(training=hopeless), tmp_path / "early").status == "stopped early"
    assert train(make_recipe(training={"max_time": 1e-6}), tmp_path / "late").status == "out of time"
    assert (tmp_path / "late" / "student.safetensors").exists()
    # the same limit again changes nothing; a higher one goes on, to what an unlimited run gives
    assert train(make_recipe(training={"max_time": 1e-6}), tmp_path / "late").status == "out of time"
    assert train(make_recipe(training={"max_time": 60}), tmp_path / "late").status == "finished"
    train(make_recipe(), tmp_path / "unlimited")
    assert_same_student(tmp_path / "late", tmp_path / "unlimited")


def test_a_run_that_stops_early_leaves_its_best(make_recipe, tmp_path, monkeypatch):
    """The numbers of its student file are those of the best evaluation, not of the last."""
    from detdistill.training import loop

    measured = iter([0.2, 0.1, 0.05, 0.2])  # after two without a better one, the best again
    seen = []

    def evaluated(model, *args, **options):
        evaluation = loop_evaluate(model, *args, **options)
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        numbers = {"AP": next(measured)}
        monkeypatch.setattr(type(evaluation), "numbers", lambda _: numbers)
        return evaluation

    loop_evaluate = loop.evaluate_model
    monkeypatch.setattr(loop, "evaluate_model", evaluated)
    result = train(
        make_recipe(training={"evaluate_every": 1, "patience": 2, "max_steps": 60}), tmp_path / "run"
    )
    assert (result.status, result.metrics["AP"]) == ("stopped early", 0.2)
    assert len(seen) == 4
    exported = load_file(tmp_path / "run" / "student.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in seen[0].items())
    assert not all(torch.equal(exported[name], value) for name, value in seen[2].items())


def test_a_batch_that_cannot_be_shared_is_refused_before_any_work(make_recipe):
    with pytest.raises(UserError, match="must be a multiple of accumulate"):
        make_recipe(training={"accumulate": 3})


# --- from the outside ------------------------------------------------------------------------------------

LAUNCH = """
import signal, sys
from pathlib import Path
from detdistill.recipe import load_recipe
from detdistill.training import loop
"""
INTERRUPT = """
loop.LOG_EVERY = 4
original = loop.optimization_step

def interrupted(*args):
    outcome = original(*args)
    if outcome.step == 2:
        signal.raise_signal(signal.SIGUSR1)
    return outcome

loop.optimization_step = interrupted
"""


def launch(recipe, run, processes, before=""):
    """Train in fresh processes, as ``accelerate launch`` or ``torchrun`` would start them."""
    run.mkdir(exist_ok=True)
    (run.parent / f"{run.name}.yaml").write_text(dump_recipe(recipe))
    script = run.parent / f"{run.name}.py"
    train_it = f"loop.train(load_recipe({str(run)!r} + '.yaml'), Path({str(run)!r}))"
    script.write_text(LAUNCH + before + train_it)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        script,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def more_images(tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(11):
        write_png(
            torch.randint(0, 256, (3, 48, 64), generator=generator, dtype=torch.uint8), f"{folder}/{i}.png"
        )
    return folder


@pytest.fixture
def shareable(make_recipe, teacher_file, more_images):
    """A recipe whose two halves of a batch add up to the whole: normalization frozen, no random mask."""

    def make(steps):
        return make_recipe(
            teacher=str(teacher_file),
            methods=[
                {"ima": {"mask": {"ratio": 0}, "importance": {"kind": "none"}}}, {"mimic": {"weight": "auto"}},
            ],
            training={
                "optimizer": {"lr": 0.001}, "augment": {"flip": 0.0}, "max_steps": steps, "unlabeled_batch": 4,
            },
            data={**DATA, "unlabeled": str(more_images)},
        )  # fmt: skip

    return make


@pytest.mark.slow
def test_two_processes_are_one(shareable, tmp_path):
    train(shareable(3), tmp_path / "one")
    two = launch(shareable(3), tmp_path / "two", processes=2)
    assert two.returncode == 0, two.stderr
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_two_processes_resume_exactly(shareable, tmp_path):
    recipe = shareable(7)
    whole = launch(recipe, tmp_path / "whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    stopped = launch(recipe, tmp_path / "parts", processes=2, before=INTERRUPT)
    assert stopped.returncode != 0
    assert checkpoint(tmp_path / "parts")["step"] == 4
    again = launch(recipe, tmp_path / "parts", processes=2)
    assert again.returncode == 0, again.stderr
    assert_same_student(tmp_path / "whole", tmp_path / "parts")


def test_runs_of_one_process_may_differ_in_precision(make_recipe, tmp_path):
    for name in ("bf16", "fp32"):
        recipe = make_recipe(training={"max_steps": 1, "precision": name})
        assert train(recipe, tmp_path / name).status == "finished"


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_is_bf16_where_the_device_computes_in_it(
    make_recipe, tmp_path, monkeypatch, capsys, native
):
    for module in (loop, precision):
        monkeypatch.setattr(module, "computes_bf16", lambda device: native)
    used = []
    original = loop.optimization_step

    def spy(accelerator, *args, **kwargs):
        used.append(accelerator.mixed_precision)
        return original(accelerator, *args, **kwargs)

    monkeypatch.setattr(loop, "optimization_step", spy)
    train(make_recipe(training={"max_steps": 1, "precision": "auto"}), tmp_path / "auto")
    assert used == ["bf16" if native else "no"]
    quiet = capsys.readouterr()
    assert "emulates" not in quiet.out + quiet.err
    train(make_recipe(training={"max_steps": 1, "precision": "bf16"}), tmp_path / "bf16")
    assert used[1:] == ["bf16"]
    told = capsys.readouterr()
    assert ("emulates it" in " ".join((told.out + told.err).split())) == (not native)


def test_images_without_labels_resume_exactly_and_matter(
    make_recipe, teacher_file, more_images, tmp_path, monkeypatch
):
    def recipe(**data):
        return make_recipe(
            training={"accumulate": 2, "unlabeled_batch": 4 if data else None},
            teacher=str(teacher_file),
            methods=["mimic", "fgd"],
            data={**DATA, **data},
        )

    with_more = recipe(unlabeled=str(more_images))
    train(with_more, tmp_path / "whole")
    train_until(3, with_more, tmp_path / "parts", monkeypatch)
    train(with_more, tmp_path / "parts")
    assert_same_student(tmp_path / "whole", tmp_path / "parts")
    train(recipe(), tmp_path / "without")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "without")
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_student_alone_does_not_see_images_without_labels(make_recipe, teacher_file, more_images, tmp_path):
    train(make_recipe(), tmp_path / "plain")
    data = {**DATA, "unlabeled": str(more_images)}
    train(make_recipe(data=data), tmp_path / "alone")
    off = make_recipe(data=data, teacher=str(teacher_file), methods=[{"mimic": {"weight": 0}}])
    train(off, tmp_path / "off")
    assert_same_student(tmp_path / "plain", tmp_path / "alone")
    assert_same_student(tmp_path / "plain", tmp_path / "off")


def test_images_without_labels_are_refused_before_training_where_no_method_can_use_them(
    make_recipe, teacher_file, more_images, tmp_path
):
    data = {**DATA, "unlabeled": str(more_images)}
    recipe = make_recipe(data=data, teacher=str(teacher_file), methods=["fgd"])
    with pytest.raises(UserError, match=r"fgd: needs labels, and data\.unlabeled has none"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()
