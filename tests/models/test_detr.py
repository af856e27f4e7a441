"""RT-DETRv2 and D-FINE against transformers' own models, and in every place where a detector goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torchvision.ops import box_iou

from detdistill.distillation.methods import METHODS
from detdistill.distillation.pair import Pair
from detdistill.distillation.weighting import gradient_norm
from detdistill.errors import UserError
from detdistill.models import DETR, build_model, load_model, load_teacher, save_model
from detdistill.models.base import Batch, Detector, Preprocess, QueryOutputs
from detdistill.models.families.detr_families import _initialize
from detdistill.recipe import OptimizerConfig, model_config
from detdistill.training.step import build_optimizer

CLASSES = ("a", "b", "c")
FAMILIES = ("rtdetr_v2", "d_fine")
families = pytest.mark.parametrize("family", FAMILIES)
PREFIXES = {"rtdetr": "RTDetr", "rtdetr_v2": "RTDetrV2", "d_fine": "DFine"}
layouts = pytest.mark.parametrize("family", PREFIXES)


def tiny(family: str, **options: Any) -> DETR:
    torch.manual_seed(0)
    small = {
        "channels": 32,
        "head_depth": 2,
        "num_queries": 20,
        "size": (64, 64),
        "score_threshold": 0.0,
        "max_detections": 300,
    }
    classes = options.pop("classes", CLASSES)
    model = build_model(family, classes, **{"backbone": "mobilenetv3_small_050", **small, **options})
    assert isinstance(model, DETR)
    return model


def built(family: str, channels: int = 32, **options: Any) -> Detector:
    torch.manual_seed(channels)
    small = {"backbone": "mobilenetv3_small_050", "head_depth": 2, "size": (64, 64), "keep_ratio": False}
    if family == "fcos":
        small["strides"] = (8, 16, 32)
    return build_model(model_config(**{"family": family, "channels": channels, **small, **options}), CLASSES)


def data(objects: int = 2) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two images of different sizes."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 50, 70, generator=generator), torch.rand(3, 64, 40, generator=generator)]
    boxes = torch.tensor([[3.0, 4.0, 30.0, 40.0], [10.0, 10.0, 20.0, 30.0]])[:objects]
    return images, [{"boxes": boxes.clone(), "labels": torch.tensor([0, 2])[:objects]} for _ in images]


# --- the oracle: transformers' own models ----------------------------------------------------------------


def published_layout(family: str, folder: Path, freeze: bool = True) -> Any:
    """A small model of transformers' own, with weights that tell its layers apart, saved as it saves them."""
    torch.manual_seed(0)
    resnet = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_indices=[2, 3, 4],
    )  # fmt: skip
    backbone: dict[str, Any] = {
        "rtdetr": resnet,
        "rtdetr_v2": resnet,
        "d_fine": transformers.HGNetV2Config(
            stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 24], stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=[8, 16, 24, 32], stage_num_blocks=[1] * 4, stage_numb_of_layers=[2] * 4,
            hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], use_learnable_affine_block=True,
            out_indices=[2, 3, 4],
        ),
    }  # fmt: skip
    config = getattr(transformers, f"{PREFIXES[family]}Config")(
        backbone_config=backbone[family], encoder_in_channels=[16, 24, 32], encoder_hidden_dim=32, d_model=32,
        decoder_in_channels=[32, 32, 32], encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_layers=2,
        num_queries=20, freeze_backbone_batch_norms=freeze, tie_word_embeddings=False,
        id2label=dict(enumerate(CLASSES)), label2id={name: label for label, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = getattr(transformers, f"{PREFIXES[family]}ForObjectDetection")(config)
    _initialize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bbox_embed" in name or "class_embed" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    for name in ("class_embed", "bbox_embed") if family != "rtdetr" else ():
        getattr(model, name).load_state_dict(getattr(model.model.decoder, name).state_dict())
    model.config.tie_word_embeddings = True
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"do_normalize": False, "size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3})
    )
    return model


@layouts
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("objects", [2, 0])
def test_the_five_steps_are_transformers_own_forward(
    family: str, freeze: bool, objects: int, tmp_path: Path
) -> None:
    theirs = published_layout(family, tmp_path, freeze)
    ours = load_model(tmp_path)
    assert isinstance(ours, DETR)
    images, targets = data(objects)
    batch = ours.preprocess(images, targets)
    labels = []
    for target in batch.targets or ():
        corners = target["boxes"] / 64
        center, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        labels.append({"class_labels": target["labels"], "boxes": torch.cat([center, size], dim=1)})

    torch.manual_seed(7)  # noised objects are drawn
    expected = theirs.train()(batch.images_N3HW, labels=labels)
    torch.manual_seed(7)
    losses = ours.train()(images, targets)
    assert isinstance(losses, dict)
    torch.testing.assert_close(sum(losses.values()), expected.loss)
    for kind, name in (("vfl", "classification"), ("bbox", "bbox_l1"), ("giou", "bbox_giou")):
        terms = [v for k, v in expected.loss_dict.items() if k.startswith(f"loss_{kind}") and "_dn_" not in k]
        assert len(terms) == 3  # of two layers and of the initial queries
        torch.testing.assert_close(losses[name], sum(terms))
    assert losses["denoising"].item() == pytest.approx(
        sum(v.item() for k, v in expected.loss_dict.items() if "_dn_" in k), rel=1e-5
    )

    with torch.no_grad():
        outputs = theirs.eval()(batch.images_N3HW)
        wanted = transformers.RTDetrImageProcessor().post_process_object_detection(
            outputs, threshold=0.0, target_sizes=batch.original_sizes
        )
        ours.score_threshold = 0.0
        found = ours.eval()(images)
    for a, b, (height, width) in zip(wanted, found, batch.original_sizes, strict=True):
        assert len(b["scores"]) == 20
        torch.testing.assert_close(b["scores"], a["scores"])
        assert torch.equal(b["labels"], a["labels"])
        limits = torch.tensor([width, height, width, height])
        torch.testing.assert_close(b["boxes"], a["boxes"].clamp(min=0).minimum(limits), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "backbone", "options", "millions"),
    [
        # RT-DETR's rtdetrv2_pytorch/README.md: S, M*, M, L, X
        ("rtdetr_v2", "resnet18d", {}, 20),
        ("rtdetr_v2", "resnet34d", {}, 31),
        ("rtdetr_v2", "resnet50d", {"neck_width": 0.5}, 36),
        ("rtdetr_v2", "resnet50d", {}, 42),
        ("rtdetr_v2", "resnet101d", {"channels": 384}, 76),
        # D-FINE's README.md: S, M, L, X
        ("d_fine", "hgnetv2_b0", {}, 10),
        ("d_fine", "hgnetv2_b2", {}, 19),
        ("d_fine", "hgnetv2_b4", {}, 31),
        ("d_fine", "hgnetv2_b5", {"channels": 384}, 62),
    ],
)
def test_published_sizes(family: str, backbone: str, options: Any, millions: int) -> None:
    with torch.device("meta"):
        model = build_model(family, 80, backbone=backbone, **options)
    assert sum(p.numel() for p in model.parameters()) // 1_000_000 == millions


