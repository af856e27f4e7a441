"""MMDetection's configs: read as literals, never executed, and compared with what our models compute."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detdistill.data.text import read_text
from detdistill.errors import UserError
from detdistill.models.families.cascade_rcnn import STAGES
from detdistill.models.layers.backbones import group_norm_of

Config = Mapping[str, Any]
Triple = tuple[float, float, float]

EXTRA_LEVELS = {"retinanet": "on_input", "fcos": "on_output", "gfl": "on_output", "reppoints": "on_input"}
"""From which map further levels are convolved; those of other families take every second cell."""

DENSE_STRIDES = [8, 16, 32, 64, 128]
COMMON: Mapping[str, Any] = {
    "backbone.dcn": (None, None),
    "backbone.plugins": (None, None),
    "backbone.deep_stem": (False, False),
    "backbone.avg_down": (False, False),
    "backbone.strides": ([1, 2, 2, 2], [1, 2, 2, 2]),
    "backbone.dilations": ([1, 1, 1, 1], [1, 1, 1, 1]),
    "neck.type": ("FPN", "FPN"),
    "neck.num_outs": (5, 5),
    "neck.no_norm_on_lateral": (False, False),
}
DENSE: Mapping[str, Any] = {
    "neck.start_level": (0, 1),
    "bbox_head.strides": (DENSE_STRIDES, DENSE_STRIDES),
    "bbox_head.point_strides": (DENSE_STRIDES, DENSE_STRIDES),
    "bbox_head.anchor_generator.strides": (DENSE_STRIDES, DENSE_STRIDES),
    "bbox_head.anchor_generator.center_offset": (0.0, 0.0),
    "neck.relu_before_extra_convs": (False, False),
}


def _pooling(part: str, side: int) -> dict[str, tuple[Any, Any]]:
    layer = f"roi_head.{part}_roi_extractor.roi_layer"
    return {
        f"roi_head.{part}_roi_extractor.type": ("SingleRoIExtractor", "SingleRoIExtractor"),
        f"roi_head.{part}_roi_extractor.finest_scale": (56, 56),
        f"{layer}.type": ("RoIAlign", "RoIAlign"),
        f"{layer}.output_size": (side, side),
        f"{layer}.sampling_ratio": (0, 0),
        f"{layer}.aligned": (True, True),
    }


ROIS: Mapping[str, Any] = {
    "neck.start_level": (0, 0),
    "rpn_head.type": ("RPNHead", "RPNHead"),
    "rpn_head.anchor_generator.scales": ([8], [8]),
    "rpn_head.anchor_generator.ratios": ([0.5, 1.0, 2.0], [0.5, 1.0, 2.0]),
    "rpn_head.anchor_generator.strides": ([4, 8, 16, 32, 64], [4, 8, 16, 32, 64]),
    "rpn_head.anchor_generator.center_offset": (0.0, 0.0),
    "rpn_head.bbox_coder.target_stds": ([1.0] * 4, [1.0] * 4),
    **_pooling("bbox", 7),
    "test_cfg.rpn.nms_pre": (1000, 1000),
    "test_cfg.rpn.max_per_img": (1000, 1000),
    "test_cfg.rpn.nms.iou_threshold": (0.7, 0.7),
}
ONE_HEAD: Mapping[str, Any] = {
    "roi_head.type": ("StandardRoIHead", "StandardRoIHead"),
    "roi_head.bbox_head.reg_class_agnostic": (False, False),
    "roi_head.bbox_head.bbox_coder.target_stds": ([0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2]),
}
CASCADE: Mapping[str, Any] = {
    "roi_head.type": ("CascadeRoIHead", "CascadeRoIHead"),
    **{
        f"roi_head.bbox_head.{i}.{key}": (value, value)
        for i, stage in enumerate(STAGES)
        for key, value in (("reg_class_agnostic", True), ("bbox_coder.target_stds", list(stage.box_stds)))
    },
}
EXPECTED: Mapping[str, Mapping[str, tuple[Any, Any]]] = {
    "retinanet": {
        **DENSE,
        "bbox_head.type": ("RetinaHead", "RetinaHead"),
        "bbox_head.anchor_generator.ratios": ([0.5, 1.0, 2.0], [0.5, 1.0, 2.0]),
        "bbox_head.anchor_generator.octave_base_scale": (4, 4),
        "bbox_head.anchor_generator.scales_per_octave": (3, 3),
        "bbox_head.bbox_coder.target_stds": ([1.0] * 4, [1.0] * 4),
    },
    "fcos": {
        **DENSE,
        "bbox_head.type": ("FCOSHead", "FCOSHead"),
        "bbox_head.dcn_on_last_conv": (False, False),
        "neck.relu_before_extra_convs": (False, True),
    },
    "gfl": {**DENSE, "bbox_head.anchor_generator.ratios": ([1.0], [1.0])},
    "reppoints": {
        **DENSE,
        "bbox_head.num_points": (9, 9),
        "bbox_head.use_grid_points": (False, False),
        "bbox_head.transform_method": ("moment", "moment"),
    },
    "faster_rcnn": {**ROIS, **ONE_HEAD},
    "mask_rcnn": {**ROIS, **ONE_HEAD, **_pooling("mask", 14)},
    "cascade_rcnn": {**ROIS, **CASCADE},
    "cascade_mask_rcnn": {**ROIS, **CASCADE, **_pooling("mask", 14)},
}
"""What a config must say, for our model to compute the same: where, MMDetection's default and our value."""


