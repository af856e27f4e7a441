"""Every distillation method by its name in recipes; one file each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import entry_points
from inspect import signature
from typing import Any, get_args, get_origin, get_type_hints

from detdistill.distillation.methods.adversarial import Adversarial, AdversarialLoss
from detdistill.distillation.methods.at import AT, ATLoss
from detdistill.distillation.methods.cirkd import CIRKD, CIRKDLoss
from detdistill.distillation.methods.cofd import COFD, COFDLoss
from detdistill.distillation.methods.crosskd import CrossKD, CrossKDLoss
from detdistill.distillation.methods.cwd import CWD, CWDLoss
from detdistill.distillation.methods.defeat import DeFeat, DeFeatLoss
from detdistill.distillation.methods.dist import DIST, DISTLoss
from detdistill.distillation.methods.fgd import FGD, FGDLoss
from detdistill.distillation.methods.fgfi import FGFI, FGFILoss
from detdistill.distillation.methods.fkd import FKD, FKDLoss
from detdistill.distillation.methods.frs import FRS, FRSLoss
from detdistill.distillation.methods.gid import GID, GIDLoss
from detdistill.distillation.methods.ifvd import IFVD, IFVDLoss
from detdistill.distillation.methods.ima import IMA, IMALoss
from detdistill.distillation.methods.kd import KD, KDLoss
from detdistill.distillation.methods.ld import LD, LDLoss
from detdistill.distillation.methods.maskd import MasKD, MasKDLoss
from detdistill.distillation.methods.mgd import MGD, MGDLoss
from detdistill.distillation.methods.mimic import Mimic, MimicLoss
from detdistill.distillation.methods.pkd import PKD, PKDLoss
from detdistill.distillation.methods.scalekd import ScaleKD, ScaleKDLoss
from detdistill.distillation.methods.skd import SKD, SKDLoss
from detdistill.distillation.methods.skds import SKDS, SKDSLoss
from detdistill.distillation.signals import Method, Setting
from detdistill.errors import UserError, nearest

__all__ = [
    "AT",
    "CIRKD",
    "COFD",
    "CWD",
    "DIST",
    "FGD",
    "FGFI",
    "FKD",
    "FRS",
    "GID",
    "IFVD",
    "IMA",
    "KD",
    "LD",
    "METHODS",
    "MGD",
    "PKD",
    "SKD",
    "SKDS",
    "ATLoss",
    "Adversarial",
    "AdversarialLoss",
    "CIRKDLoss",
    "COFDLoss",
    "CWDLoss",
    "CrossKD",
    "CrossKDLoss",
    "DISTLoss",
    "DeFeat",
    "DeFeatLoss",
    "FGDLoss",
    "FGFILoss",
    "FKDLoss",
    "FRSLoss",
    "GIDLoss",
    "IFVDLoss",
    "IMALoss",
    "KDLoss",
    "LDLoss",
    "MGDLoss",
    "MasKD",
    "MasKDLoss",
    "Mimic",
    "MimicLoss",
    "PKDLoss",
    "SKDLoss",
    "SKDSLoss",
    "ScaleKD",
    "ScaleKDLoss",
    "build_method",
    "method_options",
]

logger = logging.getLogger(__name__)

PLUGINS = "detdistill.methods"
"""The group of entry points by which an installed package brings methods of its own."""

METHODS: dict[str, type[Method]] = {
    "ima": IMA,
    "mimic": Mimic,
    "adversarial": Adversarial,
    "at": AT,
    "cirkd": CIRKD,
    "cofd": COFD,
    "crosskd": CrossKD,
    "cwd": CWD,
    "defeat": DeFeat,
    "dist": DIST,
    "fgd": FGD,
    "fgfi": FGFI,
    "fkd": FKD,
    "frs": FRS,
    "gid": GID,
    "ifvd": IFVD,
    "kd": KD,
    "ld": LD,
    "maskd": MasKD,
    "mgd": MGD,
    "pkd": PKD,
    "scalekd": ScaleKD,
    "skd": SKD,
    "skds": SKDS,
}

COMMON: dict[str, Any] = {"preset": str, "strides": list[int], "finest": int}
"""Options of every method: a named set of options; the student's levels to use, or how many from the finest."""


def add_installed_methods() -> None:
    """Add what other packages bring (docs/your-own-method.md); one that fails is told of and left out."""
    for entry in entry_points(group=PLUGINS):
        if entry.name in METHODS:
            logger.warning("%s: method %r is ours already, and left out", entry.value, entry.name)
            continue
        try:
            METHODS[entry.name] = entry.load()
        except Exception as error:  # it is not our code
            logger.warning("%s: method %r cannot be loaded (%r)", entry.value, entry.name, error)