# --- a detector like the others --------------------------------------------------------------------------


@families
def test_it_learns_two_images(family: str) -> None:
    model = tiny(family, channels=64, num_queries=10, num_denoising=10).train()
    images = [torch.full((3, 64, 64), 0.2) for _ in range(2)]
    boxes = torch.tensor([[[4.0, 8.0, 30.0, 40.0]], [[20.0, 24.0, 60.0, 60.0]]])
    targets = []
    for i, (image, boxes_K4) in enumerate(zip(images, boxes, strict=True)):
        left, top, right, bottom = boxes_K4[0].int().tolist()
        image[i, top:bottom, left:right] = 0.9
        targets.append({"boxes": boxes_K4, "labels": torch.tensor([i])})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(80):
        torch.manual_seed(step)
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for found, target in zip(model.eval()(images), targets, strict=True):
        assert found["labels"][0] == target["labels"][0]
        assert box_iou(found["boxes"][:1], target["boxes"]).item() > 0.5


@families
@pytest.mark.parametrize("objects", [2, 0])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_losses_are_finite_and_reach_every_parameter(family: str, objects: int, precision: torch.dtype) -> None:
    model = tiny(family).train()
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        losses = model(*data(objects))
    names = {"classification", "bbox_l1", "bbox_giou", "denoising"}
    assert set(losses) == names | ({"bbox_distribution", "self_distillation"} if family == "d_fine" else set())
    assert all(
        value.isfinite() and value.dtype == torch.float32 and value.ndim == 0 for value in losses.values()
    )
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@families
def test_a_batch_that_is_padded_trains_and_finds_boxes_inside_its_images(family: str) -> None:
    model = tiny(family)
    model.preprocessor = Preprocess()
    model.train()
    images, targets = data()
    batch = model.preprocess(images, targets)
    assert batch.padded_size == (64, 96)
    assert all(value.isfinite() for value in model(images, targets).values())
    for image, found in zip(images, model.eval()(images), strict=True):
        height, width = image.shape[-2:]
        assert (found["boxes"] <= torch.tensor([width, height, width, height])).all()
    outputs = QueryOutputs(  # the center and half the size of the padded input
        torch.tensor([[[5.0, 0, 0]], [[0, 0, 5.0]]]),
        torch.tensor([[[0.5, 0.5, 0.5, 0.5]]]).repeat(2, 1, 1),
        None,
    )
    first, second = model.decode(outputs, batch)
    assert first["boxes"][0].tolist() == [24, 16, 70, 48]  # the image is 70 wide, 72 would be padding
    assert second["boxes"][0].tolist() == [24, 16, 40, 48]
    assert (first["labels"][0], second["labels"][0]) == (0, 2)


