"""MMDetection's checkpoints compute here what they compute there.

Configs, names and shapes are written by hand (``mmdet_models.py``) and compared with MMDetection's own; the
detections are its own (``mmdet_oracle.py``, ``mmdet_detections.json``).
"""

from __future__ import annotations

import json
import math
import pprint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detdistill.cli import main
from detdistill.errors import UserError
from detdistill.models import build_model, load_model, load_teacher
from detdistill.models.base import Batch, Preprocess
from detdistill.models.build import construct
from detdistill.models.checkpoints.mmdet import (
    COCO_CLASSES,
    backbone_of,
    convert,
    describe,
    family_of,
    import_mmdet,
)
from detdistill.models.checkpoints.mmdet_configs import parse_config
from detdistill.models.layers.backbones import Backbone
from detdistill.models.layers.heads import AlignedRoIAlign
from detdistill.recipe import model_config

from .mmdet_models import CASES, CLASSES, case_entries, config, entries, lively, picture

NAMES = tuple(f"class {i}" for i in range(CLASSES))
DETECTED = json.loads(Path(__file__).with_name("mmdet_detections.json").read_text(encoding="utf-8"))


def text_of(case: str) -> str:
    """A config as MMDetection 3 writes it into its files."""
    pipeline = [{"type": "Resize", "scale": (1333, 800), "keep_ratio": True}]
    return (
        f"model = {pprint.pformat(config(case))}\ntest_pipeline = {pipeline!r}\nrandomness = dict(seed=None)\n"
    )


def write(path: Path, case: str, **meta: Any) -> Path:
    state = lively(case_entries(case), "caffe" in case)
    meta = {"cfg": text_of(case), "dataset_meta": {"classes": NAMES}, "epoch": 12, **meta}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"param_groups": [{"lr": 0.1}]}}, path)
    return path


