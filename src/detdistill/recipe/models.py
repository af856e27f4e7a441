"""A recipe's model sections: one class for each family, with its options, its defaults and what builds it.

Nothing here imports torch: a wrong recipe is refused at once. Another package brings families by the entry
point group ``detdistill.models``, each a subclass of :class:`ModelConfig`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from detdistill.errors import UserError, nearest
from detdistill.recipe.reading import describe
from detdistill.recipe.sections import (
    COARSEST_STRIDE,
    LONGEST_SIDE,
    MOST_DETECTIONS,
    Section,
    errors,
    fault,
    refuse_unknown_keys,
    unknown_key,
    with_home,
)

if TYPE_CHECKING:
    from detdistill.models.base import Model

logger = logging.getLogger(__name__)

GROUP = "detdistill.models"
DEFAULT_FAMILY = "retinanet"
WEIGHTS_OF_A_LIBRARY = "torchvision"

Task = Literal["detection", "segmentation"]
"""What a model is for: what its targets hold, and by what number it is measured."""


def _two_sides(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _short_long(value: tuple[int, int]) -> tuple[int, int]:
    if not 0 < value[0] <= value[1] <= LONGEST_SIDE:
        raise ValueError(
            f"give (short, long) side in pixels, at most {LONGEST_SIDE}, as [480, 800]; got {list(value)}"
        )
    return value


def _double(value: tuple[int, ...]) -> tuple[int, ...]:
    if value[:1] not in ((2,), (4,), (8,), (16,), (32,)) or any(b != 2 * a for a, b in pairwise(value)):
        raise ValueError(
            "strides begin at 2, 4, 8, 16 or 32 and double from level to level, as 8, 16, 32; got "
            f"{list(value)[:20]}"
        )
    if value[-1] > COARSEST_STRIDE:
        raise ValueError(f"strides end at {COARSEST_STRIDE} at most; got {list(value)[:20]}")
    return value


def _sliding(value: tuple[int, int]) -> tuple[int, int]:
    if not 0 < value[1] <= value[0]:
        raise ValueError(f"give (side, stride) in pixels, the stride no larger; got {list(value)}")
    return value


Convention = Literal["torchvision", "mmdet", "mmdet_tricks"]
"""Where these libraries differ, whose way a family takes (docs/mmdet.md); ``mmdet_tricks`` is FCOS's alone."""

_WAY = Field(description="where these libraries differ, whose way is taken: docs/mmdet.md")
TwoWays = Annotated[Literal["torchvision", "mmdet"], _WAY]
StrideIn1x1 = Annotated[bool, Field(description="ResNet with the strides where Caffe's models have them")]
Size = Annotated[tuple[int, int], BeforeValidator(_two_sides), AfterValidator(_short_long)]
Strides = Annotated[tuple[int, ...], AfterValidator(_double)]
Window = Annotated[tuple[int, int], AfterValidator(_sliding)]


class ModelConfig(Section):
    """What the sections of all families have. Validating this class picks the one of the section's family.

    A section that names a weights file and no family is a :class:`SavedModelConfig`: the file says the rest.
    A family's class gives ``family`` a literal of its name and says in ``target`` what builds it.
    """

    target: ClassVar[str]
    """``module:function``, imported when a model is built: called with the section and the class names."""
    task: ClassVar[Task] = "detection"
    learns_masks: ClassVar[bool] = False

    family: str = Field(DEFAULT_FAMILY, description="kind of model; `detdistill models` lists them")
    weights: str | None = Field(
        None, description="the whole model: a run folder, a .safetensors or .pt file, or `torchvision`"
    )
    size: Size | None = Field(
        None, description="(short, long) side of the input; none: as it comes, for DETRs 640×640"
    )
    keep_ratio: bool | None = Field(
        None, description="false: images are stretched to `size`; by default true, for DETRs false"
    )

    _expand = field_validator("weights")(with_home)

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_family(cls, value: Any, handler: ModelWrapValidatorHandler[ModelConfig]) -> ModelConfig:
        if isinstance(value, ModelConfig) and isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            return handler(value)
        if cls is ModelConfig:
            return _config_class(value).model_validate(value)
        value = _upgraded(value, cls)
        if cls.model_config.get("extra") == "forbid":
            refuse_unknown_keys(cls, value, cls.model_fields["family"].default)
        return handler(value)

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if cls is ModelConfig and options:
            raise TypeError("ModelConfig is of no family: call model_config(...), or a family's class")
        return super().__new__(cls)

    @property
    def given(self) -> dict[str, Any]:
        """What the section says itself, without defaults."""
        names = [*type(self).model_fields, *(self.__pydantic_extra__ or ())]
        return {name: getattr(self, name) for name in names if name in self.model_fields_set}

    def build(self, classes: int | Sequence[str]) -> Model:
        """The model that this section describes, with its weights; as :func:`detdistill.build_model`."""
        model: Model = import_module("detdistill.models.build").build_model(self, classes)
        return model

    def network(self, classes: Sequence[str]) -> Model:
        """The model before any file is loaded into it.

        Raises:
            UserError: what cannot be built: an unknown backbone, a stride that it does not offer, and the like.
        """
        module, _, function = self.target.partition(":")
        model: Model = getattr(import_module(module), function)(self, tuple(classes))
        model.config = self
        own = model.preprocessor
        model.preprocessor = replace(
            own,
            size=own.size if self.size is None else self.size,
            keep_ratio=own.keep_ratio if self.keep_ratio is None else self.keep_ratio,
        )
        return model