@families
def test_a_small_input_has_a_query_for_each_cell(family: str) -> None:
    model = tiny(family, num_queries=300, size=(32, 32))
    sum(model.train()(*data()).values()).backward()
    assert len(model.eval()([torch.rand(3, 32, 32)])[0]["scores"]) == 4 * 4 + 2 * 2 + 1
    model.preprocessor = Preprocess(size=(192, 192), keep_ratio=False)
    assert len(model.eval()([torch.rand(3, 32, 32)])[0]["scores"]) == 300


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sgd_is_doubted(optimizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    build_optimizer(Pair(tiny("rtdetr_v2")), OptimizerConfig(name=optimizer))
    assert ("hardly learns by SGD" in caplog.text) == (optimizer == "sgd")


def test_options_of_detections() -> None:
    model, image = tiny("rtdetr_v2", max_detections=7).eval(), torch.rand(3, 64, 64)
    (found,) = model([image])
    assert len(found["scores"]) == 7
    assert (found["scores"].diff() <= 0).all()
    model.score_threshold = found["scores"][3].item()
    assert len(model([image])[0]["scores"]) == 3


def test_processes_divide_by_the_mean_number_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, targets) = tiny("d_fine").train(), data()
    batch = model.preprocess(images, targets)
    outputs = model.forward_head(model.forward_features(batch), batch)
    alone = model.losses(outputs, batch)
    monkeypatch.setattr(
        "detdistill.models.families.detr.avg_factor", lambda total: total * 2
    )  # others have three times as many
    shared = model.losses(outputs, batch)
    for name in ("classification", "bbox_l1", "bbox_giou", "bbox_distribution"):
        torch.testing.assert_close(shared[name], alone[name] / 2)
    torch.testing.assert_close(shared["self_distillation"], alone["self_distillation"])  # a mean over queries


# --- pairs -----------------------------------------------------------------------------------------------