# --- what is computed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_detections_are_mmdetections(case: str, tmp_path: Path) -> None:
    out, checkpoint = import_mmdet(write(tmp_path / "x.pth", case))
    assert out == tmp_path / "x.safetensors"
    assert checkpoint.model.size == (800, 1333)
    model = load_model(out)
    assert model.classes == NAMES
    model.preprocessor = Preprocess(mean=model.preprocessor.mean, std=model.preprocessor.std)
    with torch.no_grad():
        (found,) = model([picture()])
    expected = DETECTED[case]
    assert len(expected["scores"]) > 5
    count = len(expected["scores"])
    assert found["labels"][:count].tolist() == expected["labels"]
    torch.testing.assert_close(found["scores"][:count], torch.tensor(expected["scores"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(found["boxes"][:count], torch.tensor(expected["boxes"]), rtol=0, atol=5e-3)
    if "mask" in case:
        areas = (found["masks"][:count] > 0.5).flatten(1).sum(dim=1)
        assert areas.max() > 300
        assert (areas - torch.tensor(expected["mask_areas"])).abs().max() <= 2  # a pixel on the edge


def test_caffes_stride_is_in_the_first_convolution() -> None:
    torch.manual_seed(0)
    ours = Backbone("resnet50", (4, 8), stride_in_1x1=True).eval()
    block = ours.body.get_submodule("layer2")[0]
    nn.init.uniform_(block.bn3.weight)  # timm starts it at 0
    by_hand = nn.Sequential(
        nn.Conv2d(256, 128, 1, stride=2, bias=False), block.bn1, nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1, bias=False), block.bn2, nn.ReLU(),
        nn.Conv2d(128, 512, 1, bias=False), block.bn3,
    )  # fmt: skip
    for i, name in ((0, "conv1"), (3, "conv2"), (6, "conv3")):
        by_hand[i].weight = getattr(block, name).weight
    x = torch.rand(1, 256, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(block(x), torch.relu(by_hand(x) + block.downsample(x)))
        plain = Backbone("resnet50", (4, 8)).eval()
        plain.load_state_dict(ours.state_dict())
        assert not torch.allclose(plain.body.get_submodule("layer2")[0](x), block(x))


def test_caffes_stride_needs_bottlenecks() -> None:
    with pytest.raises(UserError, match="'resnet18' has no ResNet bottlenecks"):
        Backbone("resnet18", (8,), stride_in_1x1=True)


def test_colors_are_turned_in_the_first_convolution() -> None:
    state = lively(case_entries("retinanet_caffe"), caffe=True)
    checkpoint = describe(state, {"model": config("retinanet_caffe")}, classes=NAMES)
    assert checkpoint.bgr
    rgb = 255 * torch.rand(1, 3, 32, 32)
    theirs = rgb.flip(1) - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    mean, std = (torch.tensor(x)[:, None, None] for x in (checkpoint.mean, checkpoint.std))
    ours = (rgb / 255 - mean) / std
    weight = convert(state, checkpoint)["backbone.body.conv1.weight"]
    expected = nn.functional.conv2d(theirs, state["backbone.conv1.weight"])
    torch.testing.assert_close(nn.functional.conv2d(ours, weight), expected, rtol=1e-4, atol=1e-3)


def batch_of(height: int, width: int) -> Batch:
    return Batch(torch.zeros(1, 3, height, width), [(height, width)], [(height, width)], None)


def test_retinanets_anchors_by_the_formula() -> None:
    model = build_model("retinanet", 2, backbone="resnet18", channels=8, head_depth=0, convention="mmdet")
    # The padded sides are no multiples of 128: the last level has cells of 128 pixels all the same.
    batch = batch_of(160, 224)
    maps = {s: torch.zeros(1, 1, math.ceil(160 / s), math.ceil(224 / s)) for s in (8, 16, 32, 64, 128)}
    anchors = model.anchors(maps, batch)
    # Stride 8: side 4 · 8 = 32; ratio 0.5 is 32·√2 wide and 32/√2 high, centered at (0, 0).
    expected = [-22.627417, -11.313708, 22.627417, 11.313708]
    torch.testing.assert_close(anchors[0][0], torch.tensor(expected))
    # The second size of the second ratio: a square of 32 · 2^(1/3).
    half = 16 * 2 ** (1 / 3)
    torch.testing.assert_close(anchors[0][4], torch.tensor([-half, -half, half, half]))
    torch.testing.assert_close(anchors[4][9] - anchors[4][0], torch.tensor([128.0, 0, 128, 0]))


def test_fcos_decodes_pixels_by_exp_about_the_middle_of_a_cell() -> None:
    model = build_model("fcos", 2, backbone="resnet18", channels=8, head_depth=0, convention="mmdet").eval()
    with torch.no_grad():
        model.head.box.weight.zero_()
        assert model.head.box.bias is not None
        model.head.box.bias.copy_(torch.tensor([1.0, 2.0, 0.5, 0.0]))
        model.head.scales["16"].fill_(2.0)
        outputs = model.forward_head(
            {s: torch.zeros(1, 8, 2, 2) for s in (8, 16, 32, 64, 128)}, batch_of(32, 32)
        )
        boxes_P4 = model.boxes(outputs, batch_of(32, 32))[0]
    point_x, point_y = 1.5 * 16, 0.5 * 16  # the second cell of the second level
    left, top, right, bottom = (math.exp(2 * x) for x in (1.0, 2.0, 0.5, 0.0))
    expected = torch.tensor([point_x - left, point_y - top, point_x + right, point_y + bottom])
    torch.testing.assert_close(boxes_P4[5], expected)


def test_a_region_is_pooled_about_the_cells_centers() -> None:
    """On a map that rises by 1 a cell the pooled value is the place itself, less half a cell."""
    pool = AlignedRoIAlign(["4", "8", "16", "32"], side=2)
    maps = {str(s): (torch.arange(64.0) + 100 * s).expand(1, 1, 64, 64).clone() for s in (4, 8, 16, 32)}
    regions = torch.tensor([[16.0, 16, 48, 48], [16, 16, 128, 128], [16, 16, 240, 240]])
    pooled = pool(maps, [regions], [(256, 256)])[:, 0, 0]
    # sides 32, 112 and 224: strides 4, 8 and 16; centers at a quarter and three quarters of the width
    for got, stride, (x1, x2) in zip(pooled, (4, 8, 16), ((16, 48), (16, 128), (16, 240)), strict=True):
        expected = [100 * stride + (x1 + share * (x2 - x1)) / stride - 0.5 for share in (0.25, 0.75)]
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-3)


def test_the_background_moves_to_the_front() -> None:
    state = lively(case_entries("mask_rcnn"), caffe=False)
    converted = convert(state, describe(state, {"model": config("mask_rcnn")}, classes=NAMES))
    theirs, ours = state["roi_head.bbox_head.fc_cls.bias"], converted["roi_head.cls.bias"]
    assert torch.equal(ours, torch.cat([theirs[-1:], theirs[:-1]]))
    assert torch.equal(converted["roi_head.box.bias"][4:], state["roi_head.bbox_head.fc_reg.bias"])
    masks = converted["mask_branch.heads.0.mask.weight"]
    assert torch.equal(masks[1:], state["roi_head.mask_head.conv_logits.weight"])


# --- which files are understood --------------------------------------------------------------------------


FAMILIES = (
    "retinanet", "fcos", "gfl", "reppoints", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn",
)  # fmt: skip
BODIES = ((50, 1, 4), (101, 1, 4), (101, 32, 4), (101, 32, 8))


@pytest.mark.parametrize(
    ("family", "body"),
    [(family, (101, 64, 4)) for family in FAMILIES] + [("retinanet", body) for body in BODIES],
)
def test_every_entry_of_the_published_models_has_its_place(family: str, body: tuple[int, int, int]) -> None:
    depth, groups, base_width = body
    names = entries(family, depth, groups, base_width)
    state = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    state.pop("bbox_head.integral.project", None)  # a meta tensor has no numbers to look at
    assert family_of(state, "it") == family
    checkpoint = describe(state, None, style="pytorch")
    assert checkpoint.classes == COCO_CLASSES
    with torch.device("meta"):
        own = construct(checkpoint.model, checkpoint.classes).state_dict()
    converted = convert(state, checkpoint)
    shapes = {name: tuple(x.shape) for name, x in own.items()}
    assert {name: tuple(x.shape) for name, x in converted.items()} == shapes


def test_coco_has_its_80_classes() -> None:
    assert len(COCO_CLASSES) == 80
    assert COCO_CLASSES[:2] == ("person", "bicycle")
    assert COCO_CLASSES[-1] == "toothbrush"


@pytest.mark.parametrize(
    ("depth", "groups", "width", "name"),
    [(18, 1, 4, "resnet18"), (101, 1, 4, "resnet101"), (101, 64, 4, "resnext101_64x4d")],
)
def test_backbones_are_told_by_their_entries(depth: int, groups: int, width: int, name: str) -> None:
    names = entries("retinanet", depth, groups, width)
    assert backbone_of({n: torch.empty(shape, device="meta") for n, shape in names.items()}, "it") == name


def test_older_names_are_understood() -> None:
    new = lively(case_entries("fcos_caffe"), caffe=True)
    old = {name.replace("bbox_head.conv_", "bbox_head.fcos_"): tensor for name, tensor in new.items()}
    assert "bbox_head.fcos_centerness.bias" in old
    settings = {"model": config("fcos_caffe")}
    expected = convert(new, describe(new, settings, classes=NAMES))
    got = convert(old, describe(old, settings, classes=NAMES))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_settings_come_from_the_file(tmp_path: Path) -> None:
    text = (
        text_of("gfl").replace("'score_thr': 0.05", "'score_thr': 0.001").replace("(1333, 800)", "(640, 512)")
    )
    _, checkpoint = import_mmdet(write(tmp_path / "x.pth", "gfl", cfg=text))
    assert checkpoint.settings == "its config"
    model = checkpoint.model
    assert (model.size, model.score_threshold, model.nms_threshold) == ((512, 640), 0.001, 0.6)


def test_a_config_of_mmdetection_2_is_understood() -> None:
    model = config("fcos_caffe")
    del model["data_preprocessor"]
    model["neck"] |= {"add_extra_convs": True, "extra_convs_on_inputs": False}
    text = f"""
img_norm_cfg = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
model = {model!r}
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(1333, 800), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'), dict(type='Normalize', **img_norm_cfg),
        dict(type='Pad', size_divisor=32)])]
"""
    state = {name: torch.empty(shape, device="meta") for name, shape in case_entries("fcos_caffe").items()}
    checkpoint = describe(state, parse_config(text), classes=NAMES)
    assert checkpoint.bgr
    assert checkpoint.mean == pytest.approx((122.7717 / 255, 115.9465 / 255, 102.9801 / 255))
    assert checkpoint.std == pytest.approx((1 / 255,) * 3)
    assert checkpoint.model.stride_in_1x1
    assert checkpoint.model.convention == "mmdet"
    assert checkpoint.model.size == (800, 1333)


def test_a_config_is_read_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    call = f"open({str(marker)!r}, 'w')"
    text = f"a = 1.0 / 4\nb = dict(x=-a, **dict(y=(1, 2)))\n{call}\nc = {call}\n"
    assert parse_config(text) == {"a": 0.25, "b": {"x": -0.25, "y": [1, 2]}}
    assert not marker.exists()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("'type': 'FPN'", "'type': 'PAFPN'", "its neck.type is 'PAFPN'"),
        ("'type': 'ResNet'", "'type': 'Res2Net'", "its backbone is a Res2Net"),
        ("'style': 'pytorch'", "'style': 'pytorch', 'dcn': {'type': 'DCN'}", "its backbone.dcn is"),
        ("'on_input'", "'on_output'", "its neck.add_extra_convs is 'on_output'"),
        ("'octave_base_scale': 4", "'octave_base_scale': 3", "octave_base_scale is 3; what is understood is 4"),
        ("'type': 'nms'", "'type': 'soft_nms'", "its suppression is 'soft_nms'"),
        ("'pad_size_divisor': 32", "'pad_size_divisor': 1", "padded to a multiple of 1"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    before: str, after: str, said: str, tmp_path: Path
) -> None:
    assert before in text_of("retinanet")
    path = write(tmp_path / "x.pth", "retinanet", cfg=text_of("retinanet").replace(before, after))
    with pytest.raises(UserError, match=said):
        import_mmdet(path)
    assert not path.with_suffix(".safetensors").exists()


def test_entries_without_a_place_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", "retinanet")
    content = torch.load(path, weights_only=True)
    strangers = ["backbone.layer4.1.conv2_offset.weight", "teacher.x", "bbox_head.reg_convs.0.norm.weight"]
    content["state_dict"] |= {name: torch.zeros(3) for name in strangers}
    torch.save(content, path)
    with pytest.raises(UserError, match="3 entries have no place in retinanet over resnet18") as caught:
        import_mmdet(path)
    assert all(name in str(caught.value) for name in strangers)


def test_a_missing_entry_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", "gfl")
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["bbox_head.scales.3.scale"]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"missing head\.scales\.64"):
        import_mmdet(path)


def test_a_file_without_a_config_needs_a_style(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", "fcos_tricks", cfg="configs/fcos.py\nnot python at all")
    with pytest.raises(UserError, match="--style pytorch or --style caffe"):
        import_mmdet(path)
    (tmp_path / "config.py").write_text(text_of("fcos_tricks"))
    _, of_config = import_mmdet(path, config=tmp_path / "config.py")
    out, of_style = import_mmdet(path, tmp_path / "y.safetensors", style="pytorch")
    assert out.is_file()
    assert of_style.settings == "published, pytorch"
    assert (of_config.model, of_config.mean, of_config.bgr) == (of_style.model, of_style.mean, of_style.bgr)
    with pytest.raises(UserError, match="leave --style out"):
        import_mmdet(path, config=tmp_path / "config.py", style="caffe")


@pytest.mark.parametrize("case", ["fcos_caffe", "retinanet_caffe", "cascade_mask_rcnn_caffe", "gfl"])
def test_published_settings_are_those_of_the_configs(case: str) -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in case_entries(case).items()}
    of_config = describe(state, {"model": config(case)}, classes=NAMES)
    of_style = describe(state, None, style="caffe" if "caffe" in case else "pytorch", classes=NAMES)
    assert of_style.model == of_config.model
    assert of_style.bgr == of_config.bgr
    assert (*of_style.mean, *of_style.std) == pytest.approx((*of_config.mean, *of_config.std))


def test_class_names_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", "retinanet", dataset_meta={})
    with pytest.raises(UserError, match="has 7 classes, and 80 names are known"):
        import_mmdet(path)
    assert import_mmdet(write(path, "retinanet", dataset_meta={}, CLASSES=NAMES))[1].classes == NAMES
    assert import_mmdet(path, classes=list("abcdefg"))[1].classes == tuple("abcdefg")


class Stranger:
    """What unpickling would make."""


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", "retinanet", log=Stranger())
    with pytest.raises(UserError, match="weights_only=False") as caught:
        import_mmdet(path)
    assert "\n" not in str(caught.value)
    # The command of the message makes a file that is read.
    command = str(caught.value).partition('python -c "')[2].removesuffix('"')
    content: dict[str, Any] = {"__name__": "x"}
    here = Path.cwd()
    try:
        import os

        os.chdir(tmp_path)
        exec(command, content)
    finally:
        os.chdir(here)
    assert import_mmdet(tmp_path / "x.plain.pth")[1].classes == NAMES


def test_other_files_are_refused() -> None:
    with pytest.raises(UserError, match=r"is none of MMDetection's .* it has bbox_head\.atss_cls"):
        family_of({"bbox_head.atss_cls.weight": torch.zeros(1)}, "it")
    with pytest.raises(UserError, match="its backbone is no ResNet"):
        backbone_of({"backbone.stages.0.weight": torch.zeros(1)}, "it")


# --- use -------------------------------------------------------------------------------------------------


def test_the_file_is_a_teacher(tmp_path: Path) -> None:
    out, _ = import_mmdet(write(tmp_path / "x.pth", "fcos_tricks"))
    teacher = load_teacher(model_config(weights=str(out)), ("other",))
    assert teacher.classes == NAMES
    assert teacher.spec is not None
    assert teacher.spec["model"]["convention"] == "mmdet_tricks"


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_what_follows_mmdetection_can_learn(family: str) -> None:
    torch.manual_seed(0)
    model: Any = build_model(family, 3, backbone="resnet18", channels=16, head_depth=1, convention="mmdet")
    target = {"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 64, 64)], [target])
    assert all(loss > 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_tricks_are_fcos_alone(name: str) -> None:
    with pytest.raises(UserError, match="'torchvision' or 'mmdet'"):
        model_config(family=name, backbone="resnet18", convention="mmdet_tricks")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "fcos.pth", "fcos_tricks")
    assert main(["import-mmdet", str(path), "--out", str(tmp_path / "teacher.safetensors")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "fcos over resnet18, 7 classes, at (800, 1333)" in printed
    assert "convention: mmdet_tricks" in printed
    assert load_model(tmp_path / "teacher.safetensors").classes == NAMES
    assert main(["import-mmdet", str(path), "--style", "caffe"]) == 2
    assert "leave --style out" in capsys.readouterr().err
