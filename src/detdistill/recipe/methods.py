"""A recipe's methods: one class for each, with its options, their defaults and presets, and what builds it.

Nothing here imports torch: a wrong recipe is refused at once. Another package brings methods by the entry point
group ``detdistill.methods``, each a subclass of :class:`MethodOptions` (docs/your-own-method.md).
"""

from __future__ import annotations

import ast
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from typing_extensions import Self

from detdistill.errors import UserError, nearest
from detdistill.recipe.models import Task
from detdistill.recipe.reading import describe, expand_method, merge, sections_in
from detdistill.recipe.sections import Section, refuse_unknown_keys

if TYPE_CHECKING:
    from detdistill.distillation.method import Method, PairContext

logger = logging.getLogger(__name__)

GROUP = "detdistill.methods"

DETECTION: frozenset[Task] = frozenset({"detection"})
SEGMENTATION: frozenset[Task] = frozenset({"segmentation"})
EVERY_TASK = DETECTION | SEGMENTATION

Presets = Mapping[str, Mapping[str, Any]]

# Strict: `true` is no number, and "5" neither.
Number = Annotated[float, Field(strict=True)]
Factor = Annotated[float, Field(strict=True, ge=0)]
Temperature = Annotated[float, Field(strict=True, gt=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
ShareBelow1 = Annotated[float, Field(strict=True, ge=0, lt=1)]
Count = Annotated[int, Field(strict=True, ge=1)]
CountOr0 = Annotated[int, Field(strict=True, ge=0)]
Switch = Annotated[bool, Field(strict=True)]

Adapt = Literal["auto", "always", "never"]
"""Where an adapter is put between two maps: where channels differ, everywhere, or nowhere."""

_ADAPT = "where a 1×1 convolution is put between the maps"
_ADAPT_3X3 = "where a 3×3 convolution is put between the maps"


class OptionGroup(Section):
    """Options of which an unknown one is refused with the nearest known name."""

    name: ClassVar[str]
    """How messages call it."""

    @model_validator(mode="wrap")
    @classmethod
    def _known_options(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, Mapping):
            value = cls.upgraded(value)
            refuse_unknown_keys(cls, value, cls.name)
        return handler(value)

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Options as an earlier version had them, in today's spelling."""
        return options

    @property
    def given(self) -> dict[str, Any]:
        """What was given, without defaults."""
        return self.model_dump(exclude_unset=True)


class MethodOptions(OptionGroup):
    """What every method's options have. ``@register`` gives a method's class its name and what it builds."""

    target: ClassVar[str | Callable[..., Any]]
    """The :class:`~detdistill.distillation.method.Method` as ``module:class``, imported when one is built, or
    the class itself: called with a ``PairContext`` and these options."""
    tasks: ClassVar[frozenset[Task]] = DETECTION
    """What it can be used for. One that needs boxes, anchors or proposals is for detection alone."""
    needs_labels: ClassVar[bool] = False
    """Images without labels (``data.unlabeled``) cannot be used."""
    presets: ClassVar[Presets] = {}
    """Named sets of options. The one named after the student's family ("gfl"), else after its kind ("anchor",
    "anchor_free", "two_stage", "segmentation"), else "recommended", is what the method's name alone means."""

    preset: str | None = Field(None, description="a named set of options; none: the one for the student")
    strides: tuple[Annotated[int, Field(strict=True)], ...] | None = Field(
        None, description="the student's levels to use"
    )
    finest: Count | None = Field(None, description="use so many of the levels, from the finest")

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value not in cls.presets:
            known = nearest(value, cls.presets) if cls.presets else "it has none"
            raise ValueError(f"{cls.name} has no preset {value!r}; {known}")
        return value

    def over(self, preset: Mapping[str, Any]) -> Self:
        """These options where they were given, else the preset's, else the defaults; groups key by key."""
        return type(self).model_validate(merge(preset, self.given))

    def build(self, context: PairContext) -> Method:
        """The method that these options describe, without a preset (``build_method`` looks for one)."""
        target = type(self).target  # a function is no method of these options
        if isinstance(target, str):
            module, _, name = target.partition(":")
            target = getattr(import_module(module), name)
        method: Method = target(context, self)
        return method

    @classmethod
    def page(cls) -> str:
        """What the method's file says of it: its docstring, read without importing it."""
        target = cls.target
        module = target.partition(":")[0] if isinstance(target, str) else target.__module__
        return (_docstring(module) or cls.__doc__ or "").strip()


METHODS: dict[str, type[MethodOptions]] = {}
"""Every method by its name in recipes; :func:`methods` has those of installed packages, too."""

Options = TypeVar("Options", bound=MethodOptions)


def register(name: str, target: str | Callable[..., Any]) -> Callable[[type[Options]], type[Options]]:
    """Make a method known by its options' class, as a decorator of it.

    Args:
        target: as :attr:`MethodOptions.target`.
    """

    def add(options: type[Options]) -> type[Options]:
        known = METHODS.get(name)
        again = known is not None and (known.__module__, known.__name__) == (
            options.__module__,
            options.__name__,
        )
        if known is not None and not again:  # a notebook's cell may run twice
            raise ValueError(f"method {name!r} is registered twice")
        options.name, options.target = name, target
        METHODS[name] = options
        return options

    return add


def methods() -> Mapping[str, type[MethodOptions]]:
    """Every method by its name, with those of installed packages; one that fails to load is left out."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for entry in entry_points(group=GROUP):
            _load_plugin(entry)
    return METHODS


def _load_plugin(entry: EntryPoint) -> None:
    if entry.name in METHODS:
        logger.warning("%s: method %r exists already; the package's is left out", entry.value, entry.name)
        return
    try:
        loaded = entry.load()
    except Exception as error:  # it is not our code
        logger.warning("%s: method %r cannot be loaded (%r)", entry.value, entry.name, error)
        return
    if METHODS.get(entry.name) is not loaded:
        logger.warning(
            "%s: method %r is left out: name the class of its options there, with @register(%r, ...) above it "
            "(docs/your-own-method.md)",
            entry.value,
            entry.name,
            entry.name,
        )


_plugins_loaded = False


def options_class(name: str) -> type[MethodOptions]:
    """The options' class of a method.

    Raises:
        UserError: no such method, with the nearest known one.
    """
    known = methods()
    if name not in known:
        raise UserError(f"no method {name!r}; {nearest(name, known)}")
    found = known[name]
    if not (isinstance(found, type) and issubclass(found, MethodOptions)):  # METHODS[name] = ..., as in 0.1
        raise UserError(
            f"METHODS[{name!r}] is no MethodOptions: give the method's options a class, with "
            f"@register({name!r}, ...) above it (docs/your-own-method.md)"
        )
    return found


def read_options(name: str, options: Mapping[str, Any] | MethodOptions) -> MethodOptions:
    """A method's options, validated.

    Raises:
        UserError: no such method or option (with the nearest known one), or a wrong value; with every error.
    """
    found = options_class(name)
    try:
        return found.model_validate(options)
    except ValidationError as error:
        raise UserError("; ".join(describe(item, found, {}, name) for item in error.errors())) from None


class MethodConfig(Section):
    """One distillation method: its name, its weight over time, and its own options."""

    name: str = Field(description="`detdistill methods` lists them")
    weight: float | Literal["auto"] | None = Field(
        None,
        description="outer weight; 0 trains the plain student, bit for bit; `auto` follows gradient norms. "
        "None: 1, for a query-based student `auto`",
    )
    ratio: float | None = Field(
        None,
        gt=0,
        description="`weight: auto`: the method's gradient over the task's, at the student's pyramid. "
        "None: 10, for a query-based student 0.3",
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of the run over which the weight rises from 0")
    decay_from: float | None = Field(
        None, ge=0, lt=1, description="fraction of the run from which the weight falls to 0 at the end"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="the method's own; `detdistill methods NAME` lists them"
    )

    @field_validator("name")
    @classmethod
    def _known_name(cls, value: str) -> str:
        try:
            options_class(value)
        except UserError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("weight", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        if value is not None and not is_number and value != "auto":
            raise ValueError(f"give a number of at least 0, or auto; got {value!r}")
        return value

    @field_validator("options")
    @classmethod
    def _of_its_method(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("name")  # missing where it is wrong itself
        return value if name is None else options_class(name).model_validate(value).given


def method_config(item: Any) -> MethodConfig:
    """A method as in a recipe, in any of its forms.

    Raises:
        UserError: with every error.
    """
    if isinstance(item, MethodConfig):
        return item
    full = expand_method(item)
    name = full.get("name", "methods") if isinstance(full, Mapping) else "methods"
    try:
        return MethodConfig.model_validate(full)
    except ValidationError as error:
        found = [
            {**e, "loc": e["loc"][1:] if e["loc"][:1] == ("options",) else e["loc"]} for e in error.errors()
        ]
        raise UserError("; ".join(describe(item, MethodConfig, {}, str(name)) for item in found)) from None


# --- the methods -----------------------------------------------------------------------------------------

_ROOM = "detdistill.distillation.methods"


class MaskOptions(OptionGroup):
    """Eq. 2-3: frequencies of the student's map that a random mask removes."""

    name = "ima's mask"

    domain: Literal["fft", "dct", "spatial", "none"] = Field(
        "fft", description="where it acts: `fft` (the equations), `dct`, `spatial` (the prose), `none`"
    )
    ratio: ShareBelow1 = Field(
        0.5, description="ζ, the share of frequencies or cells removed; the paper gives no value"
    )
    sharing: Literal["sample", "batch", "element"] = Field(
        "sample", description="one mask per instance, per batch, or per channel of each instance (`element`)"
    )
    hermitian: Switch = Field(
        True,
        description="symmetric in `fft`, so that the filtered map is real. Without it Eq. 3 is complex and its "
        "real part is taken, whose best student is 2/(2-ζ) times the teacher",
    )
    keep_dc: Switch = Field(
        False, description="never remove the zero frequency; useful only without standardization"
    )
    teacher: Switch = Field(False, description="filter the teacher's map with the same mask")


class StandardizeOptions(OptionGroup):
    """Eq. 5-7: zero mean and unit variance for each channel of each instance."""

    name = "ima's standardize"

    student: Switch = Field(True, description="of the student's map")
    teacher: Switch = Field(
        True,
        description="of the teacher's map: not in Eq. 5-7 but in Eq. 14-15; without it a teacher of small "
        "variance drives the student away from itself",
    )
    stats: Literal["instance", "batch"] = Field(
        "instance", description="statistics over H·W of an instance (Eq. 5-6), or over N·H·W (as PKD)"
    )
    eps: Factor = Field(1e-5, description="added to the variance")


class ImportanceOptions(OptionGroup):
    """Eq. 8-10: γ, by which an instance counts as much as it is similar to the teacher's."""

    name = "ima's importance"

    kind: Literal["cosine", "shifted", "none"] = Field(
        "cosine", description="γ: the cosine, (1 + cosine)/2 (`shifted`), or 1 (`none`)"
    )
    source: Literal["raw", "masked", "standardized"] = Field(
        "standardized", description="the maps of Eq. 8; `standardized` are those of the distance"
    )
    gamma_min: Annotated[float, Field(strict=True, le=1)] | None = Field(
        0.1, description="γ is clamped to [gamma_min, 1]; null leaves it as it is, and it may be negative"
    )
    detach: Switch = Field(True, description="γ is a weight, without gradient, not a way to lower the loss")
    target: Literal["student", "both"] = Field(
        "student", description="the maps that γ scales; `student` is Eq. 10"
    )


_IMA_0_1: Mapping[str, tuple[str, str]] = {
    "domain": ("mask", "domain"),
    "mask_ratio": ("mask", "ratio"),
    "mask_sharing": ("mask", "sharing"),
    "hermitian": ("mask", "hermitian"),
    "keep_dc": ("mask", "keep_dc"),
    "mask_teacher": ("mask", "teacher"),
    "standardize_student": ("standardize", "student"),
    "standardize_teacher": ("standardize", "teacher"),
    "stats": ("standardize", "stats"),
    "eps": ("standardize", "eps"),
    "importance": ("importance", "kind"),
    "importance_source": ("importance", "source"),
    "gamma_min": ("importance", "gamma_min"),
    "detach_importance": ("importance", "detach"),
    "scale_target": ("importance", "target"),
}
"""Version 0.1 had these in one flat list, and ``loss_weight``, a second factor next to ``alpha``."""


@register("ima", f"{_ROOM}.ima:IMA")
class IMAOptions(MethodOptions):
    """IMA, Instance Mask Alignment."""

    tasks = EVERY_TASK
    presets: ClassVar[Presets] = {
        "recommended": {"mask": {"ratio": 0.0}, "alpha": 100.0},
        "paper": {},
        "segmentation": {"mask": {"ratio": 0.0}, "alpha": 100.0, "instance": "class_region"},
        "literal": {
            "mask": {"hermitian": False},
            "standardize": {"teacher": False},
            "importance": {"source": "raw", "gamma_min": None, "detach": False},
        },
    }
    """"recommended" is what measured best (docs/ima.md), "paper" the defaults, Eq. 2-10 where they are stable,
    "segmentation" the recommended one with an importance for each class's region (as the paper has it; measured
    on CamVid, docs/results.md), "literal" Eq. 2-10 to the letter."""

    adapt: Adapt = Field("auto", description=_ADAPT)
    mask: MaskOptions = Field(MaskOptions(), description="frequencies removed at random (Eq. 2-3)")
    standardize: StandardizeOptions = Field(
        StandardizeOptions(), description="instance standardization (Eq. 5-7)"
    )
    importance: ImportanceOptions = Field(
        ImportanceOptions(), description="adaptive scale deflation (Eq. 8-10)"
    )
    distance: Literal["mse", "l1"] = Field("mse", description="`mse` is the paper's L2 (Eq. 4)")
    alpha: Factor = Field(10.0, description="factor on the loss; the paper's")
    instance: Literal["image", "box", "class_region"] = Field(
        "image",
        description="`image` (Eq. 1), `box` (each box pooled from both maps), or `class_region` (γ for each "
        "class's region; the paper's segmentation)",
    )
    region_stats: Switch = Field(
        False,
        description="with `class_region`, standardize within each region too; this deletes the class mean",
    )
    min_pixels: CountOr0 = Field(4, description="maps smaller than this carry no signal and count 0")
    min_region: CountOr0 = Field(16, description="with `class_region`, regions of fewer pixels do not count")

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        changed: dict[str, Any] = {}
        old = [key for key in _IMA_0_1 if key in options]
        if isinstance(options.get("importance"), Mapping | ImportanceOptions):
            old.remove("importance")
        for key in old:
            group, option = _IMA_0_1[key]
            changed.setdefault(group, {})[option] = options[key]
        factor = options.get("loss_weight")
        if isinstance(factor, float | int):
            old.append("loss_weight")
            preset = cls.presets.get(str(options.get("preset") or "recommended"), {})
            alpha = options.get("alpha", preset.get("alpha", cls.model_fields["alpha"].default))
            if factor != 1 and isinstance(alpha, float | int):
                changed["alpha"] = alpha * factor
        if not old:
            return options
        spelled = yaml.safe_dump(changed, default_flow_style=True, width=1000).strip()
        what = f"write {spelled}" if changed else "leave it out"
        is_are = "is" if len(old) == 1 else "are"
        warnings.warn(f"ima: {', '.join(old)} {is_are} deprecated: {what}", FutureWarning, stacklevel=2)
        new = {key: value for key, value in options.items() if key not in old}
        return merge(changed, new | {key: changed[key] for key in changed if key == "alpha"})


@register("mimic", f"{_ROOM}.mimic:Mimic")
class MimicOptions(MethodOptions):
    """Mean squared error of features."""

    tasks = EVERY_TASK

    adapt: Adapt = Field("auto", description=_ADAPT)
    alpha: Factor = Field(1.0, description="factor on the loss")


@register("adversarial", f"{_ROOM}.adversarial:Adversarial")
class AdversarialOptions(MethodOptions):
    """The holistic term of SKDS (Liu et al., CVPR 2019)."""

    tasks = SEGMENTATION
    presets: ClassVar[Presets] = {
        "segmentation": {"alpha": 0.1, "discriminator_weight": 0.004, "kind": "wgan-gp"},
        "cirkd": {"alpha": 0.001, "discriminator_weight": 0.1, "kind": "hinge"},
    }

    alpha: Factor = Field(0.1, description="factor on the student's loss")
    discriminator_weight: Factor = Field(0.004, description="factor on the discriminator's loss")
    kind: Literal["wgan-gp", "hinge"] = Field("wgan-gp", description="the discriminator's loss")
    gradient_penalty: Factor = Field(
        10.0, description="factor on the penalty of `wgan-gp`; 0: it is not computed"
    )


@register("at", f"{_ROOM}.at:AT")
class ATOptions(MethodOptions):
    """AT (Zagoruyko and Komodakis, ICLR 2017)."""

    tasks = EVERY_TASK

    alpha: Factor = Field(10000.0, description="factor on the loss")


@register("cirkd", f"{_ROOM}.cirkd:CIRKD")
class CIRKDOptions(MethodOptions):
    """CIRKD (Yang et al., CVPR 2022)."""

    tasks = SEGMENTATION
    needs_labels = True

    cells: Count = Field(2048, description="most pixels of an image in the batch term")
    anchors: Count = Field(4096, description="most pixels of a batch in the memory terms")
    pixel_places: Count = Field(20000, description="length of the pixels' queue of a class")
    region_places: Count = Field(2000, description="length of the regions' queue of a class")
    pixel_contrasts: Count = Field(4096, description="V of the pixels, over all classes")
    region_contrasts: Count = Field(1024, description="V of the regions, over all classes")
    batch_weight: Factor = Field(1.0, description="factor on the batch term; 0: it is not computed")
    pixel_weight: Factor = Field(0.1, description="factor on the pixels' memory term; 0: it is not computed")
    region_weight: Factor = Field(0.1, description="factor on the regions' memory term; 0: it is not computed")
    temperature: Temperature = Field(0.1, description="τ, of the cosines")


@register("cofd", f"{_ROOM}.cofd:COFD")
class COFDOptions(MethodOptions):
    """COFD (Heo et al., ICCV 2019)."""

    tasks = EVERY_TASK
    presets: ClassVar[Presets] = {"cifar": {"alpha": 1e-3}, "segmentation": {"alpha": 1e-5 / 16}}

    adapt: Adapt = Field("always", description="where a 1×1 convolution with BatchNorm is put between the maps")
    alpha: Factor = Field(1e-4, description="factor on the loss")


@register("crosskd", f"{_ROOM}.crosskd:CrossKD")
class CrossKDOptions(MethodOptions):
    """CrossKD (Wang et al., CVPR 2024)."""

    needs_labels = True
    presets: ClassVar[Presets] = {
        "anchor": {},
        "anchor_free": {
            "cls_weight": 0.4, "box_weight": 0.75, "box_loss": "iou", "normalize": "centerness",
        },
        "gfl": {"box_weight": 4.0},
    }  # fmt: skip

    depth: Count | None = Field(
        None,
        description="block of the teacher's towers at which the student comes in, from 1; null: three quarters "
        "of them where the teacher has anchors, else half of them (3 and 2 of 4, as published)",
    )
    align_scale: Switch = Field(
        True, description="bring the student's maps to the scale of the teacher's; off: as they are"
    )
    normalize: Literal["positives", "centerness"] = Field(
        "positives",
        description="n: the number of matched anchors (at least 1 for each image) or their summed centerness",
    )
    cls_weight: Factor = Field(1.0, description="factor on the classes' term")
    box_weight: Factor = Field(1.0, description="factor on the boxes' term")
    beta: Annotated[float, Field(strict=True, ge=1)] = Field(
        1.0, description="sharpness of the weight on classes; below 1 its slope would be infinite at equality"
    )
    box_loss: Literal["giou", "iou"] = Field("giou", description="1 - GIoU or -log IoU of decoded boxes")
    temperature: Temperature = Field(
        1.0, description="of distributions of box sides, with the factor temperature²"
    )

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        if "normalise" not in options:
            return options
        warnings.warn("crosskd: normalise is deprecated: write normalize", FutureWarning, stacklevel=2)
        return {"normalize" if key == "normalise" else key: value for key, value in options.items()}


@register("cwd", f"{_ROOM}.cwd:CWD")
class CWDOptions(MethodOptions):
    """CWD (Shu et al., ICCV 2021)."""

    tasks = EVERY_TASK
    presets: ClassVar[Presets] = {
        "retinanet_x101": {"alpha": 5.0, "tau": 1.0, "finest": 4},
        "segmentation": {"alpha": 50.0, "tau": 4.0, "logits_alpha": 3.0},
    }

    adapt: Adapt = Field("auto", description=_ADAPT)
    logits_alpha: Factor = Field(
        0.0, description="factor on the class logits' term of segmenters; 0: no such term"
    )
    alpha: Factor = Field(10.0, description="factor on the features' term")
    tau: Temperature = Field(1.0, description="temperature τ; high values let more cells count")


@register("defeat", f"{_ROOM}.defeat:DeFeat")
class DeFeatOptions(MethodOptions):
    """DeFeat (Guo et al., CVPR 2021). Preset "head" adds the term of two-stage pairs' regions."""

    needs_labels = True
    presets: ClassVar[Presets] = {"head": {"head_object_weight": 2.0, "head_background_weight": 2.0}}

    adapt: Adapt = Field("always", description=_ADAPT_3X3)
    regions: Literal["student", "teacher", "both"] = Field(
        "student", description="whose sample of regions the head's term is about"
    )
    object_weight: Factor = Field(3.0, description="w_o, of the neck's term on objects")
    background_weight: Factor = Field(12.0, description="w_b, of the neck's term on background")
    head_object_weight: Factor = Field(0.0, description="h_o, of the regions' term on objects")
    head_background_weight: Factor = Field(
        0.0, description="h_b, of the regions' term on background; with both at 0: no such term"
    )


@register("dist", f"{_ROOM}.dist:DIST")
class DISTOptions(MethodOptions):
    """DIST (Huang et al., NeurIPS 2022)."""

    tasks = EVERY_TASK
    presets: ClassVar[Presets] = {
        "anchor": {"scores": "sigmoid"},
        "anchor_free": {"scores": "sigmoid"},
        "two_stage": {"scores": "softmax"},
        "segmentation": {"scores": "softmax"},
    }

    inter_weight: Factor = Field(1.0, description="β, factor on the relations between classes")
    intra_weight: Factor = Field(1.0, description="γ, factor on the relations between rows")
    temperature: Temperature = Field(1.0, description="τ, of the scores")
    scores: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="`sigmoid` for logits of independent classes, `softmax` for those of one choice"
    )


@register("fgd", f"{_ROOM}.fgd:FGD")
class FGDOptions(MethodOptions):
    """FGD (Yang et al., CVPR 2022). Presets "reppoints" and "yolox" are the code's for those detectors."""

    needs_labels = True
    presets: ClassVar[Presets] = {
        "anchor": {
            "foreground_weight": 1e-3,
            "background_weight": 5e-4,
            "attention_weight": 5e-4,
            "relation_weight": 5e-6,
            "tau": 0.5,
        },
        "anchor_free": {
            "foreground_weight": 1.6e-3,
            "background_weight": 8e-4,
            "attention_weight": 8e-4,
            "relation_weight": 8e-6,
            "tau": 0.8,
        },
        "two_stage": {
            "foreground_weight": 5e-5,
            "background_weight": 2.5e-5,
            "attention_weight": 5e-5,
            "relation_weight": 5e-7,
            "tau": 0.5,
            "finest": 4,
        },
        "reppoints": {
            "foreground_weight": 1.6e-3,
            "background_weight": 8e-4,
            "attention_weight": 8e-4,
            "relation_weight": 8e-6,
            "tau": 0.5,
        },
        "yolox": {
            "foreground_weight": 2e-3,
            "background_weight": 1e-3,
            "attention_weight": 1e-3,
            "relation_weight": 1e-5,
            "tau": 0.5,
        },
    }

    adapt: Adapt = Field("auto", description=_ADAPT)
    unit: Switch = Field(
        True,
        description="divide maps by the size of the teacher's, so that the weights mean the same for any "
        "teacher (docs/methods.md); off: raw maps, as published",
    )
    foreground_weight: Factor = Field(1e-3, description="α, of the features on objects")
    background_weight: Factor = Field(5e-4, description="β, of the features off objects")
    attention_weight: Factor = Field(5e-4, description="γ, of the attention maps")
    relation_weight: Factor = Field(
        5e-6, description="λ, of the maps with their global context; 0: no context blocks are made"
    )
    tau: Temperature = Field(0.5, description="temperature of the attention")


@register("fgfi", f"{_ROOM}.fgfi:FGFI")
class FGFIOptions(MethodOptions):
    """FGFI (Wang et al., CVPR 2019)."""

    needs_labels = True

    adapt: Adapt = Field("always", description=_ADAPT_3X3)
    psi: ShareBelow1 = Field(
        0.5,
        description="ψ, share of an object's best overlap that an anchor must exceed to be near; higher: fewer "
        "cells",
    )
    alpha: Factor = Field(0.01, description="factor on the loss (λ in the paper)")


_FKD_ONE_STAGE = {
    "feature_weight": 4.2e-4,
    "pooled_weight": 2.4e-2,
    "relation_weight": 4.2e-4,
    "tau": 0.1,
    "channel_mask": True,
}


@register("fkd", f"{_ROOM}.fkd:FKD")
class FKDOptions(MethodOptions):
    """FKD (Zhang and Ma, ICLR 2021). Preset "mean" is for reduction "mean"; its weights are ours."""

    tasks = EVERY_TASK
    presets: ClassVar[Presets] = {
        "anchor": _FKD_ONE_STAGE,
        "anchor_free": _FKD_ONE_STAGE,
        "two_stage": {
            "feature_weight": 7e-5,
            "pooled_weight": 4e-3,
            "relation_weight": 7e-5,
            "tau": 0.5,
            "channel_mask": False,
        },
        "mean": {
            "reduction": "mean",
            "feature_weight": 1.0,
            "pooled_weight": 1.0,
            "relation_weight": 1.0,
            "tau": 0.5,
        },
    }

    adapt: Adapt = Field("always", description=f"{_ADAPT}; published: everywhere")
    feature_weight: Factor = Field(4.2e-4, description="a, of the masked features")
    pooled_weight: Factor = Field(2.4e-2, description="b, of the channels' and the pixels' means")
    relation_weight: Factor = Field(4.2e-4, description="c, of the non-local maps; 0: no such blocks are made")
    tau: Temperature = Field(0.1, description="temperature of the attention")
    channel_mask: Switch = Field(True, description="attention weighs channels too")
    reduction: Literal["paper", "mean"] = Field("paper", description="`paper`, a norm, or a mean square")


@register("frs", f"{_ROOM}.frs:FRS")
class FRSOptions(MethodOptions):
    """FRS (Du et al., NeurIPS 2021). Preset "gfl" is for detectors with a quality focal loss."""

    presets: ClassVar[Presets] = {
        "anchor": {"feature_weight": 0.005, "cls_weight": 0.02},
        "anchor_free": {"feature_weight": 0.01, "cls_weight": 0.05},
        "two_stage": {"feature_weight": 0.002, "cls_weight": 0.1},
        "gfl": {"feature_weight": 0.1, "cls_weight": 0.05},
    }

    adapt: Adapt = Field("always", description=_ADAPT_3X3)
    feature_weight: Factor = Field(0.005, description="factor on the features' term")
    cls_weight: Factor = Field(0.02, description="factor on the scores' term; 0 leaves it out")


@register("gid", f"{_ROOM}.gid:GID")
class GIDOptions(MethodOptions):
    """GID (Dai et al., CVPR 2021)."""

    presets: ClassVar[Presets] = {"anchor": {}, "anchor_free": {}}  # RetinaNet's for both

    adapt: Adapt = Field("auto", description=f"{_ADAPT_3X3}; levels of equal widths share it")
    instances: Count = Field(10, description="most instances chosen from each image")
    min_side: Number = Field(10.0, description="least side of an instance's box, in network input pixels")
    feature_weight: Factor = Field(5e-4, description="factor on the features' term")
    relation_weight: Factor = Field(40.0, description="factor on the relations' term")
    cls_weight: Factor = Field(0.1, description="factor on the classes' term")
    box_weight: Factor = Field(1.0, description="factor on the boxes' term")
    box_beta: Factor = Field(0.0, description="where the smooth L1 of encoded boxes turns into a line; 0 is L1")


@register("ifvd", f"{_ROOM}.ifvd:IFVD")
class IFVDOptions(MethodOptions):
    """IFVD (Wang et al., ECCV 2020)."""

    tasks = SEGMENTATION
    needs_labels = True
    presets: ClassVar[Presets] = {"segmentation": {"alpha": 200.0}, "cirkd": {"alpha": 20.0}}

    alpha: Factor = Field(200.0, description="factor on the loss")


@register("kd", f"{_ROOM}.kd:KD")
class KDOptions(MethodOptions):
    """KD (Hinton et al. 2015) of class scores and boxes."""

    tasks = EVERY_TASK
    # Box sides of FCOS and GFL are in strides, about four times as large as an anchor's deltas.
    presets: ClassVar[Presets] = {
        "anchor": {"box_weight": 1.0},
        "anchor_free": {"box_weight": 0.25},
        "two_stage": {"box_weight": 1.0},
        "gfl": {"box_weight": 0.25},
    }

    cls_weight: Factor = Field(1.0, description="factor on the classes' term; 0: it is not computed")
    box_weight: Factor = Field(1.0, description="factor on the boxes' term; 0: it is not computed")
    temperature: Temperature = Field(1.0, description="τ; above 1 it brings out what lies between the classes")


@register("ld", f"{_ROOM}.ld:LD")
class LDOptions(MethodOptions):
    """LD (Zheng et al., CVPR 2022)."""

    needs_labels = True
    presets: ClassVar[Presets] = {"anchor": {}, "anchor_free": {"region": "inside"}}

    region: Literal["vlr", "inside"] = Field(
        "vlr", description="where VLR LD acts: `vlr`, or `inside` an object, positive cells left out (FCOS)"
    )
    alpha: Share = Field(0.25, description="the region's lower end over its upper end")
    topk: Count = Field(9, description="anchors of a level whose IoU makes the threshold")
    main_weight: Factor = Field(0.25, description="factor on main LD")
    vlr_weight: Factor = Field(0.25, description="factor on VLR LD")
    kd_weight: Factor = Field(10.0, description="factor on main KD")
    temperature: Temperature = Field(10.0, description="of the distributions of box sides")
    kd_temperature: Temperature = Field(2.0, description="of the classes")


@register("maskd", f"{_ROOM}.maskd:MasKD")
class MasKDOptions(MethodOptions):
    """MasKD (Huang et al., ICLR 2023)."""

    tasks = EVERY_TASK
    needs_labels = True
    presets: ClassVar[Presets] = {
        "anchor": {"alpha": 7.0, "student_masks_from": 0.04},
        "anchor_free": {"alpha": 10.0, "student_masks_from": 0.028},
        "two_stage": {"alpha": 1.0, "student_masks_from": 0.042},
        "retinanet_x101": {"alpha": 7.0, "student_masks_from": 0.048},
        "segmentation": {"alpha": 0.5, "tokens": 8, "token_shares": False, "student_masks_from": 1.0},
    }

    adapt: Adapt = Field("always", description=f"{_ADAPT}; published: everywhere")
    tokens: Count = Field(6, description="m, of each level")
    token_shares: Switch = Field(
        True, description="tokens count by p; off: by 1 in the masked map and by 1/m in L"
    )
    token_fraction: Share = Field(0.2, description="share of training in which the tokens learn; 1: always")
    student_masks_from: Share = Field(
        0.04, description="share of training from which the student's masks count too; 1: never"
    )
    alpha: Factor = Field(10.0, description="factor on the loss")


@register("mgd", f"{_ROOM}.mgd:MGD")
class MGDOptions(MethodOptions):
    """MGD (Yang et al., ECCV 2022)."""

    tasks = EVERY_TASK
    presets: ClassVar[Presets] = {
        "anchor": {"alpha": 2e-5, "mask_ratio": 0.65},
        "anchor_free": {"alpha": 2e-5, "mask_ratio": 0.65},
        "two_stage": {"alpha": 5e-7, "mask_ratio": 0.45, "finest": 4},
        "segmentation": {"alpha": 2e-5, "mask_ratio": 0.75},
    }

    adapt: Adapt = Field("auto", description=_ADAPT)
    mask_ratio: ShareBelow1 = Field(
        0.65, description="probability that a cell of the student's map is put to 0"
    )
    unit: Switch = Field(
        True,
        description="divide maps by the size of the teacher's, so that α means the same for any teacher "
        "(docs/methods.md); off: raw maps, as published",
    )
    alpha: Factor = Field(2e-5, description="factor on the loss")


@register("pkd", f"{_ROOM}.pkd:PKD")
class PKDOptions(MethodOptions):
    """PKD (Cao et al., NeurIPS 2022)."""

    tasks = EVERY_TASK
    presets: ClassVar[Presets] = {
        "anchor": {"alpha": 10.0, "finest": 4},
        "anchor_free": {"alpha": 10.0, "finest": 4},
        "two_stage": {"alpha": 6.0, "finest": 4},
    }

    adapt: Adapt = Field("auto", description=_ADAPT)
    alpha: Factor = Field(10.0, description="factor on the loss")


_SCALEKD_ONE_STAGE = {"feature_weight": 0.01, "cls_weight": 0.2, "box_weight": 0.05}


@register("scalekd", f"{_ROOM}.scalekd:ScaleKD")
class ScaleKDOptions(MethodOptions):
    """ScaleKD (Zhu et al., CVPR 2023)."""

    needs_labels = True
    presets: ClassVar[Presets] = {
        "anchor": _SCALEKD_ONE_STAGE,
        "anchor_free": _SCALEKD_ONE_STAGE,
        "two_stage": {"feature_weight": 0.07, "cls_weight": 0.5, "box_weight": 0.2},
    }

    adapt: Adapt = Field("auto", description=f"{_ADAPT} of L_feat")
    imitate_from: Share = Field(
        1 / 3,
        description="share of training from which the student follows the assistant's predictions; always "
        "where the length of training is unknown",
    )
    feature_weight: Factor = Field(0.01, description="factor on the features' term")
    cls_weight: Factor = Field(0.2, description="factor on the classes' term; 0: it is not computed")
    box_weight: Factor = Field(0.05, description="factor on the boxes' term; 0: it is not computed")
    temperature: Temperature = Field(1.0, description="τ, of the classes and of distributions of box sides")


@register("skd", f"{_ROOM}.skd:SKD")
class SKDOptions(MethodOptions):
    """SKD (de Rijk et al., NeurIPS 2022)."""

    tasks = EVERY_TASK

    adapt: Adapt = Field("auto", description=_ADAPT)
    alpha: Factor = Field(4.0, description="factor on the loss, the paper's λ")


@register("skds", f"{_ROOM}.skds:SKDS")
class SKDSOptions(MethodOptions):
    """SKDS (Liu et al., CVPR 2019)."""

    tasks = SEGMENTATION
    presets: ClassVar[Presets] = {
        "segmentation": {"pixel_weight": 80.0, "pair_weight": 0.5, "grid": 2},
        "cirkd": {"pixel_weight": 1.0, "pair_weight": 10.0, "grid": 0, "pool": 2},
    }

    pixel_weight: Factor = Field(80.0, description="factor on the pixels' term; 0: it is not computed")
    pair_weight: Factor = Field(0.5, description="factor on the pairs' term; 0: it is not computed")
    grid: CountOr0 = Field(
        2, description="cells on each side of the map between which pairs are made; 0: max-pooling by `pool`"
    )
    pool: Count = Field(2, description="side of the pooled windows, where `grid` is 0")


# --- as a table ------------------------------------------------------------------------------------------


def option_table(of: type[MethodOptions]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows that say a method's options: type, default, and what each preset gives instead."""
    rows = [
        [
            ".".join(at),
            _type_name(field.annotation),
            "" if field.default is None else str(field.default),
            *(_value(preset, at) for preset in of.presets.values()),
        ]
        for at, field in _fields(of)
    ]
    return ["option", "type", "default", *of.presets], rows


def descriptions(of: type[MethodOptions]) -> list[tuple[str, str]]:
    """A method's options, and what each is."""
    return [(".".join(at), field.description or "") for at, field in _fields(of)]


def _fields(of: type[OptionGroup]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """The options with those of groups, the method's own before those of every method."""
    common = MethodOptions.model_fields
    for name, field in sorted(of.model_fields.items(), key=lambda item: item[0] in common):
        groups = [group for group in sections_in(field.annotation) if issubclass(group, OptionGroup)]
        if not groups:
            yield (name,), field
        for group in groups:
            for at, inner in _fields(group):
                yield (name, *at), inner


def _value(preset: Mapping[str, Any], at: tuple[str, ...]) -> str:
    value: Any = preset
    for key in at:
        if not isinstance(value, Mapping) or key not in value:
            return ""
        value = value[key]
    return str(value)


def _type_name(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(inside[0])
    if origin is tuple:
        return f"list of {_type_name(inside[0])}"
    if origin is Literal:
        return " | ".join(inside)
    if inside:
        return " | ".join(map(_type_name, inside))
    return "null" if annotation is NoneType else str(annotation.__name__)


def _docstring(module: str) -> str | None:
    if module in sys.modules:
        return sys.modules[module].__doc__
    try:
        found = find_spec(module)
        source = getattr(found.loader, "get_source", lambda name: None)(module) if found is not None else None
    except ImportError:
        return None
    return None if source is None else ast.get_docstring(ast.parse(source))
