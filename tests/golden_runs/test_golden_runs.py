"""Moving code changes no number: short runs of every family and method against what version 0.1.0 computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import detdistill

from .runs import BY_TWO, CASES, DIGITS, FILE, HEADERS, Workshop, environment, header, rows

RELEASE = Path(__file__).with_name("release")
RECORDED = json.loads(FILE.read_text())
EXACT = RECORDED["environment"] == environment()
# Elsewhere kernels round otherwise, and training drifts apart: only the losses of the first steps are near.
STEPS, TOLERANCE = 2, 0.02


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("golden")
        patch.setenv("DETDISTILL_CACHE", str(folder / "cache"))
        yield Workshop(folder)
    torch.set_num_threads(threads)


def assert_same(found: list[dict[str, float]], recorded: list[dict[str, float]]) -> None:
    assert len(found) == len(recorded)
    for now, before in zip(found, recorded, strict=True):
        assert now.keys() >= before.keys()
        if EXACT:
            assert {key: now[key] for key in before} == pytest.approx(before, rel=0, abs=0, nan_ok=True)
        elif before["step"] <= STEPS:
            losses = {key: value for key, value in before.items() if key.startswith("loss")}
            assert {key: now[key] for key in losses} == pytest.approx(losses, rel=TOLERANCE, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_run_computes_what_it_did(workshop, name):
    assert_same(workshop.train(name), RECORDED["cases"][name])


@pytest.mark.slow
def test_two_processes_compute_what_they_did(workshop):
    assert_same(workshop.train_in_two_processes("fcos"), RECORDED["cases"][BY_TWO])


def test_recorded_runs_say_something():
    """They train, distill and measure: every method has a term, terms move, and some AP is above 0."""
    terms = {key for run in RECORDED["cases"].values() for row in run for key in row}
    assert {f"loss/{name}" for name in detdistill.METHODS} <= terms
    for name, run in RECORDED["cases"].items():
        assert run[0]["loss"] != run[-2]["loss"], name
    assert max(run[-1].get("AP", 0) for run in RECORDED["cases"].values()) > 0.01


# --- files of version 0.1.0 ------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path, workshop):
    return Path(shutil.copytree(RELEASE, tmp_path / "release"))


def test_a_stopped_run_of_the_release_resumes(release):
    detdistill.train(detdistill.load_recipe(release / "stopped" / "recipe.yaml"), out=release / "stopped")
    assert_same(rows(release / "stopped"), rows(release / "finished"))
    if EXACT:
        resumed, whole = (load_file(release / run / "student.safetensors") for run in ("stopped", "finished"))
        assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []


def test_a_finished_run_of_the_release_is_not_run_again(release):
    before = (release / "finished" / "student.safetensors").stat().st_mtime_ns
    result = detdistill.train(
        detdistill.load_recipe(release / "finished" / "recipe.yaml"), out=release / "finished"
    )
    assert result.metrics["steps"] == 12
    assert (release / "finished" / "student.safetensors").stat().st_mtime_ns == before


def test_a_student_of_the_release_is_evaluated_taught_and_exported(release):
    recipe = detdistill.load_recipe(release / "finished" / "recipe.yaml")
    numbers = detdistill.evaluate(release / "finished", recipe, workers=0, device="cpu").numbers()
    assert numbers["AP50"] == pytest.approx(rows(release / "finished")[-1]["AP50"], rel=0 if EXACT else 0.1)
    exported = detdistill.export(release / "finished", size=(64, 64))
    onnx = next(path for path in release.rglob("*.onnx"))
    assert exported is not None
    assert len(detdistill.load_model(onnx).classes) == 10
    taught = detdistill.distill(
        release / "finished", {"family": "fcos", "backbone": "test_efficientnet.r160_in1k", "channels": 8},
        {**DIGITS}, training={"max_steps": 1, "batch_size": 2, "workers": 0, "device": "cpu"},
        out=release / "taught",
    )  # fmt: skip
    assert "loss/ima" in rows(taught.run)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_student_file_of_the_release_loads(name, tmp_path):
    """Of every family: what its header says builds a model with the names and shapes that the file has."""
    recorded = json.loads(HEADERS.read_text())[name]
    tensors = {key: torch.full(shape, 0.5) for key, shape in recorded["shapes"].items()}
    counters = {
        key: torch.zeros((), dtype=torch.int64) for key in tensors if key.endswith("num_batches_tracked")
    }
    tensors |= counters
    save_file(tensors, tmp_path / "old.safetensors", metadata=recorded["metadata"])
    model = detdistill.load_model(tmp_path / "old.safetensors")
    assert {key: list(value.shape) for key, value in model.exported.state_dict().items()} == recorded["shapes"]
    assert all(
        (value == 0.5).all() for value in model.exported.state_dict().values() if value.is_floating_point()
    )
    assert header(tmp_path / "old.safetensors") == recorded
