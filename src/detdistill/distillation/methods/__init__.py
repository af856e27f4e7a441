"""Every distillation method by its name in recipes; one file each, imported when it is used.

What can be said of a method without torch, its options among them, is in :mod:`detdistill.recipe.methods`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from detdistill.errors import UserError
from detdistill.recipe.methods import METHODS, MethodOptions, methods, read_options

if TYPE_CHECKING:
    from detdistill.distillation.method import Method, PairContext
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
]


def build_method(
    name: str, context: PairContext, options: Mapping[str, Any] | MethodOptions | None = None
) -> Method:
    """The method of that name, with the preset for the student's family or kind, bound to a pair.

    Raises:
        UserError: no such method or option (with the nearest known one), an option's value is wrong, or the
            method makes no sense for the pair.
    """
    given = read_options(name, {} if options is None else options)
    task = context.student.task
    if task not in given.tasks:
        able = ", ".join(other for other, one in methods().items() if task in one.tasks)
        raise UserError(f"{name} is not for {task}; these are: {able}")
    full = given.over(_preset(given, context))
    context = _with_levels(name, context, full)
    try:
        return full.build(context)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def _preset(options: MethodOptions, context: PairContext) -> Mapping[str, Any]:
    if options.preset is not None:
        return options.presets[options.preset]
    wanted = (context.student.family or "", context.student.kind or "", "recommended")
    return next((options.presets[key] for key in wanted if key in options.presets), {})


def _with_levels(name: str, context: PairContext, options: MethodOptions) -> PairContext:
    strides: Sequence[int] | None = options.strides
    if strides is None:
        strides = [level.student_stride for level in context.matching.levels][: options.finest]
    try:
        return replace(context, matching=context.matching.only(strides))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def __getattr__(name: str) -> Any:
    """The method's class or its loss, from its file."""
    for options in METHODS.values():
        module, _, method = str(options.target).partition(":")
        if module.startswith(f"{__name__}.") and name in (method, f"{method}Loss"):
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
