"""Recipes: what they may say, how files are layered, and what is said about wrong ones."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from detdistill.errors import UserError
from detdistill.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from detdistill.recipe.reading import sections_in
from detdistill.text import require_folder_name

MINIMAL = "data: digits\nstudent: {backbone: resnet18}\n"
PAIR = "data: /data/pcb\nstudent: {backbone: resnet18}\nteacher: runs/teacher\nmethods: [ima]\n"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# --- what is read ----------------------------------------------------------------------------------------


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.data.format == "digits"
    assert recipe.student.family == "retinanet"
    assert recipe.training.optimizer.lr == 0.01
    assert recipe.teacher is None
    assert recipe.methods == ()


def test_short_forms_equal_the_long_ones(tmp_path: Path) -> None:
    long = """
data: {root: /data/pcb}
student: {backbone: resnet18}
teacher: {weights: runs/teacher}
methods: [{name: ima, weight: 2, options: {alpha: 5}}]
"""
    short = PAIR.replace("[ima]", "{ima: {weight: 2, alpha: 5}}")
    assert load_recipe(write(tmp_path, short)) == load_recipe(write(tmp_path, long, "long.yaml"))


@pytest.mark.parametrize("methods", ["ima", "[ima]", "{ima: }", "[{ima: {}}]", "[{name: ima}]"])
def test_one_method_in_every_way(tmp_path: Path, methods: str) -> None:
    recipe = load_recipe(write(tmp_path, PAIR.replace("[ima]", methods)))
    assert [method.name for method in recipe.methods] == ["ima"]
    assert recipe.methods[0].weight is None  # the student's kind decides: see build_weight


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1E-03", "0.001", ".001", "+1e-3"])
def test_numbers_that_yaml_11_takes_for_text(tmp_path: Path, text: str) -> None:
    recipe = load_recipe(write(tmp_path, PAIR.replace("[ima]", f"{{ima: {{standardize: {{eps: {text}}}}}}}")))
    assert recipe.methods[0].options == {"standardize": {"eps": 0.001}}


def test_numbers_are_dumped_so_that_any_yaml_reads_them(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PAIR.replace("[ima]", "{ima: {standardize: {eps: 1e-5}}}")))
    assert yaml.safe_load(dump_recipe(recipe))["methods"][0]["options"]["standardize"]["eps"] == 1e-5


def test_a_rate_that_suits_the_optimizer(tmp_path: Path) -> None:
    recipe = write(tmp_path, MINIMAL)
    assert load_recipe(recipe).training.optimizer.lr == 0.01
    assert load_recipe(recipe, ["training.optimizer.name=adamw"]).training.optimizer.lr == 1e-4
    given = ["training.optimizer.name=adamw", "training.optimizer.lr=0.003"]
    assert load_recipe(recipe, given).training.optimizer.lr == 0.003
    with pytest.raises(UserError, match="nesterov needs a momentum"):
        load_recipe(recipe, ["training.optimizer={nesterov: true, momentum: 0}"])


def test_size_of_one_number_is_square(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, MINIMAL), ["student.size=320"]).student.size == (320, 320)


def test_home_folder(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["data={root: ~/pcb}"])
    assert recipe.data.root == Path.home() / "pcb"


def test_recipes_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(write(tmp_path, MINIMAL)).name = "other"  # type: ignore[misc]


# --- layers ----------------------------------------------------------------------------------------------


def test_a_file_is_laid_over_its_base(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "training: {epochs: 3, batch_size: 4}\n", "base.yaml")
    (tmp_path / "sub").mkdir()
    child = write(tmp_path / "sub", "base: ../base.yaml\ntraining: {epochs: 5}\ndata: {train_size: 10}\n")
    recipe = load_recipe(child)
    assert (recipe.training.epochs, recipe.training.batch_size) == (5, 4)
    assert (recipe.data.format, recipe.data.train_size) == ("digits", 10)


def test_a_short_form_replaces_what_the_base_said(tmp_path: Path) -> None:
    write(tmp_path, "data: {root: /data, format: coco, train: a.json}\nstudent: {}\n", "base.yaml")
    assert load_recipe(write(tmp_path, "base: base.yaml\ndata: digits\n")).data.train is None


def test_an_error_names_the_file_of_the_layer_that_made_it(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "training:\n  epochs: none\n", "base.yaml")
    assert complaint(write(tmp_path, "base: base.yaml\nname: x\n")).startswith(f"{tmp_path}/base.yaml:4: ")


def test_base_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "base: recipe.yaml\n", "other.yaml")
    assert "circle" in complaint(write(tmp_path, "base: other.yaml\n"))


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCB", "/data/pcb")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("MISSING", raising=False)
    path = write(
        tmp_path,
        "# ${MISSING} may be named here\ndata: {root: '${PCB}'}  # and ${MISSING} here\nstudent: {}\n"
        "training: {epochs: ${MISSING:-7}, batch_size: ${EMPTY:-8}}\n",
    )
    recipe = load_recipe(path)
    assert recipe.data.root == Path("/data/pcb")
    assert (recipe.training.epochs, recipe.training.batch_size) == (7, 8)
    message = complaint(write(tmp_path, "data: ${MISSING}\nstudent: {}\n"))
    assert "MISSING is not set" in message


# --- overrides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("training.epochs=2.5", lambda r: r.training.epochs, 2.5),
        ("training.optimizer.lr=1e-4", lambda r: r.training.optimizer.lr, 1e-4),
        ("name=a=b", lambda r: r.name, "a=b"),
        ("data.train=x.json", lambda r: (str(r.data.root), r.data.train), ("/data/pcb", "x.json")),
        ("teacher.norm=frozen", lambda r: (r.teacher.weights, r.teacher.norm), ("runs/teacher", "frozen")),
        ("methods.0.weight=0", lambda r: (r.methods[0].name, r.methods[0].weight), ("ima", 0)),
        ("methods.ima.options.alpha=5", lambda r: r.methods[0].options, {"alpha": 5}),
        ("methods=[mimic]", lambda r: r.methods[0].name, "mimic"),
        ("methods.0=mimic", lambda r: r.methods[0].name, "mimic"),
        ("student.strides=[8, 16]", lambda r: r.student.strides, (8, 16)),
        ("data=digits", lambda r: r.data.format, "digits"),
    ],
)
def test_overrides(tmp_path: Path, override: str, read: Any, expected: Any) -> None:
    assert read(load_recipe(write(tmp_path, PAIR), [override])) == expected


def test_a_pair_becomes_a_plain_student_by_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PAIR), ["teacher=null", "methods=null"])
    assert recipe.teacher is None
    assert recipe.methods == ()


def test_a_teacher_may_be_inherited_from_alone(tmp_path: Path) -> None:
    assert not load_recipe(write(tmp_path, PAIR)).inherit
    recipe = load_recipe(write(tmp_path, PAIR), ["inherit=true", "methods=[]"])
    assert recipe.inherit
    assert recipe.teacher is not None
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.epochs", "write key.sub=value"),
        ("=3", "write key.sub=value"),
        ("training.epochs=many", "override 'training.epochs=many': training.epochs: "),
        ("training.epochs=[1", "not YAML"),
        ("training.epoch=1", "unknown key 'training.epoch'; did you mean 'epochs'?"),
        ("name.x.y=1", "override 'name.x.y=1': name: "),
        ("methods.7.weight=1", "methods has no item '7'"),
        ("methods.fgd.weight=1", "methods has no item 'fgd'"),
        ("methods.0.name.x=1", "name"),
        ("training=9", "training: must be a section, as {key: value}"),
        ("data.classes=cat", r"data.classes: must be a list, as [a, b] (got 'cat')"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, said: str) -> None:
    message = complaint(write(tmp_path, PAIR), override)
    assert said in message
    assert "\n" not in message


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: digits\n", "student: field required"),
        ("student: {}\n", "data: field required"),
        (MINIMAL + "trainig: {}\n", "recipe.yaml:3: unknown key 'trainig'; did you mean 'training'?"),
        (MINIMAL + "training:\n  optimizer:\n    lrate: 1\n", ":5: unknown key 'training.optimizer.lrate'"),
        (MINIMAL + "training:\n  epochs: -1\n", ":4: training.epochs: input should be greater than 0 (got -1)"),
        (MINIMAL + "training: {epochs: .inf}\n", "finite"),
        (MINIMAL + "training: {seed: -1}\n", "training.seed"),
        (MINIMAL + "teacher: runs/t\n", "a teacher without methods teaches nothing"),
        (MINIMAL + "methods: [ima]\n", "need a teacher"),
        (MINIMAL + "inherit: true\n", "inherit: true needs a teacher"),
        (PAIR.replace("resnet18", "resnet18, weights: s") + "inherit: true\n", "leave one of the two out"),
        (MINIMAL + "teacher: {backbone: resnet50}\nmethods: ima\n", "teacher.weights is missing"),
        (PAIR.replace("[ima]", "[ima, ima]"), "listed twice"),
        (PAIR.replace("[ima]", "7"), ":4: methods.0: "),
        (PAIR.replace("[ima]", "[7]"), ":4: methods.0: "),
        (PAIR.replace("[ima]", "{ima: 7}"), "methods.0.options: "),
        (PAIR.replace("[ima]", "{ima: {weight: -1}}"), "methods.0.weight: "),
        ("data: {format: coco}\nstudent: {}\n", ":1: data: data needs `root: FOLDER`"),
        ("data: ~\nstudent: {}\n", "data: "),
        ("data: {root: /d, classes: [a, a]}\nstudent: {}\n", "each once"),
        ("data: {root: /d, classes: []}\nstudent: {}\n", "at least one"),
        ("data: digits\nstudent: {strides: [8, 32]}\n", "and double from level to level"),
        ("data: digits\nstudent: {strides: []}\n", "and double from level to level"),
        ("data: digits\nstudent: {strides: [3, 6]}\n", "and double from level to level"),
        ("data: digits\nstudent: {size: [800, 480]}\n", "give (short, long) side"),
        ("data: digits\nstudent: {size: 0}\n", "give (short, long) side"),
        (
            "data: digits\nstudent: {family: yolo}\n",
            "student.family: no family 'yolo'; known: ",
        ),
        (MINIMAL + "training: {augment: {multi_scale: [1.2, 0.8]}}\n", "smallest, largest"),
        (MINIMAL + "training: {schedule: {milestones: [16, 22]}}\n", "rising fractions"),
        (MINIMAL + "training: {batch_size: 6, accumulate: 4}\n", "batch_size must be a multiple"),
        (MINIMAL + "training: {optimizer: {betas: [0.9, 1.0]}}\n", "betas"),
        (MINIMAL + "name: a\nname: b\n", ":4: name is written twice"),
        ("", "a recipe is a mapping"),
        ("- data\n", "a recipe is a mapping"),
        ("1: 2\n", "a recipe is a mapping"),
        ("data: [\n", "not YAML"),
        ("data: !!python/object:os.system {}\n", "not YAML"),
        ("data: \x07\n", "not YAML"),
        ("data: &a [*a]\nstudent: {}\n", "within themselves"),
        ("base: nowhere.yaml\n", "nowhere.yaml: no such recipe"),
        ("data: !!int x\n", "cannot be read"),
    ],
)
def test_one_error_is_one_line_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    message = complaint(write(tmp_path, text))
    assert said in message
    assert "\n" not in message
    assert message.startswith(str(tmp_path))


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    text = "data: {root: /d, fromat: coco}\nstudent:\n  famly: fcos\n  channels: 0\ntraining:\n  epochs: x\n"
    lines = complaint(write(tmp_path, text)).splitlines()
    assert lines[0] == f"Found 4 errors in {tmp_path}/recipe.yaml"
    assert [line.split(":")[1] for line in lines[1:]] == ["1", "3", "4", "6"]


def test_files_that_are_no_text(tmp_path: Path) -> None:
    assert "no such recipe" in complaint(tmp_path / "none.yaml")
    assert "no file but a folder" in complaint(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00data")
    assert "cannot be read" in complaint(binary)


def test_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(path).data.format == "digits"


def test_errors_of_trees_made_in_python() -> None:
    with pytest.raises(
        UserError, match=r"^recipe: unknown key 'student.chanels' of retinanet; did you mean 'channels'\?$"
    ):
        parse_recipe({"data": "digits", "student": {"chanels": 3}})


# --- anything at all -------------------------------------------------------------------------------------


def sections(model: type[BaseModel]) -> set[str]:
    keys = set(model.model_fields)
    for field in model.model_fields.values():
        for section in sections_in(field.annotation):
            keys |= sections(section)
    return keys


KEYS = st.sampled_from([*sorted(sections(Recipe)), "ima", "base", "<<", "no", "x"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), KEYS,
    st.sampled_from(["digits", "ima", "cosine", "fcos", "1e-3", "0x", "2020-13-45", "=", "${X", "*a"]),
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner, max_size=4),
    max_leaves=12,
)
RECIPES = st.dictionaries(st.sampled_from([*Recipe.model_fields, "base"]), TREES, max_size=6)
FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip


def loads_or_complains(path: Path, overrides: list[str]) -> None:
    try:
        recipe = load_recipe(path, overrides)
    except UserError:
        return
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@FUZZ
@given(RECIPES, st.lists(st.tuples(st.lists(KEYS, min_size=1, max_size=3), SCALARS), max_size=2))
def test_any_tree_is_a_recipe_or_an_error_of_the_user(tmp_path: Path, tree: Any, pairs: Any) -> None:
    text = yaml.safe_dump({"data": "digits", "student": {}, **tree}, allow_unicode=True)
    overrides = [f"{'.'.join(keys)}={value}" for keys, value in pairs]
    loads_or_complains(write(tmp_path, text), overrides)


@FUZZ
@given(st.text(alphabet=st.sampled_from("adt: -\n\t[]{}#&*!|>'\"%@`?,.${}0123e~<="), max_size=60))
def test_any_text_is_a_recipe_or_an_error_of_the_user(tmp_path: Path, text: str) -> None:
    loads_or_complains(write(tmp_path, MINIMAL + text), [])
    loads_or_complains(write(tmp_path, text), [f"data={text}"])


def is_folder_name(name: str) -> bool:
    try:
        return bool(require_folder_name(name, "name"))
    except ValueError:
        return False


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Trees of which every one is right."""
    share = st.floats(0, 1, exclude_max=True)
    tree: dict[str, Any] = {
        "name": draw(st.text(max_size=10).filter(is_folder_name)),
        "data": draw(st.sampled_from(["digits", "/data", {"root": "/data", "classes": ["a", "no", "1"]}])),
        "student": {
            "strides": draw(st.sampled_from([None, [4, 8], [8, 16, 32, 64, 128]])),
            "score_threshold": draw(share),
            "size": draw(st.none() | st.integers(1, 4000)),
        },
        "training": {
            "epochs": draw(st.floats(0, 1e6, exclude_min=True)),
            "optimizer": {"lr": draw(st.floats(0, 10, exclude_min=True))},
        },
    }
    if draw(st.booleans()):
        options = st.fixed_dictionaries(
            {},
            optional={
                "alpha": st.floats(0, 1e9) | st.integers(0, 100),
                "min_pixels": st.integers(0, 100),
                "mask": st.fixed_dictionaries({}, optional={"ratio": share, "keep_dc": st.booleans()}),
                "importance": st.just({"gamma_min": None}),
                "strides": st.just([8, 16]),
            },
        )
        tree["teacher"] = "runs/teacher"
        tree["methods"] = [{"name": "ima", "weight": draw(share), "options": draw(options)}]
    return tree