PAIRS = [("fcos", "rtdetr_v2"), ("d_fine", "fcos"), ("rtdetr_v2", "d_fine"), ("rtdetr_v2", "rtdetr_v2")]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_pair_takes_a_step_on_features_and_the_teachers_decoder_rests(
    student: str, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(built(student), built(teacher, 64), ["ima"]).train()
    monkeypatch.setattr(pair.teacher, "forward_head", None)
    before = pair.student.backbone.body.conv_stem.weight.clone()
    losses = pair(*data())
    assert losses["ima"] > 0
    sum(losses.values()).backward()
    torch.optim.SGD(pair.parameters(), lr=0.1).step()
    assert not torch.equal(before, pair.student.backbone.body.conv_stem.weight)


@pytest.mark.parametrize(("student", "ratio"), [("rtdetr_v2", 0.3), ("d_fine", 0.3), ("fcos", None)])
def test_a_method_does_not_outweigh_the_task_of_a_query_based_student(
    student: str, ratio: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; gradients at the student's pyramid. A dense student keeps the published weight."""
    pair = Pair(built(student), built("fcos", 64), ["ima"]).train()
    maps = {}
    forward = pair.student.forward_features
    monkeypatch.setattr(pair.student, "forward_features", lambda batch: maps.setdefault(0, forward(batch)))
    losses = pair(*data())
    term = losses.pop("ima")
    if ratio is None:
        assert pair.applied_weights() == {"ima": 1.0}
    else:
        measured = gradient_norm(term, maps[0]) / gradient_norm(sum(losses.values()), maps[0])
        assert measured == pytest.approx(ratio, rel=1e-4)


NEED_DENSE = {"kd", "ld", "crosskd", "dist", "gid", "frs", "scalekd"}
DETECTION = [name for name, method in METHODS.items() if "detection" in method.tasks]


@pytest.mark.parametrize("method", DETECTION)
@pytest.mark.parametrize(("student", "teacher"), [("rtdetr_v2", "rtdetr_v2"), ("rtdetr_v2", "fcos")])
def test_every_method_runs_or_refuses_in_one_line(method: str, student: str, teacher: str) -> None:
    models = built(student), built(teacher, 64)
    if method in NEED_DENSE:
        with pytest.raises(UserError, match="use") as error:
            Pair(*models, [method])
        assert "\n" not in str(error.value)
    else:
        loss = Pair(*models, [method]).train()(*data())[method]
        assert loss.isfinite()
        assert loss.requires_grad


def test_a_student_that_keeps_the_ratio_learns_from_a_teacher_that_stretches() -> None:
    pair = Pair(built("fcos", keep_ratio=True), built("rtdetr_v2"), ["ima"]).train()
    assert pair(*data())["ima"].isfinite()


# --- recipes, files, checkpoints -------------------------------------------------------------------------


@families
def test_a_saved_model_comes_back(family: str, tmp_path: Path) -> None:
    model = built(family).eval()
    save_model(model, tmp_path / "student.safetensors")
    again = load_model(tmp_path)
    images, _ = data()
    for a, b in zip(model(images), again(images), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


@families
def test_defaults_of_a_section(family: str) -> None:
    model = build_model(model_config(family=family, backbone="mobilenetv3_small_050", channels=32), CLASSES)
    assert model.preprocessor == Preprocess((640, 640), (0, 0, 0), (1, 1, 1), keep_ratio=False)
    assert model.kind == "queries"
    assert len(model.head.decoder.layers) == 6
    (image,) = model.preprocess([torch.rand(3, 48, 96)]).images_N3HW
    assert image.shape == (3, 640, 640)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (8, 16, 32)}, "unknown key 'strides' of rtdetr_v2"),
        ({"nms_threshold": 0.6}, "unknown key 'nms_threshold' of rtdetr_v2"),
        ({"channels": 48}, "multiple of 32"),
        ({"head_depth": 0}, "head_depth: input should be greater"),
        ({"backbone": "resnet1"}, "resnet"),
    ],
)
def test_what_makes_no_sense_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        built("rtdetr_v2", **options)


