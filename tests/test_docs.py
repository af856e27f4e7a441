"""The documentation says what is so: links, commands, recipes, Python examples and every key of a recipe."""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import pytest
import torch
import typer
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import detdistill
from detdistill import cli, recipe
from detdistill.recipe import Recipe, load_recipe
from detdistill.recipe.models import DEFAULT_FAMILY, families
from detdistill.recipe.reading import sections_in

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[Any]:
    """Each code block of that language, with the page that it is on."""
    found = []
    for page in PAGES:
        for i, match in enumerate(FENCE.finditer(page.read_text(encoding="utf-8"))):
            if match[1] == language:
                found.append(pytest.param(match[2], id=f"{page.name}-{i}"))
    return found


# --- links -----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}; there is {sorted(anchors(file))}"


# --- commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("console"))
def test_commands_are_there(block: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in re.findall(r"^\$ (.+)$", block, re.MULTILINE):
        words = line.partition("#")[0].split()
        if words[0] == "make":
            assert words[1] in targets, line
        elif "detdistill" in words:
            arguments = words[words.index("detdistill") + 1 :]
            command = group.commands.get(arguments[0], group)
            assert command is not group or arguments[0].startswith("--"), f"no such verb: {line}"
            known = {option for parameter in command.params for option in parameter.opts}
            options = {argument for argument in arguments if argument.startswith("--")}
            assert options <= known, f"no such option: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_in_the_text_are_there(page: Path) -> None:
    verbs = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert set(re.findall(r"`detdistill (\w[\w-]*)", text)) <= verbs


# --- recipes and Python ----------------------------------------------------------------------------------


def test_recipes_in_the_documentation_are_right(tmp_path: Path) -> None:
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language != "yaml":
                continue
            name = yaml.safe_load(block).get("name", "recipe")
            (tmp_path / f"{name}.yaml").write_text(block, encoding="utf-8")
            assert load_recipe(tmp_path / f"{name}.yaml").student


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_recipes_of_the_project_are_right(path: Path) -> None:
    loaded = load_recipe(path)
    head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    command = f"detdistill train {path.relative_to(ROOT).as_posix()}"
    assert head, f"{path.name}: its head should say what it is and how to run it"
    assert command in head[0], f"{path.name}: its head should say: {command}"
    assert loaded.name


@pytest.mark.parametrize("block", blocks("python"))
def test_python_examples_use_names_that_are_there(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module == "detdistill":
            assert {alias.name for alias in node.names} <= set(detdistill.__all__)
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "detdistill"
        ):
            assert node.attr in detdistill.__all__


@pytest.mark.parametrize(
    "block",
    # those of foreign-models.md need packages of others: test_docs_foreign_models.py
    [b for b in blocks("python") if "import torch" in b.values[0] and "foreign-models" not in b.id],
)
def test_python_examples_run(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need no data of the reader."""
    monkeypatch.setitem(detdistill.METHODS, "moments", None)  # one that the examples add: gone afterwards
    section = {"backbone": "resnet10t", "channels": 8, "head_depth": 1, "strides": [16, 32]}
    build = {
        channels: detdistill.build_model(recipe.model_config(**{**section, "channels": channels}), ["a", "b"])
        for channels in (8, 16)
    }
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    names = {"student": build[8], "teacher": build[16], "loader": [([torch.rand(3, 64, 64)], [target])]}
    before = {name: value.clone() for name, value in build[16].state_dict().items()}
    exec(compile(block, "README", "exec"), names)
    assert torch.isfinite(names["loss"] if "loss" in names else sum(names["losses"].values()))
    assert all(torch.equal(before[name], value) for name, value in build[16].state_dict().items())


# --- every key of a recipe -------------------------------------------------------------------------------

SECTIONS: dict[str, type[BaseModel]] = {
    "recipe": Recipe,
    "data": recipe.DataConfig,
    "methods": recipe.MethodConfig,
    "training": recipe.TrainingConfig,
    "training.optimizer": recipe.OptimizerConfig,
    "training.schedule": recipe.ScheduleConfig,
    "training.augment": recipe.AugmentConfig,
}


def kind(annotation: Any) -> str:
    """A type as the table says it."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(inside[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (typing.Union, UnionType):
        return " or ".join(kind(part) for part in inside if part is not NoneType)
    if origin is tuple:
        return f"list of {kind(inside[0])}" if Ellipsis in inside else f"{len(inside)} × {kind(inside[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", Path: "path", int: "integer", float: "number", bool: "true or false"}[annotation]


def default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "" if field.default_factory is not None else "required"
    if isinstance(field.default, tuple):
        return f"`[{', '.join(f'{value:.4g}' for value in field.default)}]`"
    words = {None: "none", True: "`true`", False: "`false`"}
    is_word = field.default is None or isinstance(field.default, bool)
    return words[field.default] if is_word else f"`{field.default}`"


def rows(section: type[BaseModel]) -> list[str]:
    return [
        f"| `{name}` | {kind(field.annotation)} | {default(field)} | {field.description} |"
        for name, field in section.model_fields.items()
    ]


def model_rows() -> list[str]:
    """Each key of a model's section, with the families that have it, alike in all of them."""
    known = families()
    groups = {tuple(known): "all"} | {
        tuple(name for name, section in known.items() if section.task == task): word
        for task, word in (("detection", "detectors"), ("segmentation", "segmenters"))
    }
    found: dict[tuple[str, str], list[str]] = {}
    for family, section in known.items():
        for name, field in section.model_fields.items():
            if name == "family":
                row = (
                    f"`{name}`",
                    f"text | `{DEFAULT_FAMILY}` | {recipe.ModelConfig.model_fields[name].description}",
                )
            else:
                row = (f"`{name}`", f"{kind(field.annotation)} | {default(field)} | {field.description}")
            found.setdefault(row, []).append(family)
    return [
        f"| {key} | {groups.get(tuple(having), ', '.join(having))} | {rest} |"
        for (key, rest), having in found.items()
    ]


@pytest.mark.parametrize("title", [*SECTIONS, "student and teacher"])
def test_every_key_of_a_recipe_is_described(title: str) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    part = re.search(rf"^## `?{re.escape(title)}`?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert part, f"docs/recipes.md has no section {title}"
    table = [line for line in part[1].splitlines() if line.startswith("| `")]
    wanted = rows(SECTIONS[title]) if title in SECTIONS else model_rows()
    assert table == wanted, "write:\n" + "\n".join(wanted)


def test_every_section_of_the_schema_has_a_table() -> None:
    def below(section: type[BaseModel]) -> set[type[BaseModel]]:
        inner = {s for f in section.model_fields.values() for s in sections_in(f.annotation)}
        return {section}.union(*(below(one) for one in inner))

    assert below(Recipe) == {*SECTIONS.values(), recipe.ModelConfig}


def test_every_key_has_a_description() -> None:
    for section in [*SECTIONS.values(), *families().values()]:
        for name, field in section.model_fields.items():
            assert field.description or name == "family", f"{section.__name__}.{name}"