@FUZZ
@given(recipes())
def test_a_dumped_recipe_is_the_same_recipe(tree: dict[str, Any]) -> None:
    recipe = parse_recipe(tree)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_dates_stay_text(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL + "name: 2026-01-31\n"))
    assert recipe.name == "2026-01-31" == str(datetime.date(2026, 1, 31))


def test_no_variable_of_this_machine_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    load_recipe(write(tmp_path, MINIMAL))


def test_lone_overrides_are_not_read_as_their_letters(tmp_path):
    with pytest.raises(
        UserError, match=r"overrides is the word 'name=b': give a list of them, as \['name=b'\]"
    ):
        load_recipe(write(tmp_path, MINIMAL), "name=b")


def test_keys_of_version_0_1_are_accepted_with_a_deprecation_line(tmp_path, caplog):
    tree = {"data": {"root": "x", "unlabelled": "more"}, "student": {}, "training": {"unlabelled_batch": 3}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"data": {"root": "x", "unlabeled": "few"}}))
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"base": "base.yaml", **tree}))
    recipe = load_recipe(tmp_path / "old.yaml")
    assert (recipe.data.unlabeled, recipe.training.unlabeled_batch) == ("more", 3)
    assert "data.unlabelled is deprecated: write data.unlabeled" in caplog.text
    assert "unlabelled" not in dump_recipe(recipe)
    with pytest.raises(UserError, match=r"data\.unlabelled is the old name of data\.unlabeled"):
        parse_recipe({"data": {"root": "x", "unlabelled": "a", "unlabeled": "b"}, "student": {}})