@layouts
def test_a_checkpoint_folder_is_a_teacher_and_a_start(family: str, tmp_path: Path, caplog: Any) -> None:
    theirs = published_layout(family, tmp_path)
    teacher = load_teacher(model_config(weights=str(tmp_path)), ("x", "y"))
    assert isinstance(teacher, DETR)
    assert teacher.classes == CLASSES
    assert teacher.preprocessor == Preprocess((64, 64), (0, 0, 0), (1, 1, 1), keep_ratio=False)

    student = build_model(model_config(weights=str(tmp_path)), ("c", "new", "a"))
    assert "new" in caplog.text
    for ours, name in (
        (student.head.enc_score_head, "enc_score_head"),
        (student.head.decoder.class_embed[1], "decoder.class_embed.1"),
    ):
        rows = theirs.model.get_submodule(name)
        assert torch.equal(ours.weight[[0, 2]], rows.weight[[2, 0]])
        assert torch.equal(ours.bias[[0, 2]], rows.bias[[2, 0]])
    noised, rows = student.head.denoising_class_embed.weight, theirs.model.denoising_class_embed.weight
    assert torch.equal(noised[[0, 2, 3]], rows[[2, 0, 3]])

    save_model(student, tmp_path / "again.safetensors")
    again = load_model(tmp_path / "again.safetensors")
    images, _ = data()
    with torch.no_grad():
        for a, b in zip(student.eval()(images), again(images), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_checkpoint_folders_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "yolos"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    section = model_config(weights=str(tmp_path))
    with pytest.raises(UserError, match="only safetensors"):
        build_model(section, CLASSES)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="yolos"):
        build_model(section, CLASSES)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "d_fine"}))
    with pytest.raises(UserError, match="not a whole d_fine"):
        build_model(section, CLASSES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decoder_layers", 10**9, "head_depth: Input should be less than"),
        ("encoder_layers", 10**9, "encoder_layers: 1000000000; at most 256"),
        ("d_model", 10**12, "d_model: 1000000000000"),
        ("layer_norm_eps", float("nan"), "layer_norm_eps"),
        ("decoder_activation_function", "os.system", "no model can be built"),
        ("feat_strides", [[]], "no model can be built"),
        ("feat_strides", [8, 16, 16, 32], "no model can be built"),
        ("backbone_config", None, "not a whole rt_detr_v2 configuration"),
        ("id2label", {"0": "a", "1": "a", "2": "b"}, "'a' is named twice"),
    ],
)
def test_a_configuration_of_which_nothing_can_be_built_is_refused(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    published_layout("rtdetr_v2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(model_config(weights=str(tmp_path)), CLASSES)
    assert "\n" not in str(caught.value)


def test_a_configuration_cannot_make_transformers_download_a_backbone(tmp_path: Path) -> None:
    published_layout("rtdetr_v2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    changed = config | {"backbone": "someone/weights", "use_pretrained_backbone": True}
    changed["backbone_config"] = {**config["backbone_config"], "use_pretrained_backbone": True}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    teacher = load_teacher(model_config(weights=str(tmp_path)), CLASSES)
    assert teacher.spec is not None
    assert load_teacher(model_config(weights=str(tmp_path)), CLASSES).classes == CLASSES


def test_a_checkpoint_with_a_part_missing_is_no_teacher(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    published_layout("rtdetr_v2", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in state.items() if "enc_output" not in name},
        tmp_path / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"missing head\.enc_output"):
        load_teacher(model_config(weights=str(tmp_path)), CLASSES)


def test_without_transformers_only_these_families_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert built("fcos")
    with pytest.raises(UserError, match=r"pip install 'detdistill\[transformers\]'"):
        built("rtdetr_v2")


# --- preprocessing ---------------------------------------------------------------------------------------


def test_stretching_is_torchvisions_resize_and_boxes_follow() -> None:
    from torchvision.transforms.v2.functional import resize

    images, targets = data()
    batch = Preprocess((96, 64), (0, 0, 0), (1, 1, 1), keep_ratio=False)(images, targets)
    assert isinstance(batch, Batch)
    assert batch.sizes == [(96, 64), (96, 64)]
    for image, ours in zip(images, batch.images_N3HW, strict=True):
        torch.testing.assert_close(ours, resize(image, [96, 64], antialias=True))
    assert batch.targets is not None
    scale = torch.tensor([64 / 70, 96 / 50, 64 / 70, 96 / 50])
    torch.testing.assert_close(batch.targets[0]["boxes"], targets[0]["boxes"] * scale)


@pytest.mark.parametrize(
    ("scale_factor", "side"), [(0.5, 320), (0.8, 512), (1.01, 640), (1.26, 800), (0.01, 32)]
)
def test_a_zoom_goes_to_a_multiple_of_the_divisor(scale_factor: float, side: int) -> None:
    preprocess = Preprocess((640, 640), keep_ratio=False)
    assert preprocess([torch.rand(3, 40, 60)], scale_factor=scale_factor).padded_size == (side, side)
