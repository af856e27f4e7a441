"""From a recipe file to one tree: YAML with its line numbers, ``base`` files, environment, overrides.

What the tree may say is the business of :mod:`detdistill.recipe`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from detdistill.errors import UserError, nearest

logger = logging.getLogger(__name__)

Tree = dict[str, Any]
Lines = dict[tuple[str, ...], str]
"""Where each key of a tree was written: ``{("training", "epochs"): "recipe.yaml:7"}``."""


RENAMED = {("data", "unlabelled"): "unlabeled", ("training", "unlabelled_batch"): "unlabeled_batch"}
"""Keys of version 0.1 by section, and what they are called now."""

MOST_VALUES = 100_000
"""Of a YAML file, aliases written out."""


def read_recipe_file(path: Path, overrides: Iterable[str] = ()) -> tuple[Tree, Lines]:
    """The tree of a recipe file over its ``base`` files, with overrides ``key.sub=value``.

    Raises:
        UserError: a file cannot be read or is no mapping, or an override cannot be applied.
    """
    tree, lines = _read_layers(path, ())
    for override in names_of(overrides, "overrides"):
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"{override!r} is no override: write key.sub=value, as training.epochs=12")
        keys = key.split(".")
        given, _ = _parse(value, f"override {override!r}")
        place = _position(tree.get("methods", ()), keys[1]) if keys[0] == "methods" and len(keys) > 1 else None
        if place is not None:
            keys[1] = str(place)
        _set(tree, keys, given, override)
        tree = expand_short_forms(tree)
        at = tuple(keys)
        lines = {key: line for key, line in lines.items() if key[: len(at)] != at}
        for depth in range(1, len(at)):
            lines.setdefault(at[:depth], f"override {override!r}")
        lines[at] = f"override {override!r}"
    return tree, lines


# --- short forms -----------------------------------------------------------------------------------------


def expand_short_forms(tree: Mapping[str, Any]) -> Tree:
    """``data: FOLDER``, ``teacher: WEIGHTS`` and ``methods: [ima]`` as the mappings that they stand for."""
    full = _with_todays_keys(tree)
    data, teacher, methods = full.get("data"), full.get("teacher"), full.get("methods")
    if isinstance(data, str | Path):
        full["data"] = {"format": "digits"} if str(data) == "digits" else {"root": data}
    if isinstance(teacher, str | Path):
        full["teacher"] = {"weights": str(teacher)}
    if "methods" in full:
        several = methods if isinstance(methods, list | tuple) else [methods] if methods is not None else []
        full["methods"] = [expand_method(item) for item in several]
    return full


OF_EVERY_METHOD = ("weight", "ratio", "warmup", "decay_from")


def _with_todays_keys(tree: Mapping[str, Any]) -> Tree:
    """Keys of version 0.1 under today's names, with a deprecation line for each."""
    full = dict(tree)
    for (section, old), new in RENAMED.items():
        options = full.get(section)
        if not isinstance(options, Mapping) or old not in options:
            continue
        if new in options:
            raise UserError(f"{section}.{old} is the old name of {section}.{new}: leave one of the two out")
        if options[old] is not None:  # version 0.1 wrote out every key of a run's recipe
            logger.warning("%s.%s is deprecated: write %s.%s", section, old, section, new)
        full[section] = {new if key == old else key: value for key, value in options.items()}
    return full


def expand_method(item: Any) -> Any:
    """``ima`` or ``{ima: {weight: 1, alpha: 5}}`` to the full form."""
    if isinstance(item, str):
        return {"name": item}
    if isinstance(item, Mapping) and len(item) == 1 and "name" not in item:
        ((name, options),) = item.items()
        if options is not None and not isinstance(options, Mapping):
            return {"name": name, "options": options}
        options = dict(options or {})
        own = {key: options.pop(key) for key in OF_EVERY_METHOD if key in options}
        return {"name": name, **own, "options": options}
    return item


def _expanded_lines(lines: Lines) -> Lines:
    """The lines of methods' keys in their short forms, by where these keys stand in the full form."""
    full = dict(lines)
    for at, line in lines.items():
        if at[0] != "methods" or len(at) < 2:
            continue
        place, *below = at[1:] if at[1].isdigit() else ("0", *at[1:])
        if len(below) > 1 and below[0] not in ("name", "options", *OF_EVERY_METHOD):
            below = below[1:] if below[1] in OF_EVERY_METHOD else ["options", *below[1:]]
        full[("methods", place, *below)] = line
    return full


# --- reading ---------------------------------------------------------------------------------------------


def _read_layers(path: Path, above: Sequence[Path]) -> tuple[Tree, Lines]:
    if path.resolve() in above:
        raise UserError(f"{path}: `base` goes in a circle")
    tree, lines = _read(path)
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{path}: a recipe is a mapping with keys such as data, student, training")
    tree = _with_todays_keys(tree)
    base = tree.pop("base", None)
    if base is not None:
        below = path.parent / Path(str(base)).expanduser()
        base_tree, base_lines = _read_layers(below, (*above, path.resolve()))
        tree, lines = merge(base_tree, tree), {**base_lines, **lines}
    return expand_short_forms(tree), _expanded_lines(lines)


