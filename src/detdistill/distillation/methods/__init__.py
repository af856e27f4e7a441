"""Every distillation method by its name in recipes; one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from detdistill.config import UserError, nearest
from detdistill.distillation.matching import Matching
from detdistill.distillation.methods.ima import IMA, PRESETS, IMALoss
from detdistill.distillation.methods.mimic import Mimic, MimicLoss
from detdistill.distillation.signals import Method

__all__ = ["IMA", "METHODS", "IMALoss", "Mimic", "MimicLoss", "build_method"]


def _ima(matching: Matching, options: dict[str, Any]) -> Method:
    adapt = options.pop("adapt", "auto")
    preset = options.pop("preset", "recommended")
    if preset not in PRESETS:
        raise UserError(f"ima has no preset {preset!r}; {nearest(str(preset), PRESETS)}")
    return IMA(matching, _make("ima", IMALoss, {**PRESETS[preset], **options}), adapt)


def _mimic(matching: Matching, options: dict[str, Any]) -> Method:
    adapt = options.pop("adapt", "auto")
    return Mimic(matching, _make("mimic", MimicLoss, options), adapt)


METHODS: dict[str, Callable[[Matching, dict[str, Any]], Method]] = {"ima": _ima, "mimic": _mimic}


def build_method(name: str, matching: Matching, options: Mapping[str, Any] | None = None) -> Method:
    """The method of that name, bound to the matched levels.

    Raises:
        UserError: no such method or option (with the nearest known one), or an option's value is wrong.
    """
    if name not in METHODS:
        raise UserError(f"no method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name](matching, dict(options or {}))


def _make(name: str, loss: type[Any], options: Mapping[str, Any]) -> Any:
    known = get_type_hints(loss.__init__)
    known.pop("return")
    for key, value in options.items():
        if key not in known:
            extra = ["adapt", "preset"] if name == "ima" else ["adapt"]
            raise UserError(f"{name} has no option {key!r}; {nearest(key, [*known, *extra])}")
        _check(f"{name}.{key}", value, known[key])
    try:
        return loss(**options)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def _check(where: str, value: Any, hint: Any) -> None:
    """Refuse a value of the wrong type, before anything is built."""
    kinds = get_args(hint) or (hint,)
    if all(isinstance(kind, str) for kind in kinds):
        if value not in kinds:
            raise UserError(f"{where} is {value!r}; {nearest(str(value), kinds)}")
    elif isinstance(value, bool) != (bool in kinds) or not (
        isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    ):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{where} is {value!r}; give a {names}")
