"""Comparisons: what is planned, what is refused, and that what is run is run once and read back."""

from __future__ import annotations

import hashlib
import html
import json

import pytest
import torch

import detdistill
from detdistill.cli import main
from detdistill.comparison.compare import inheriting_arms, read_comparison, run_study, unequal_budgets
from detdistill.comparison.launcher import launch
from detdistill.comparison.result import load_comparison
from detdistill.comparison.study import (
    BASELINE,
    Study,
    plan_ablation,
    plan_methods,
    plan_sweep,
    read_study,
    study_text,
)
from detdistill.errors import UserError
from detdistill.recipe import load_recipe
from detdistill.training.loop import train
from detdistill.training.run_folder import RunFolder
from detdistill.training.step import optimization_step

RECIPE = """
name: tiny
data: {format: digits, train_size: 8, val_size: 4, image_size: 64}
student: {family: fcos, backbone: mobilenetv3_small_050, channels: 16, head_depth: 1, strides: [8, 16, 32]}
teacher: TEACHER
methods: [{ima: {weight: 0.5}}]
training: {max_steps: 2, batch_size: 4, workers: 0, evaluate_every: 0, device: cpu}
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "teacher.yaml").write_text(
        RECIPE.replace("teacher: TEACHER", "").replace("methods: [{ima: {weight: 0.5}}]", "")
    )
    assert main(["train", str(folder / "teacher.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def recipe(tmp_path, teacher):
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.replace("TEACHER", str(teacher)))
    return file


def resolved(study: Study, arm: str):
    return load_recipe(study.recipe, study.arms[arm])


def test_an_arm_for_each_method_and_the_student_alone_first(recipe, tmp_path) -> None:
    study = plan_methods(recipe, ["mimic", "none", "ima"], (), range(2), tmp_path)
    assert list(study.arms) == [BASELINE, "mimic", "ima"]
    assert resolved(study, BASELINE).teacher is None
    assert resolved(study, "mimic").methods[0].name == "mimic"
    recipes = {name: resolved(study, name) for name in study.arms}
    assert unequal_budgets(recipes) == []
    assert len({r.training.model_dump_json() for r in recipes.values()}) == 1


def test_sweep_of_the_weight_of_the_only_method(recipe, tmp_path) -> None:
    study = plan_sweep(recipe, "distill.weight", ["0.1", "10"], (), range(1), tmp_path)
    assert list(study.arms) == [BASELINE, "weight 0.1", "weight 10"]
    assert [resolved(study, a).methods[0].weight for a in list(study.arms)[1:]] == [0.1, 10]
    study = plan_sweep(recipe, "distill.alpha", ["1", "5"], (), range(1), tmp_path)
    assert resolved(study, "alpha 5").methods[0].options == {"alpha": 5}


def test_ablation_has_the_rows_of_table_5(recipe, tmp_path) -> None:
    study = plan_ablation(recipe, (), range(1), tmp_path)
    assert list(study.arms) == [BASELINE, "KD", "+ mask", "+ standardization", "+ scale deflation"]
    options = [resolved(study, arm).methods[0].options for arm in list(study.arms)[1:]]
    assert options[0]["mask"] == {"ratio": 0}
    assert options[1]["mask"] == {"ratio": 0.5, "keep_dc": True}
    assert options[2] == {"preset": "paper", "importance": {"kind": "none"}}
    assert options[3] == {"preset": "paper"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("training.max_steps=4", "training.max_steps"),
        ("training.max_time=5", "training.max_time"),
        ("data.train_size=16", "data.train_size"),
        ("student.channels=32", "student.channels"),
        ("training.augment.flip=0", "training.augment.flip"),
    ],
)
def test_unequal_budgets_are_refused_before_anything_runs(recipe, tmp_path, change, told) -> None:
    study = Study(recipe, {"a": (), "b": (change,)}, (0,), tmp_path / "out")
    with pytest.raises(UserError, match=told):
        run_study(study)
    assert not study.out.exists()


@pytest.mark.slow
def test_every_arm_starts_from_the_same_weights_and_sees_the_same_pixels(recipe, tmp_path, monkeypatch) -> None:
    """Seen at the optimizer's door: the student's bytes before the first step, each step's images and boxes."""
    seen: dict[str, list[str]] = {}

    def watched(accelerator, model, distiller, optimizer, micro_batches, step, config):
        if step == 0:
            seen[arm].append(digest(model.student.state_dict().values()))
        shown = [image for micro_batch in micro_batches for image in micro_batch.labeled.images]
        targets = [target for micro_batch in micro_batches for target in micro_batch.labeled.targets]
        told = [value for target in targets for value in target.values()]
        seen[arm].append(digest([*shown, *(value for value in told if torch.is_tensor(value))]))
        return optimization_step(accelerator, model, distiller, optimizer, micro_batches, step, config)

    monkeypatch.setattr("detdistill.training.loop.optimization_step", watched)
    methods = ["none", "mimic", "ima", "fgd", "crosskd"]
    study = plan_methods(recipe, methods, ("training.max_steps=2", "training.ema=0.9"), (0,), tmp_path)
    for arm, changes in study.arms.items():
        seen[arm] = []
        train(load_recipe(study.recipe, changes), study.run_folder(arm, 0))
    assert len(seen[BASELINE]) == 3
    assert all(of == seen[BASELINE] for of in seen.values())
    arm = "another seed"
    seen[arm] = []
    train(load_recipe(study.recipe, [*study.arms[BASELINE], "training.seed=1"]), study.run_folder(BASELINE, 1))
    assert not set(seen[arm]) & set(seen[BASELINE])


