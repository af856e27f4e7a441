from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import detection

from detdistill.errors import UserError
from detdistill.models import (
    build_model,
    load_model,
    load_teacher,
    load_weights,
    read_state_dict,
    save_model,
)
from detdistill.models.base import Detector
from detdistill.models.checkpoints.io import describe
from detdistill.recipe import ModelConfig, dump_recipe, model_config, parse_recipe

CLASSES = ("cat", "dog", "bird")


def config(**options: Any) -> ModelConfig:
    small = {"backbone": "resnet18", "channels": 16, "head_depth": 1, "strides": (8, 16, 32), "size": (64, 96)}
    return model_config(**{**small, "score_threshold": 0.0, **options})


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_model(build_model(config(), CLASSES), tmp_path / "student.safetensors")
    return tmp_path


def same(a: Detector, b: Detector) -> bool:
    image = torch.rand(3, 60, 90)
    with torch.no_grad():
        (x,), (y,) = a.eval()([image]), b.eval()([image])
    assert len(x["boxes"])
    return all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize("family", ["retinanet", "fcos", "faster_rcnn"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_saved_model_comes_back_from_its_file_alone(family: str, norm: str, tmp_path: Path) -> None:
    model = build_model(config(family=family, norm=norm), CLASSES)
    save_model(model, tmp_path / "student.safetensors")
    for path in (tmp_path, tmp_path / "student.safetensors", str(tmp_path)):
        loaded = load_model(path)
        assert not loaded.training
        assert loaded.classes == CLASSES
        assert loaded.spec == model.spec
        assert same(model, loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]  # nothing temporary is left


def test_every_field_of_the_section_comes_back(tmp_path: Path) -> None:
    told = model_config(
        family="faster_rcnn", backbone="resnet26", channels=24, head_depth=2,
        strides=(8, 16, 32, 64), anchor_scale=6.0, norm="frozen", freeze_stages=2, size=(70, 90),
        score_threshold=0.3, nms_threshold=0.4, max_detections=7, keep_ratio=False,
        convention="mmdet", stride_in_1x1=True, rpn_samples=9, roi_samples=10,
    )  # fmt: skip
    default = model_config(family="faster_rcnn").model_dump()
    same_as_default = {key for key, value in told.model_dump().items() if value == default[key]}
    assert same_as_default == {"family", "weights", "backbone_weights"}
    model = build_model(told, CLASSES)
    save_model(model, tmp_path / "model.safetensors")
    loaded: Any = load_model(tmp_path / "model.safetensors")
    assert loaded.spec == {
        "model": told.model_dump(mode="json", exclude={"weights", "backbone_weights"}),
        "classes": list(CLASSES),
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert loaded.max_detections == 7
    assert loaded.preprocessor.size == (70, 90)
    assert loaded.anchor_generator.sizes[0] == (48.0,)


def test_a_file_carries_no_path(run_folder: Path) -> None:
    again = build_model(config(weights=str(run_folder)), CLASSES)
    save_model(again, run_folder / "again.safetensors")
    with safe_open(run_folder / "again.safetensors", framework="pt") as file:
        assert str(run_folder) not in json.dumps(file.metadata())


def test_of_a_model_without_spec_the_weights_are_kept(tmp_path: Path) -> None:
    model = build_model("retinanet", 2, backbone="resnet18", channels=16)
    model.config = None
    model.head.tied = model.head.cls  # the same tensors under two names
    save_model(model, tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match=r"weights of a Python object \(RetinaNet, \d+ parameters"):
        load_model(tmp_path / "x.safetensors")


def test_what_a_model_is_known_by() -> None:
    torch.manual_seed(0)
    model = build_model("retinanet", 2, backbone="resnet18", channels=16)
    line = describe(model)
    assert line.startswith("RetinaNet, ")
    assert (
        describe(build_model("retinanet", 2, backbone="resnet18", channels=16)) == line
    )  # other weights, the same model
    assert describe(build_model("retinanet", 3, backbone="resnet18", channels=16)) != line
    values = describe(model, values=True)
    assert describe(copy.deepcopy(model), values=True) == values
    model.head.cls.weight.data[0, 0, 0, 0] += 1
    assert describe(model, values=True) != values


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        save_model(build_model(config(), CLASSES), tmp_path / "absent" / "x.safetensors")


class TestTeacher:
    def test_a_run_folder_alone_is_enough_and_keeps_its_classes(self, run_folder: Path) -> None:
        teacher = load_teacher(model_config(weights=str(run_folder)), ["dog", "horse"])
        assert teacher.classes == CLASSES
        assert same(teacher, load_model(run_folder))

    def test_a_section_as_a_run_keeps_it_means_the_same(self, run_folder: Path) -> None:
        tree = {"data": "digits", "student": {}, "teacher": str(run_folder), "methods": ["ima"]}
        kept = parse_recipe(yaml.safe_load(dump_recipe(parse_recipe(tree)))).teacher
        assert kept is not None
        assert same(load_teacher(kept, CLASSES), load_model(run_folder))

    def test_what_is_said_counts_though_it_be_the_default(self, run_folder: Path) -> None:
        save_model(build_model(config(score_threshold=0.3), CLASSES), run_folder / "student.safetensors")
        weights = str(run_folder)
        assert load_teacher(model_config(weights=weights), CLASSES).score_threshold == 0.3
        assert (
            load_teacher(model_config(weights=weights, score_threshold=0.05), CLASSES).score_threshold == 0.05
        )
        with pytest.raises(UserError, match="trained with channels: 16, the recipe says 256"):
            load_teacher(model_config(weights=weights, channels=256), CLASSES)

    def test_a_contradiction_is_told(self, run_folder: Path) -> None:
        with pytest.raises(UserError, match="trained with backbone: resnet18, the recipe says resnet34"):
            load_teacher(model_config(weights=str(run_folder), backbone="resnet34"), CLASSES)

    def test_other_settings_are_the_recipes(self, run_folder: Path) -> None:
        teacher = load_teacher(model_config(weights=str(run_folder), size=(32, 48)), CLASSES)
        assert teacher.preprocessor.size == (32, 48)

    @pytest.mark.parametrize(
        ("options", "fault"),
        [
            ({"channels": 24}, "wrong shape neck"),
            ({"head_depth": 2}, "missing head.cls_tower.1"),
            ({"head_depth": 0}, "unexpected head.cls_tower.0"),
            ({"backbone": "resnet34"}, "missing backbone.body.layer1.2"),
            ({"strides": (8, 16, 32, 64)}, "missing neck.extra.0"),
            ({"family": "fcos"}, "head.cls"),
            ({"backbone": "mobilenetv2_100", "family": "faster_rcnn", "channels": 8}, "no entry fits|missing"),
        ],
    )
    def test_weights_that_do_not_fit_are_refused(self, options: Any, fault: str, run_folder: Path) -> None:
        bare = run_folder / "bare.pt"
        torch.save(read_state_dict(run_folder), bare)
        with pytest.raises(UserError, match=rf"bare\.pt: .*(?:{fault})"):
            load_teacher(config(weights=str(bare), **options), CLASSES)
        assert same(load_teacher(config(weights=str(bare)), CLASSES), load_model(run_folder))

    def test_another_number_of_classes_is_refused(self, run_folder: Path) -> None:
        bare = run_folder / "bare.pt"
        torch.save(read_state_dict(run_folder), bare)
        with pytest.raises(UserError, match=r"wrong shape head\.cls\.weight: file \(27, "):
            load_teacher(config(weights=str(bare)), ["cat", "dog"])

    def test_a_teacher_needs_weights(self) -> None:
        with pytest.raises(UserError, match="untrained teacher"):
            load_teacher(config(), CLASSES)


class TestStudent:
    def test_class_rows_are_taken_by_name(self, run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            student: Any = build_model(model_config(weights=str(run_folder)), ["bird", "horse", "cat", "dog"])
        assert "classes without rows     1  horse" in caplog.text
        source: Any = load_model(run_folder)
        rows = student.head.cls.weight.unflatten(0, (9, 4))
        theirs = source.head.cls.weight.unflatten(0, (9, 3))
        assert torch.equal(rows[:, [2, 3, 0]], theirs)
        assert torch.equal(student.head.box.weight, source.head.box.weight)
        assert student.classes == ("bird", "horse", "cat", "dog")
        assert student.training

    def test_a_new_head_is_kept_with_a_warning(
        self, run_folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        bare = run_folder / "bare.pt"
        torch.save(read_state_dict(run_folder), bare)
        with caplog.at_level(logging.WARNING):
            build_model(config(weights=str(bare), head_depth=2), ["cat"])
        assert "head.cls.weight: file (27, 16, 3, 3), model (9, 16, 3, 3)" in caplog.text
        with pytest.raises(UserError, match="backbone"):
            build_model(config(weights=str(bare), backbone="resnet34"), CLASSES)

    def test_norms_interchange(self, run_folder: Path) -> None:
        frozen = build_model(model_config(weights=str(run_folder), norm="frozen"), CLASSES)
        image = torch.rand(1, 3, 64, 64)
        a: Any = frozen.eval()
        b: Any = load_model(run_folder)
        torch.testing.assert_close(a.backbone(image)[32], b.backbone(image)[32], rtol=1e-4, atol=1e-5)


class TestFiles:
    @pytest.mark.parametrize(
        "key", ["model", "state_dict", "model_state_dict", "ema_state_dict", "state_dict_ema", "ema"]
    )
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
    def test_wrappings_are_undone(self, key: str, prefix: str, tmp_path: Path) -> None:
        state = {"backbone.a": torch.rand(2), "head.b": torch.rand(3)}
        torch.save({key: {prefix + n: t for n, t in state.items()}, "epoch": 3}, tmp_path / "x.pth")
        got = read_state_dict(tmp_path / "x.pth")
        assert got.keys() == state.keys()
        assert torch.equal(got["head.b"], state["head.b"])

    def test_of_several_weights_the_average_is_taken(self, tmp_path: Path) -> None:
        last, average = {"head.b": torch.zeros(3)}, {"head.b": torch.ones(3)}
        averaged = {"n_averaged": torch.tensor(7), "module.head.b": torch.ones(3)}  # torch's AveragedModel
        for content in (
            {"model": last, "model_ema": averaged, "epoch": 3},
            {"state_dict": last, "state_dict_ema": average},
            {"ema": {"module": average, "updates": 7}, "model": last},
            {
                "state_dict": average,
                "ema_state_dict": {"module.head.b": torch.zeros(3), "steps": torch.tensor(7)},
            },
            {"model": {"state_dict": average}},
        ):
            torch.save(content, tmp_path / "x.pth")
            got = read_state_dict(tmp_path / "x.pth")
            assert list(got) == ["head.b"]
            assert torch.equal(got["head.b"], torch.ones(3))

    @pytest.mark.parametrize("whole", [True, False])
    def test_objects_are_refused_with_the_command_that_takes_their_tensors(
        self, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A model that was pickled whole; a checkpoint of torchvision's reference scripts."""
        model = nn.Conv2d(3, 4, 1)
        content = model if whole else {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)}
        torch.save(content, tmp_path / "x.pt")
        holds = "torch.nn.modules.conv.Conv2d" if whole else "argparse.Namespace"
        with pytest.raises(UserError, match=f"it holds a {holds}, and objects are not unpickled") as caught:
            read_state_dict(tmp_path / "x.pt")
        assert "\n" not in str(caught.value)
        command = str(caught.value).partition('python -c "')[2].removesuffix('"')
        monkeypatch.chdir(tmp_path)
        exec(command, {"__name__": "x"})
        assert torch.equal(read_state_dict(tmp_path / "x.plain.pt")["weight"], model.weight)

    def test_no_pickle_is_executed(self, tmp_path: Path) -> None:
        marker = tmp_path / "executed"

        class Trap:
            def __reduce__(self) -> Any:
                return Path.touch, (marker,)

        torch.save({"model": {"a": torch.rand(1)}, "trap": Trap()}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"x\.pt: cannot be read as weights"):
            read_state_dict(tmp_path / "x.pt")
        assert not marker.exists()

    def test_what_is_no_weights_file_is_told(self, tmp_path: Path, run_folder: Path) -> None:
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes((run_folder / "student.safetensors").read_bytes()[:1000])
        plain = tmp_path / "plain.safetensors"
        save_file({"a": torch.rand(1)}, plain)
        (tmp_path / "empty").mkdir()
        torch.save([1, 2], tmp_path / "list.pt")
        for path, said in (
            (cut, "not a whole safetensors file"),
            (plain, "does not say what model it is"),
            (tmp_path / "empty", r"no student\.safetensors here"),
            (tmp_path / "absent.pt", "no such weights file"),
        ):
            with pytest.raises(UserError, match=said):
                load_model(path)
        torch.save({"params": {"a": torch.rand(1)}, "epoch": 3}, tmp_path / "other.pt")
        (tmp_path / "nothing.pt").touch()
        (tmp_path / "page.pt").write_text("<html>not found</html>")
        (tmp_path / "graph.onnx").touch()
        for name, said in (
            ("list.pt", "holds a list"),
            ("other.pt", r"no tensors by name \(it has params, epoch\); give a file of a model's state_dict"),
            ("nothing.pt", "cannot be read as weights .*give a safetensors file"),
            ("page.pt", "cannot be read as weights .*give a safetensors file"),
            ("graph.onnx", "an exported program, not weights"),
        ):
            with pytest.raises(UserError, match=said) as caught:
                read_state_dict(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_the_report_tells_each_entry() -> None:
    model = build_model(config(), CLASSES)
    state = dict(model.state_dict())
    del state["neck.fpn.layer_blocks.0.0.bias"]
    state["head.box.bias"] = torch.zeros(5)
    state["head.extra"] = torch.zeros(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["head.cls.bias"] = torch.full((27,), 9.0)
    with pytest.raises(UserError, match="3 entries do not fit"):
        load_weights(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = load_weights(model, state, require=())
    assert report.missing == ["neck.fpn.layer_blocks.0.0.bias"]
    assert report.unexpected == ["head.extra"]
    assert report.wrong_shape == ["head.box.bias: file (5,), model (36,)"]
    assert len(report.matched) == len(before) - 2
    assert not report.complete
    assert "wrong shape              1  head.box.bias: file (5,), model (36,)" in str(report)
    assert torch.equal(model.state_dict()["head.cls.bias"], state["head.cls.bias"])
    with pytest.raises(UserError, match="no entry fits"):
        load_weights(model, {"something": torch.zeros(1)}, require=())


def test_step_counters_of_batchnorm_may_be_absent() -> None:
    model = build_model(config(), CLASSES)
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert load_weights(model, state).complete


def test_published_weights_load_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The download is replaced by a random model of torchvision's own with the published number of rows."""
    theirs = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    weights = type(detection.FCOS_ResNet50_FPN_Weights.COCO_V1)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **options: theirs.state_dict())
    told = model_config(family="fcos", weights="torchvision", size=(800, 1333))
    teacher: Any = load_teacher(told, ["dog", "person"])
    rows = theirs.head.classification_head.cls_logits.weight
    assert torch.equal(teacher.head.cls.weight, rows[[18, 1]])  # COCO's category ids
    with pytest.raises(UserError, match="has no class axolotl"):
        load_teacher(told, ["dog", "axolotl"])
    build_model(told, ["dog", "axolotl"])

    def offline(self: Any, **options: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(weights, "get_state_dict", offline)
    with pytest.raises(UserError, match=r"fcos_resnet50_fpn_coco.* cannot be downloaded \(no route"):
        build_model(told, ["dog"])


def test_a_torchvision_file_is_recognized(tmp_path: Path) -> None:
    theirs = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    torch.save({"model": theirs.state_dict()}, tmp_path / "theirs.pth")
    teacher: Any = load_teacher(model_config(weights=str(tmp_path / "theirs.pth"), size=64), ["cat", "dog"])
    rows = theirs.head.classification_head.cls_logits.weight.unflatten(0, (9, 3))
    assert torch.equal(teacher.head.cls.weight.unflatten(0, (9, 2)), rows[:, 1:])


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes")
def test_others_can_read_what_they_could_of_any_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(build_model(config(), CLASSES), tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