def read_config(path: Path) -> Config:
    """The config in a file, with all its bases written out.

    Raises:
        UserError: it cannot be read, or has no whole ``model``.
    """
    try:
        config = parse_config(read_text(path))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a config ({error})") from error
    if not _is_whole(config):
        raise UserError(f"{path}: has no whole `model`; give the config with all its bases written out")
    return config


def config_in(meta: Mapping[str, Any]) -> Config | None:
    """The config in a checkpoint's ``meta``; None where there is none that is whole."""
    text = meta.get("cfg", meta.get("config"))
    try:
        config = parse_config(text) if isinstance(text, str) else {}
    except SyntaxError:  # files of early 2020 hold several configs, one after the other
        return None
    return config if _is_whole(config) else None


def classes_in(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names in a checkpoint's ``meta``."""
    dataset = meta.get("dataset_meta")
    for place in (meta, dataset) if isinstance(dataset, Mapping) else (meta,):
        for key in ("CLASSES", "classes"):
            if isinstance(place.get(key), list | tuple):
                return tuple(str(name) for name in place[key])
    return None


def _is_whole(config: Config) -> bool:
    return all(value_at(config, f"model.{part}.type", None) for part in ("backbone", "neck"))


def parse_config(text: str) -> dict[str, Any]:
    """The assignments of a config in Python's syntax: literals, ``dict(...)`` and names; nothing is executed.

    An assignment of anything else is left out.

    Raises:
        SyntaxError: the text is no Python.
    """
    found: dict[str, Any] = {}
    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name):
            try:
                found[line.targets[0].id] = _value(line.value, found)
            except ValueError:
                continue
    return found


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, names) for item in items]
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left, names) / _value(right, names)
        case ast.Dict(keys=keys, values=values):
            read = [None if key is None else _value(key, names) for key in keys]
            pairs = list(zip(read, values, strict=True))
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            pairs = [(keyword.arg, keyword.value) for keyword in keywords]
        case _:
            raise ValueError(f"{ast.unparse(node)} is no literal")
    made: dict[str, Any] = {}
    for key, item in pairs:
        made |= _value(item, names) if key is None else {key: _value(item, names)}
    return made


def value_at(config: Config, path: str, default: Any) -> Any:
    """The value at ``a.b.c``; the default where the way ends."""
    value: Any = config
    for key in path.split("."):
        if isinstance(value, list):
            value = dict(zip(map(str, range(len(value))), value, strict=True))
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def _transform(pipeline: Any, kinds: Sequence[str]) -> Any:
    """The first transform of one of these types, however deep; None if there is none."""
    if isinstance(pipeline, Mapping):
        if pipeline.get("type") in kinds:
            return pipeline
        pipeline = list(pipeline.values())
    if isinstance(pipeline, list):
        return next((found for item in pipeline if (found := _transform(item, kinds))), None)
    return None