def digest(tensors) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


@pytest.mark.slow
def test_comparison_runs_once_resumes_and_reads_back(recipe, teacher, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    command = ["compare", str(recipe), "--methods", "none", "ima", "--seeds", "2", "--out", str(out)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.count("done") == 4
    content = json.loads((out / "comparison.json").read_text())
    assert [arm["name"] for arm in content["arms"]] == ["baseline", "ima"]
    ima = content["arms"][1]
    baseline = content["arms"][0]["metrics"]
    assert ima["paired"]["differences"] == {
        seed: pytest.approx(100 * (ima["metrics"][seed]["AP"] - baseline[seed]["AP"])) for seed in ("0", "1")
    }
    assert "| ima |" in (out / "table.md").read_text()
    assert "<svg" in (out / "report.html").read_text()
    assert f"report: {out / 'report.html'}" in first

    result = out / "ima" / "1" / "result.json"
    result.unlink()
    assert main([*command, "--table"]) == 0
    assert "done" not in capsys.readouterr().out
    assert not result.exists()
    assert main(["compare", str(out / "study.yaml"), "--no-report"]) == 0
    assert capsys.readouterr().out.count("done") == 1

    # what is there must not be passed off as runs with other settings
    assert main([*command, "training.optimizer.lr=0.5"]) == 2
    told = capsys.readouterr().err
    assert "baseline/0 (training.optimizer.lr)" in told
    assert "another --out" in told
    assert main([*command, "training.optimizer.lr=0.5", "--table"]) == 0
    assert "warning: " in capsys.readouterr().err
    (weights,) = teacher.glob("*student.safetensors")
    content = weights.read_bytes()
    try:
        weights.write_bytes(content + b" ")
        assert main(command) == 2
        assert f"ima/0 (the content of {weights})" in capsys.readouterr().err
    finally:
        weights.write_bytes(content)


def test_a_table_trains_no_teacher(recipe, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert (
        main(["compare", str(recipe), "none", "mimic", "--teacher", str(recipe), "--table", "--out", str(out)])
        == 0
    )
    assert "nothing to compare yet" in capsys.readouterr().out
    assert not out.exists()


def test_from_python_it_is_the_same(recipe, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["compare", str(recipe), "mimic", "training.epochs=3", "--table", "--out", str(out)]) == 0
    study = Study(recipe, {"mimic": ("training.epochs=3", 'methods=["mimic"]')}, (0, 1, 2), out)
    comparison = detdistill.compare(recipe, ["mimic"], overrides=["training.epochs=3"], out=out, train=False)
    assert comparison.study == study
    assert comparison.verdict in capsys.readouterr().out
    (tmp_path / "study.yaml").write_text(study_text(study))
    assert detdistill.compare(tmp_path / "study.yaml", train=False).study.arms == study.arms
    with pytest.raises(UserError, match="names its own arms"):
        detdistill.compare(tmp_path / "study.yaml", ["ima"], train=False)


def test_a_run_is_put_on_devices_by_what_is_visible(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch(None)[1:] == launch("auto")[1:] == ({}, [])
    assert launch("cpu")[2] == ["training.device=cpu"]
    assert launch("cuda:1")[1:] == ({"CUDA_VISIBLE_DEVICES": "1"}, [])
    python, environment, _ = launch("cuda:0,2")
    assert python[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    assert environment == {"CUDA_VISIBLE_DEVICES": "0,2"}

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    assert launch("cuda:1")[1] == {"CUDA_VISIBLE_DEVICES": "GPU-7"}
    with pytest.raises(UserError, match="names 2 only"):
        launch("cuda:2")
    for wrong in ("cuda", "cuda:", "cuda:x", "gpu0", "mps:0"):
        with pytest.raises(UserError, match="cuda:0,1"):
            launch(wrong)


@pytest.mark.slow
def test_two_processes_for_each_run(recipe, tmp_path, monkeypatch) -> None:
    """As ``--device cuda:0,1`` starts them, on processors."""
    from detdistill.comparison import launcher as study_runs

    python, _, _ = launch("cuda:0,1")
    monkeypatch.setattr(study_runs, "launch", lambda _: (python, {}, []))
    study = Study(recipe, {"ima": ()}, (0,), tmp_path / "out")
    comparison = run_study(study, devices=["cuda:0,1"], say=lambda _: None)
    assert comparison.arms[0].metrics[0]["AP"] is not None
    assert json.loads((study.run_folder("ima", 0) / "environment.json").read_text())["processes"] == 2


def test_a_failed_run_is_told_and_the_rest_goes_on(recipe, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    (out / "mimic").mkdir(parents=True)
    (out / "mimic" / "0").mkdir()
    (out / "mimic" / "0" / "student.safetensors").mkdir()  # cannot be written
    assert main(["compare", str(recipe), "none", "mimic", "--seeds", "1", "--out", str(out)]) == 2
    printed = capsys.readouterr().out
    assert "mimic, seed 0: failed" in printed
    assert "baseline, seed 0: done" in printed
    assert "failed" in (out / "table.md").read_text()


def test_allowed_inequality_is_written_in_the_table(recipe, tmp_path) -> None:
    study = Study(recipe, {"a": (), "b": ("training.max_steps=1",)}, (0,), tmp_path / "out")
    comparison = run_study(study, allow_unequal=True, train=False)
    assert comparison.study.unequal == ("training.max_steps",)
    assert "nothing to compare yet" in comparison.verdict


def test_arms_that_start_from_their_teacher_are_told(recipe, tmp_path) -> None:
    file = tmp_path / "study.yaml"
    arms = {"baseline": None, "ima": "ima", "inheriting": ["inherit=true", "methods=[ima]"]}
    file.write_text(json.dumps({"recipe": str(recipe), "seeds": 1, "arms": arms}))
    study = read_study(file)
    for arm in study.arms:
        folder = RunFolder(study.run_folder(arm, 0))
        folder.path.mkdir(parents=True)
        folder.write_result("finished", {"AP": 0.5}, {})
    told = "not the same start: inheriting began with the teacher's neck and head"
    comparison = run_study(study, train=False)
    assert comparison.verdict.endswith(f"\n{told}")
    assert told in (tmp_path / "table.md").read_text()
    assert load_comparison(tmp_path)[0].verdict == comparison.verdict
    assert main(["report", str(tmp_path)]) == 0
    assert told[1:] in html.unescape((tmp_path / "report.html").read_text())
    # the student alone inherits from nobody, whatever the recipe says; and arms that all start alike are equal
    study = plan_methods(recipe, ["none", "ima", "pkd"], ("inherit=true",), range(1), tmp_path)
    recipes = {name: resolved(study, name) for name in study.arms}
    assert inheriting_arms(recipes) == ["ima", "pkd"]
    assert inheriting_arms({name: recipes[name] for name in ("ima", "pkd")}) == []


def test_runs_are_compared_by_their_own_main_metric(tmp_path, recipe) -> None:
    study = Study(recipe, {"a": (), "b": ()}, (0, 1), tmp_path)
    for arm, gain in (("a", 0.0), ("b", 0.1)):
        for seed in (0, 1):
            metrics = {"mIoU": 0.5 + gain, "pixel_accuracy": 0.9}
            folder = RunFolder(tmp_path / arm / str(seed))
            folder.path.mkdir(parents=True)
            folder.write_result("finished", metrics, {}, "mIoU")
    comparison = read_comparison(study)
    assert comparison.metric == "mIoU"
    assert comparison.arms[1].paired is not None
    assert comparison.arms[1].paired.mean == pytest.approx(10)
    assert read_comparison(study, "pixel_accuracy").arms[1].paired.mean == 0


def test_a_metric_that_no_run_has_is_an_error(tmp_path, recipe) -> None:
    study = Study(recipe, {"a": ()}, (0,), tmp_path)
    (tmp_path / "a" / "0").mkdir(parents=True)
    (tmp_path / "a" / "0" / "result.json").write_text(
        '{"status": "finished", "metrics": {"AP": 0.5}, "per_class": {}}'
    )
    with pytest.raises(UserError, match=r"AP50.*did you mean 'AP'"):
        read_comparison(study, "AP50")


def test_a_study_file_names_arms_as_methods_lists_or_nothing(recipe, tmp_path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        f"recipe: {recipe}\nseeds: [3]\narms:\n  baseline: null\n  fgd: {{fgd: {{weight: 0.1}}}}\n"
        "  long: [training.max_steps=9]\n"
    )
    study = read_study(file)
    assert study.seeds == (3,)
    assert resolved(study, "fgd").methods[0].weight == 0.1
    assert resolved(study, "long").training.max_steps == 9
    assert study.out == tmp_path  # a comparison's own file goes on where it lies
    file.write_text("recipe: x.yaml\nwhat: 1\narms: {a: null}\n")
    with pytest.raises(UserError, match="keys recipe, arms"):
        read_study(file)
    file.write_text("recipe: x.yaml\narms: {a: null}\nseeds: one\n")
    with pytest.raises(UserError, match="seeds are a list"):
        read_study(file)
    file.write_text("recipe: x.yaml\narms: [ima]\n")
    with pytest.raises(UserError, match="NAME: METHOD"):
        read_study(file)
    for recipe in ("null", "[x.yaml]", "3", "''"):
        file.write_text(f"recipe: {recipe}\narms: {{a: null}}\n")
        with pytest.raises(UserError, match="recipe is the path of a recipe file"):
            read_study(file)


@pytest.mark.parametrize("plan", ["methods", "sweep", "ablation"])
def test_what_was_compared_is_a_study_that_can_be_read(recipe, tmp_path, plan) -> None:
    study = {
        "methods": lambda: plan_methods(
            recipe, ["none", "ima", "pkd"], ("training.max_steps=9",), (1, 4), tmp_path
        ),
        "sweep": lambda: plan_sweep(recipe, "distill.weight", ["0.5", "2"], (), (0,), tmp_path),
        "ablation": lambda: plan_ablation(recipe, (), (0, 1, 2), tmp_path),
    }[plan]()
    file = tmp_path / "study.yaml"
    file.write_text(study_text(study))
    assert read_study(file) == study


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compare", "--methods", "none", "mimc"], "methods.0.name: no method 'mimc'; did you mean 'mimic'?"),
        (["sweep", "distill.tau=1,2"], "options.tau=1': unknown key 'methods.0.options.tau' of ima"),
        (
            ["sweep", "distill.alpha=1,x"],
            "options.alpha=x': methods.0.options.alpha: input should be a valid number",
        ),
        (
            ["sweep", "distill.preset=paper,best"],
            "options.preset=best': methods.0.options.preset: ima has no preset 'best'",
        ),
    ],
)
def test_what_an_arm_cannot_be_is_said_before_any_runs(recipe, tmp_path, capsys, words, told) -> None:
    verb, *others = words
    assert main([verb, str(recipe), *others, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_runs_and_those_of_another_version_are_told_in_a_line(recipe, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    folder = RunFolder(out / "baseline" / "0")
    folder.begin(load_recipe(recipe, ("teacher=null", "methods=[]")))
    folder.write_result("finished", {"AP": 0.1}, {})
    command = ["compare", str(recipe), "none", "mimic", "--seeds", "1", "--out", str(out)]
    folder.recipe_file.write_text(folder.recipe_file.read_text() + "obsolete: 3\n")
    assert main(command) == 2
    assert "baseline/0 (" in (told := capsys.readouterr().err)
    assert "unknown key 'obsolete'" in told
    assert "choose another --out" in told
    assert main([*command, "--table"]) == 0
    assert "10.0" in capsys.readouterr().out
    for text in ('{"status": "fini', "[]", '{"status": "finished", "metrics": {"AP": "x"}, "per_class": {}}'):
        folder.result_file.write_text(text)
        assert main([*command, "--table"]) == 2
        told = capsys.readouterr().err
        assert "result.json: damaged" in told
        assert "delete it, and the same command ends the run anew" in told


def test_mistakes_in_words(recipe, tmp_path) -> None:
    with pytest.raises(UserError, match="each once"):
        plan_methods(recipe, ["ima", "ima"], (), range(1), tmp_path)
    with pytest.raises(UserError, match="at least one method"):
        plan_methods(recipe, ["none"], (), range(1), tmp_path)
    with pytest.raises(UserError, match="several values"):
        plan_sweep(recipe, "distill.weight", [], (), range(1), tmp_path)


@pytest.mark.parametrize(
    "seeds", ["10000000000000000000000", "true", "0", "-3", "[]", "[-1]", "[1.5]", "[true]", "x"]
)
def test_impossible_seeds_are_refused(tmp_path, seeds):
    file = tmp_path / "study.yaml"
    file.write_text(f"recipe: r.yaml\nseeds: {seeds}\narms: {{baseline: null, ima: ima}}\n")
    with pytest.raises(UserError, match="seeds are a list"):
        read_study(file)