AnyModel = SerializeAsAny[ModelConfig]
"""A section of any family, as a field of a schema."""

FAMILIES: dict[str, type[ModelConfig]] = {}
"""Every family by its name in recipes; :func:`families` has those of installed packages, too."""


def register(config: type[ModelConfig]) -> type[ModelConfig]:
    """Make a family known by its section's class, as a decorator of it."""
    name = config.model_fields["family"].default
    if name in FAMILIES:
        raise ValueError(f"family {name!r} is registered twice")
    FAMILIES[name] = config
    return config


def families() -> Mapping[str, type[ModelConfig]]:
    """Every family by its name, with those of installed packages; one that fails to load is left out."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for entry in entry_points(group=GROUP):
            _load_plugin(entry)
    return FAMILIES


def _load_plugin(entry: EntryPoint) -> None:
    try:
        loaded = entry.load()
        name = loaded.model_fields["family"].default
        if name not in FAMILIES:
            register(loaded)
        elif FAMILIES[name] is not loaded:
            logger.warning("%s: family %r exists already; the package's is left out", entry.value, name)
    except Exception as error:  # it is not our code
        logger.warning("%s: family %r cannot be loaded (%r)", entry.value, entry.name, error)


_plugins_loaded = False


# --- what several families have --------------------------------------------------------------------------


class NetworkConfig(ModelConfig):
    """A model over a timm backbone."""

    backbone: str = Field("resnet50", description="any timm model that gives feature maps")
    backbone_weights: str | None = Field(
        None, description="`imagenet` (timm downloads them), a file of timm's layout, or none"
    )
    _expand_backbone = field_validator("backbone_weights")(with_home)

    channels: int = Field(256, gt=0, le=2**16, description="width of pyramid and head")
    norm: Literal["batch", "frozen"] = Field(
        "batch", description="backbone normalization; frozen for batches < 8"
    )
    freeze_stages: int = Field(0, ge=0, le=5, description="backbone stages, from the input, that do not learn")


class DetectorConfig(NetworkConfig):
    score_threshold: float = Field(0.05, ge=0, le=1, description="detections of a lower score are dropped")
    max_detections: int = Field(100, gt=0, le=MOST_DETECTIONS, description="detections kept of an image")


class SuppressingConfig(DetectorConfig):
    nms_threshold: float = Field(0.5, gt=0, le=1, description="of two boxes that overlap more, one is dropped")


class OneStageConfig(SuppressingConfig):
    strides: Strides = Field((8, 16, 32, 64, 128), description="pyramid levels")
    head_depth: int = Field(4, ge=0, le=100, description="convolutions in each head tower")
    topk_candidates: int = Field(1000, gt=0, le=10**5, description="candidates of a level before NMS")


class TwoStageConfig(SuppressingConfig):
    strides: Strides = Field((4, 8, 16, 32, 64), description="pyramid levels for proposals")
    head_depth: int = Field(1, ge=0, le=100, description="convolutions of the region proposal network")
    anchor_scale: float = Field(8.0, gt=0, le=1000, description="anchor side over its level's stride")
    convention: TwoWays = "torchvision"
    stride_in_1x1: StrideIn1x1 = False
    rpn_samples: int = Field(256, gt=0, le=10**6, description="anchors of an image that training samples")
    roi_samples: int = Field(512, gt=0, le=10**6, description="proposals of an image that training samples")


class DETRConfig(DetectorConfig):
    head_depth: int | None = Field(None, ge=1, le=100, description="decoder layers; default: by backbone")
    neck_width: float | None = Field(
        None, gt=0, le=16, description="width of the neck's blocks over `channels`; default: by backbone"
    )
    num_queries: int = Field(300, gt=0, le=10**5, description="objects that an image can have at most")
    num_denoising: int = Field(100, ge=0, le=10**5, description="noised objects that train the decoder")
    transformers: dict[str, Any] | None = Field(
        None, description="a transformers configuration; read from a checkpoint, not written by hand"
    )

    @model_serializer(mode="wrap")
    def _without_a_checkpoints_own(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        section: dict[str, Any] = serialize(self)
        if self.transformers is None:
            section.pop("transformers", None)
        return section


class SegmenterConfig(NetworkConfig):
    task: ClassVar[Task] = "segmentation"

    channels: int = Field(256, gt=0, le=2**16, description="width of the decoder")
    stride_in_1x1: StrideIn1x1 = False
    window: Window | None = Field(
        None, description="(side, stride) of the windows in which large images are evaluated"
    )


# --- the families ----------------------------------------------------------------------------------------


@register
class RetinaNetConfig(OneStageConfig):
    """RetinaNet (Lin et al. 2017)."""

    target = "detdistill.models.families.retinanet:build_retinanet"
    family: Literal["retinanet"] = "retinanet"
    anchor_scale: float = Field(4.0, gt=0, le=1000, description="smallest anchor side over its level's stride")
    convention: TwoWays = "torchvision"
    stride_in_1x1: StrideIn1x1 = False


@register
class FCOSConfig(OneStageConfig):
    """FCOS (Tian et al. 2019)."""

    target = "detdistill.models.families.fcos:build_fcos"
    family: Literal["fcos"] = "fcos"
    convention: Annotated[Convention, _WAY] = "torchvision"
    stride_in_1x1: StrideIn1x1 = False


@register
class GFLConfig(OneStageConfig):
    """Generalized Focal Loss (Li et al. 2020)."""

    target = "detdistill.models.families.gfl:build_gfl"
    family: Literal["gfl"] = "gfl"
    bins: int = Field(
        17, ge=2, le=1000, description="of a box side's distribution, one for each whole number of strides"
    )


@register
class RepPointsConfig(OneStageConfig):
    """RepPoints (Yang et al. 2019)."""

    target = "detdistill.models.families.reppoints:build_reppoints"
    family: Literal["reppoints"] = "reppoints"
    head_depth: int = Field(3, ge=0, le=100, description="convolutions in each head tower")


@register
class FasterRCNNConfig(TwoStageConfig):
    """Faster R-CNN with a feature pyramid (Ren et al. 2015, Lin et al. 2017)."""

    target = "detdistill.models.families.faster_rcnn:build_faster_rcnn"
    family: Literal["faster_rcnn"] = "faster_rcnn"


@register
class MaskRCNNConfig(TwoStageConfig):
    """Mask R-CNN (He et al. 2017)."""

    target = "detdistill.models.families.mask_rcnn:build_mask_rcnn"
    learns_masks = True
    family: Literal["mask_rcnn"] = "mask_rcnn"


@register
class CascadeRCNNConfig(TwoStageConfig):
    """Cascade R-CNN (Cai and Vasconcelos 2018)."""

    target = "detdistill.models.families.cascade_rcnn:build_cascade_rcnn"
    family: Literal["cascade_rcnn"] = "cascade_rcnn"


@register
class CascadeMaskRCNNConfig(TwoStageConfig):
    """Cascade Mask R-CNN (Cai and Vasconcelos 2019)."""

    target = "detdistill.models.families.cascade_rcnn:build_cascade_mask_rcnn"
    learns_masks = True
    family: Literal["cascade_mask_rcnn"] = "cascade_mask_rcnn"


@register
class RTDETRv2Config(DETRConfig):
    """RT-DETRv2 (Lv et al. 2024)."""

    target = "detdistill.models.families.detr_families:build_rtdetr_v2"
    family: Literal["rtdetr_v2"] = "rtdetr_v2"


@register
class DFINEConfig(DETRConfig):
    """D-FINE (Peng et al. 2024)."""

    target = "detdistill.models.families.detr_families:build_d_fine"
    family: Literal["d_fine"] = "d_fine"
    neck_depth: float | None = Field(
        None, gt=0, le=16, description="factor on the neck's number of convolutions; default: by backbone"
    )


@register
class PSPNetConfig(SegmenterConfig):
    """PSPNet (Zhao et al. 2017)."""

    target = "detdistill.models.families.segmentation:build_pspnet"
    family: Literal["pspnet"] = "pspnet"


@register
class DeepLabV3Config(SegmenterConfig):
    """DeepLabV3 (Chen et al. 2017)."""

    target = "detdistill.models.families.segmentation:build_deeplabv3"
    family: Literal["deeplabv3"] = "deeplabv3"


# --- sections without a family ---------------------------------------------------------------------------


class SavedModelConfig(ModelConfig):
    """A model whose weights file says its family, and every option that the section leaves out."""

    model_config = ConfigDict(extra="allow")

    family: Literal["saved"] = "saved"

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name, value in super().given.items() if name != "family"}

    @model_validator(mode="after")
    def _options_of_some_family(self) -> SavedModelConfig:
        options = self.given
        possible = [config for config in families().values() if options.keys() <= config.model_fields.keys()]
        if not possible:
            known = {key for config in families().values() for key in config.model_fields}
            unknown = [key for key in options if key not in known] or list(options)
            raise errors([unknown_key(key, "", options[key], known) for key in unknown])
        faults = [fault(config, options) for config in possible]
        if None not in faults:
            raise next(found for found in faults if found is not None)
        return self


class ObjectConfig(ModelConfig):
    """A Python object, in the recipe of its own run: what the object was."""

    family: Literal["object"] = "object"
    python: str

    @model_serializer(mode="wrap")
    def _description_alone(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"python": self.python}


def model_config(
    section: ModelConfig | Mapping[str, Any] | None = None, source: str = "the model", **options: Any
) -> ModelConfig:
    """A model section, validated by its family's class.

    Args:
        section: as in a recipe.
        source: how messages call it.
        options: over the section's own.

    Raises:
        UserError: with every error.
    """
    try:
        if section is None or options:
            section = {**(section.given if isinstance(section, ModelConfig) else section or {}), **options}
        return ModelConfig.model_validate(section)
    except ValidationError as error:
        found = [describe(item, ModelConfig, {}, source) for item in error.errors()]
        raise UserError("; ".join(found)) from None


def _config_class(section: Mapping[str, Any]) -> type[ModelConfig]:
    if section.get("python") is not None:
        return ObjectConfig
    family, weights = section.get("family"), section.get("weights")
    from_file = weights is not None and weights != WEIGHTS_OF_A_LIBRARY
    if family is None or (family == "saved" and from_file):
        return SavedModelConfig if from_file else FAMILIES[DEFAULT_FAMILY]
    if isinstance(family, str) and family in families():
        return families()[family]
    message = f"no family {str(family)[:60]!r}; {nearest(str(family), families())}"
    raise errors([(("family",), PydanticCustomError("family", "{message}", {"message": message}), family, {})])


_OPTIONS_OF_0_1: Mapping[str, Any] = {
    "backbone": "resnet50", "backbone_weights": None, "channels": 256, "head_depth": None, "strides": None,
    "anchor_scale": None, "convention": "torchvision", "stride_in_1x1": False, "norm": "batch",
    "freeze_stages": 0, "size": None, "keep_ratio": None, "score_threshold": 0.05, "nms_threshold": 0.5,
    "max_detections": 100, "window": None, "python": None,
}  # fmt: skip
"""Version 0.1 wrote all of these for every family, at these defaults where a family had no such option."""


def _upgraded(section: Mapping[str, Any], config: type[ModelConfig]) -> dict[str, Any]:
    """A section of version 0.1 as its family's class has it."""

    def is_left_over(key: str, value: Any) -> bool:
        if key not in _OPTIONS_OF_0_1:
            return False
        field = config.model_fields.get(key)
        if field is None:
            # Of a section without a family, what is said counts, even if it is the default.
            return value is None or (config is not SavedModelConfig and bool(value == _OPTIONS_OF_0_1[key]))
        return value is None and field.default is not None  # null was the family's own default

    return {key: value for key, value in section.items() if not is_left_over(key, value)}