def refuse_what_differs(config: Config, family: str, channels: int, source: str) -> None:
    """Refuse a model that ours would not compute.

    Args:
        config: MMDetection's.
        family: ours.
        channels: of the pyramid.
        source: how the message calls the file.

    Raises:
        UserError: the first difference.
    """
    kind = value_at(config, "model.backbone.type", "")
    if kind not in ("ResNet", "ResNeXt"):
        raise UserError(f"{source}: its backbone is a {kind}; what is understood is a ResNet or ResNeXt")
    extra = value_at(config, "model.neck.add_extra_convs", False)
    if extra is True:  # as written before MMDetection 2.1
        extra = "on_input" if value_at(config, "model.neck.extra_convs_on_inputs", True) else "on_output"
    rows = {**COMMON, **EXPECTED[family], "neck.add_extra_convs": (False, EXTRA_LEVELS.get(family, False))}
    for part in ("neck", "bbox_head"):
        groups = group_norm_of(channels).num_groups
        rows[f"{part}.norm_cfg.num_groups"] = (groups, groups)
    for where, (default, ours) in rows.items():
        theirs = extra if where == "neck.add_extra_convs" else value_at(config, f"model.{where}", default)
        if theirs != ours:
            raise UserError(f"{source}: its {where} is {theirs!r}; what is understood is {ours!r}")


def has_tricks(config: Config, source: str) -> bool:
    """Whether an FCOS has normalized boxes and centerness beside them.

    Raises:
        UserError: it has one of the two.
    """
    names = ("norm_on_bbox", "centerness_on_reg")
    given = [bool(value_at(config, f"model.bbox_head.{name}", False)) for name in names]
    if given[0] != given[1]:
        raise UserError(
            f"{source}: its FCOS has one of {' and '.join(names)}, not both: that is not understood"
        )
    return all(given)


def normalization(config: Config, source: str) -> tuple[Triple, Triple, bool]:
    """Mean and deviation of RGB in [0, 1], and whether the network sees BGR.

    Raises:
        UserError: the config does not say, or images are padded otherwise than here.
    """
    given: Any = value_at(config, "model.data_preprocessor", config.get("data_preprocessor"))  # 3.x
    if given is not None:
        rgb, divisor = given.get("bgr_to_rgb", False), given.get("pad_size_divisor", 1)
    else:
        pipeline = config.get("test_pipeline", [])
        given = _transform(pipeline, ("Normalize",)) or config.get("img_norm_cfg")
        rgb = (given or {}).get("to_rgb", True)
        divisor = (_transform(pipeline, ("Pad",)) or {}).get("size_divisor", 32)
    if not given or "mean" not in given or "std" not in given:
        raise UserError(f"{source}: its config does not say the mean and deviation of its input")
    if divisor != 32:
        raise UserError(f"{source}: its images are padded to a multiple of {divisor}; what is understood is 32")
    return input_scale(given["mean"], not rgb), input_scale(given["std"], not rgb), not rgb


def input_scale(values: Sequence[float], bgr: bool) -> Triple:
    """Values of 0 to 255, in the network's order, as values of RGB in [0, 1]."""
    first, second, third = (float(value) / 255 for value in values)
    return (third, second, first) if bgr else (first, second, third)


def detection_settings(config: Config, source: str) -> dict[str, Any]:
    """Size and thresholds, as options of a model section.

    Raises:
        UserError: detections are suppressed otherwise than here.
    """
    test = value_at(config, "model.test_cfg", config.get("test_cfg")) or {}
    test = test.get("rcnn", test)
    nms = test.get("nms", {})
    if nms.get("type", "nms") != "nms":
        raise UserError(f"{source}: its suppression is {nms['type']!r}; what is understood is 'nms'")
    found = {
        "score_threshold": test.get("score_thr"),
        "nms_threshold": nms.get("iou_threshold", nms.get("iou_thr")),
        "max_detections": test.get("max_per_img"),
    }
    resize = _transform(config.get("test_pipeline", []), ("Resize", "MultiScaleFlipAug")) or {}
    scale = resize.get("scale", resize.get("img_scale"))
    if isinstance(scale, list) and len(scale) == 2:
        found["size"] = tuple(sorted(scale))
    return {name: value for name, value in found.items() if value is not None}