def build_method(name: str, setting: Setting, options: Mapping[str, Any] | None = None) -> Method:
    """The method of that name, with the preset for the student's family or kind, bound to a pair.

    Raises:
        UserError: no such method or option (with the nearest known one), an option's value is wrong, or the
            method makes no sense for the pair.
    """
    options = dict(options or {})
    check_method(name, options)
    method = METHODS[name]
    task = setting.student.task
    if task not in method.tasks:
        able = ", ".join(other for other in METHODS if task in METHODS[other].tasks)
        raise UserError(f"{name} is not for {task}; these are: {able}")
    options = {**_preset(method, setting, options.pop("preset", None)), **options}
    setting = _with_levels(setting, name, options.pop("strides", None), options.pop("finest", None))
    hints = _hints(method)
    loss_class = hints.pop("loss")
    of_method = {key: options.pop(key) for key in hints if key in options}
    try:
        return method(setting, loss_class(**options), **of_method)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def check_method(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what can be refused without a pair.

    Raises:
        UserError: no such method, option or preset (with the nearest known one), or a value of the wrong type.
    """
    if name not in METHODS:
        raise UserError(f"no method {name!r}; {nearest(name, METHODS)}")
    known = {**method_options(name), **COMMON}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{name} has no option {key!r}; {nearest(key, known)}")
        _check(f"{name}.{key}", value, known[key])
    given, presets = options.get("preset"), METHODS[name].presets
    if given is not None and given not in presets:
        raise UserError(f"{name} has no preset {given!r}; {nearest(given, presets)}")


def method_options(name: str) -> dict[str, Any]:
    """A method's own options and their types: those of its binding and those of its loss."""
    hints = _hints(METHODS[name])
    loss_class = hints.pop("loss")
    return {**hints, **_hints(loss_class)}


def option_table(name: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows that say a method's options: type, default, and what each preset gives instead.

    Raises:
        UserError: no such method.
    """
    if name not in METHODS:
        raise UserError(f"no method {name!r}; {nearest(name, METHODS)}")
    method = METHODS[name]
    defaults = {
        key: parameter.default
        for of in (method, get_type_hints(method.__init__)["loss"])
        for key, parameter in signature(of).parameters.items()
    }
    options = {**method_options(name), **COMMON}
    rows = [
        [
            option,
            _type_name(hint),
            "" if defaults.get(option) is None else str(defaults[option]),
            *(str(preset.get(option, "")) for preset in method.presets.values()),
        ]
        for option, hint in options.items()
    ]
    return ["option", "type", "default", *method.presets], rows


def _type_name(hint: Any) -> str:
    kinds = get_args(hint) if get_origin(hint) is not list else ()
    if not kinds:
        return str(hint).replace("list[int]", "list of int") if get_origin(hint) else hint.__name__
    return " | ".join(
        kind if isinstance(kind, str) else "null" if kind is type(None) else kind.__name__ for kind in kinds
    )


def _hints(of: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(of.__init__)
    return {key: hint for key, hint in hints.items() if key not in ("return", "setting")}


def _preset(method: type[Method], setting: Setting, given: str | None) -> Mapping[str, Any]:
    if given is None:
        wanted = (setting.student.family or "", setting.student.kind or "", "recommended")
        return next((method.presets[key] for key in wanted if key in method.presets), {})
    return method.presets[given]


def _with_levels(setting: Setting, name: str, strides: list[int] | None, finest: int | None) -> Setting:
    matched = [level.student_stride for level in setting.matching.levels]
    if strides is None:
        strides = matched[:finest]
    try:
        return Setting(setting.student, setting.teacher, setting.matching.only(strides))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _check(where: str, value: Any, hint: Any) -> None:
    """Refuse a value of the wrong type, before anything is built."""
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}; give a list")
        for i, item in enumerate(value):
            _check(f"{where}[{i}]", item, get_args(hint)[0])
        return
    kinds = get_args(hint) or (hint,)
    if all(isinstance(kind, str) for kind in kinds):
        if value not in kinds:
            raise UserError(f"{where} is {value!r}; {nearest(str(value), kinds)}")
    elif (isinstance(value, bool) and bool not in kinds) or not (
        isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    ):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UserError(f"{where} is {value!r}; give a {names}")


add_installed_methods()