def read_yaml(path: Path) -> Any:
    """What a YAML file says, ``${NAME:-default}`` replaced by the environment's value.

    Raises:
        UserError: it cannot be read.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[Any, Lines]:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: no file but a folder, a pipe or a device; give a recipe")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    return _parse(_expand_environment(text, path), str(path))


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1, but ``1e-3`` is a number (as in YAML 1.2) and a date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse(text: str, source: str) -> tuple[Any, Lines]:
    """The value of a YAML text, and the line of each key."""
    lines: Lines = {}
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None, lines
        _collect_lines(root, (), source, lines)
        return loader.construct_document(root), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}: not YAML: {problem}") from None
    except ValueError as error:  # PyYAML lets int() and float() speak for themselves
        raise UserError(f"{source}: a value cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{source}: values are nested too deeply, or within themselves") from None


def _collect_lines(node: yaml.Node, at: tuple[str, ...], source: str, lines: Lines) -> None:
    if (
        len(lines) > MOST_VALUES
    ):  # aliases within aliases: a line of text for each of them would fill the memory
        raise UserError(f"{source}: more than {MOST_VALUES:,} values, with aliases written out; write fewer")
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name, line = str(key.value), f"{source}:{key.start_mark.line + 1}"
            if isinstance(key, yaml.ScalarNode) and name in seen and name != "<<":
                raise UserError(f"{line}: {'.'.join((*at, name))} is written twice; keep one")
            seen.add(name)
            lines[(*at, name)] = line
            _collect_lines(value, (*at, name), source, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*at, str(i))] = f"{source}:{value.start_mark.line + 1}"
            _collect_lines(value, (*at, str(i)), source, lines)


def _expand_environment(text: str, path: Path) -> str:
    """``${NAME}`` and, as in a shell, ``${NAME:-value where NAME is unset or empty}``."""

    def value(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if default is not None:
            return os.environ.get(name) or default
        if name in os.environ:
            return os.environ[name]
        before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if re.search(r"(^|\s)#", before):
            return match[0]  # a comment may speak of variables
        raise UserError(
            f"{path}: the environment variable {name} is not set; set it or write ${{{name}:-value}}"
        )

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value, text)


# --- laying one tree over another ------------------------------------------------------------------------


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Tree:
    """``above`` over ``below``, mappings key by key."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _set(tree: Tree, keys: Sequence[str], value: Any, override: str) -> None:
    """Set ``tree[keys]``; an item of a list is named by its position or by its ``name``."""
    node: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            here = _position(node, key)
            if here is None:
                above = ".".join(keys[:depth])
                raise UserError(f"{override!r}: {above} has no item {key!r}; write it in the recipe file")
            if last:
                node[here] = value
            node = node[here]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            elif not isinstance(node.get(key), dict | list):
                node[key] = {}
            node = node[key]
        else:
            raise UserError(f"{override!r}: {'.'.join(keys[:depth])} is a single value; nothing is below it")


def _position(items: Sequence[Any], key: str) -> int | None:
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    return names.index(key) if key in names else None


def names_of(given: Iterable[str], what: str) -> tuple[str, ...]:
    """Several names, as Python's callers give them.

    Args:
        what: how a message calls them.

    Raises:
        UserError: it is one text, which would be read as its letters.
    """
    if isinstance(given, str):
        raise UserError(f"{what} is the word {given!r}: give a list of them, as [{given!r}]")
    return tuple(given)


def describe(error: Any, schema: type[BaseModel], lines: Mapping[tuple[str, ...], str], source: str) -> str:
    """What pydantic found wrong, with where it stands and what was probably meant."""
    at = tuple(str(part) for part in error["loc"])
    where = next((lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in lines), source)
    key = ".".join(at) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}; {nearest(at[-1], _known_keys(at[:-1], schema))}"
    if error["type"] == "unknown_key":
        return f"{where}: unknown key {key!r}{error['msg']}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "tuple_type":
        message = "must be a list, as [a, b]"
    if error["type"] in ("model_type", "dict_type"):  # pydantic's words name the class
        message = "must be a section, as {key: value}"
    given = "" if error["type"] in ("value_error", "missing") else f" (got {_short(error['input'])})"
    return f"{where}: {key}: {message[0].lower()}{message[1:]}{given}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _known_keys(at: Sequence[str], section: type[BaseModel]) -> Iterable[str]:
    for part in at:
        if part.isdigit() or part not in section.model_fields:
            continue
        for candidate in sections_in(section.model_fields[part].annotation):
            section = candidate
    return section.model_fields


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in sections_in(part)]
