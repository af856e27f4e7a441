"""Every example of docs/foreign-models.md runs, on stand-ins for the packages that are not installed here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import detdistill
from detdistill.models import build_model

from .models.foreign_models import CLASSES, MmdetLike, YoloLike
from .test_docs import FENCE, ROOT

PAGE = (ROOT / "docs" / "foreign-models.md").read_text(encoding="utf-8")
BLOCKS = [block for language, block in FENCE.findall(PAGE) if language == "python"]
PLAIN = detdistill.Preprocess(mean=(0, 0, 0), std=(1, 1, 1))


class _Neck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p3, self.p4, self.p5 = (nn.Conv2d(3, 8, stride, stride) for stride in (8, 16, 32))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.p3(x), self.p4(x), self.p5(x)]


def packages() -> dict[str, ModuleType]:
    """Packages of these names, with as much in them as the page uses."""
    five = nn.ModuleList(nn.Conv2d(3, 4, stride, stride) for stride in (8, 16, 32, 64, 128))

    def init_detector(config: str, checkpoint: str, device: str) -> nn.Module:
        model = MmdetLike()
        model.neck = type("Neck", (nn.Module,), {"forward": lambda self, x: tuple(conv(x) for conv in five)})()
        model.extract_feat = lambda images: model.neck(images)  # type: ignore[method-assign]
        return model.eval()

    class YOLO:
        def __init__(self, weights: str) -> None:
            self.model = YoloLike(num_classes=10)

        def save(self, path: str) -> None:
            torch.save({"model": self.model}, path)

    inside: dict[str, dict[str, Any]] = {
        "ultralytics": {"YOLO": YOLO},
        "ultralytics.cfg": {"get_cfg": lambda: SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)},
        "ultralytics.nn": {},
        "ultralytics.nn.tasks": {"DetectionModel": lambda name, nc, verbose: YoloLike(num_classes=nc)},
        "mmdet": {},
        "mmdet.apis": {"init_detector": init_detector},
        "mmengine": {},
        "mmengine.structures": {"InstanceData": SimpleNamespace},
    }
    found = {}
    for name, names in inside.items():
        found[name] = ModuleType(name)
        found[name].__dict__.update(names)
    return found


def ours() -> detdistill.models.Detector:
    model = build_model(
        "retinanet",
        CLASSES,
        backbone="resnet10t",
        channels=8,
        strides=(8, 16, 32),
        head_depth=1,
    )
    model.preprocessor = PLAIN
    return model


def run(block: str, **given: Any) -> dict[str, Any]:
    names = dict(given)
    exec(compile(block, "foreign-models.md", "exec"), names)
    return names


def block_with(text: str) -> str:
    found = [block for block in BLOCKS if text in block]
    assert len(found) == 1, f"{len(found)} blocks have {text!r}"
    return found[0]


def example() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    boxes = torch.tensor([[4.0, 4, 40, 48], [20, 30, 60, 60]])
    return [torch.rand(3, 64, 64) for _ in range(2)], [{"boxes": boxes, "labels": torch.tensor([0, 2])}] * 2


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in packages().items():
        monkeypatch.setitem(sys.modules, name, module)


def test_no_block_is_left_out() -> None:
    assert len(BLOCKS) == 12
    source = Path(__file__).read_text(encoding="utf-8")
    for block in BLOCKS:
        assert sum(block == block_with(text) for text in TEXTS) == 1, block
    assert all(source.count(text) > 1 for text in TEXTS)


TEXTS = (
    "retinanet_resnet50_fpn_v2", "neck.p3", "yolov8l.pt", "DetectionModel", "program.save", "init_detector",
    "bgr=True", "InstanceData", "Encoder(detr)", "deeplabv3_resnet50", "detdistill.distill(",
    "student.exported.load_state_dict",
)  # fmt: skip


def test_a_torchvision_object() -> None:
    assert run(block_with("retinanet_resnet50_fpn_v2"))["teacher"].classes == ("cat", "dog", "bird")


def test_taps() -> None:
    model = nn.Sequential()
    model.neck = _Neck()
    pair = run(block_with("neck.p3"), my_model=model, student=ours())["pair"]
    assert pair(*example())["ima"] > 0


def test_a_transformer() -> None:
    transformers = pytest.importorskip("transformers", reason="the page's DETR is transformers'")
    body = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    small = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    for name in ("Detr", "ConditionalDetr"):
        config = getattr(transformers, f"{name}Config")(backbone_config=body, **small)
        detr = getattr(transformers, f"{name}ForObjectDetection")(config)
        teacher = run(block_with("Encoder(detr)").replace("800, 1333", "64, 96"), detr=detr)["teacher"].eval()
        batch = teacher.preprocess([torch.rand(3, 64, 96)])
        with torch.no_grad():
            tokens = detr.model(batch.images_N3HW).encoder_last_hidden_state
            x_NCHW = teacher.forward_features(batch)[32]
        assert x_NCHW.shape == (1, 16, 2, 3)
        torch.testing.assert_close(x_NCHW[0, :, 1, 2], tokens[0, 5])


def test_a_segmenter() -> None:
    teacher = run(block_with("deeplabv3_resnet50"))["teacher"]
    student = build_model("pspnet", teacher.classes, backbone="mobilenetv3_small_050", channels=8)
    targets = [{"semantic": torch.randint(0, 3, (64, 64), dtype=torch.uint8)}] * 2
    losses = detdistill.Pair(student, teacher, ["ima", "kd"]).train()(example()[0], targets)
    assert losses["ima"] > 0
    assert losses["kd"] > 0


def test_ultralytics_as_a_teacher() -> None:
    teacher = run(block_with("yolov8l.pt"))["teacher"]
    assert teacher.pyramid_channels == {8: 8, 16: 16, 32: 32}
    assert teacher.kind == "anchor_free"
    assert teacher.preprocess(example()[0]).images_N3HW.shape == (2, 3, 640, 640)


def test_ultralytics_as_a_student() -> None:
    student = run(block_with("DetectionModel"), classes=CLASSES)["student"]
    images, targets = example()
    losses = student.train()(images, targets)
    assert set(losses) == {"box", "cls", "dfl"}
    sum(losses.values()).backward()
    found = student.eval()(images)[0]
    assert len(found["boxes"]) > 0
    assert found["boxes"].max() <= 64
    assert (found["scores"].diff() <= 0).all()


def test_mmdetection() -> None:
    names = run(block_with("init_detector"))
    assert list(names["teacher"].pyramid_channels) == [8, 16, 32, 64, 128]
    caffe = run(block_with("bgr=True"))["caffe"]
    white = caffe([torch.ones(3, 8, 8)]).images_N3HW
    torch.testing.assert_close(white[0, :, 0, 0], 255 - torch.tensor([103.53, 116.28, 123.675]))
    given = {"model": MmdetLike(), "taps": {8: "neck:0", 16: "neck:1"}, "preprocess": PLAIN, "classes": CLASSES}
    student = run(block_with("InstanceData"), **given)["student"].train()
    losses = student(*example())
    assert set(losses) == {"loss_cls", "loss_bbox"}
    sum(losses.values()).backward()
    assert len(student.eval()(example()[0])[0]["scores"]) == 1


def test_training_and_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "cache"))
    data = detdistill.recipe.DataConfig(format="digits", train_size=8, val_size=4, image_size=64)
    digits = [str(digit) for digit in range(10)]
    student = run(block_with("DetectionModel").replace("640, 640", "64, 64"), classes=digits)["student"]
    teacher = run(block_with("yolov8l.pt").replace("640, 640", "64, 64"))["teacher"]
    budget = {"max_steps": 2, "batch_size": 4, "workers": 0, "evaluate_every": 0, "device": "cpu"}
    given = {"student": student, "teacher": teacher, "data": data, "budget": budget, "out": tmp_path / "run"}
    names = run(block_with("detdistill.distill("), **given)
    assert names["result"].status == "finished"
    wanted = {name: value.clone() for name, value in student.exported.state_dict().items()}
    for parameter in student.exported.parameters():
        parameter.data.zero_()
    monkeypatch.chdir(tmp_path)
    for block in ("student.exported.load_state_dict", "program.save"):
        run(block_with(block), student=student, result=names["result"])
        assert all(torch.equal(wanted[name], value) for name, value in student.exported.state_dict().items())
        next(student.exported.parameters()).data.zero_()
    assert (tmp_path / "student.pt").is_file()
