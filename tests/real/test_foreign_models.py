"""docs/foreign-models.md with the packages that it is about, where they are installed."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import detdistill
from detdistill.errors import UserError
from detdistill.recipe import DataConfig

from ..test_docs_foreign_models import block_with, run

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]  # theirs

DIGITS = tuple(str(digit) for digit in range(10))
SIZE = "96, 96"
BUDGET = {"max_steps": 2, "batch_size": 4, "workers": 0, "evaluate_every": 0, "device": "cpu", "ema": 0.9}


def distilled(teacher: Any, student: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DETDISTILL_CACHE", str(out / "cache"))
    data = DataConfig(format="digits", train_size=8, val_size=4, image_size=96)
    return detdistill.distill(teacher, student, data, "ima", training=BUDGET, out=out / "run")


def example() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[4.0, 4, 60, 60], [10, 20, 80, 90]])
    objects = [
        {"boxes": boxes, "labels": torch.tensor([3, 9])},
        {"boxes": boxes[:0], "labels": torch.zeros(0).long()},
    ]
    return [torch.rand(3, 96, 96, generator=generator) for _ in objects], objects


# --- Ultralytics -----------------------------------------------------------------------------------------


@pytest.fixture
def ultralytics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "True")
    return pytest.importorskip("ultralytics", reason="Ultralytics is not installed")


def yolo_student(name: str) -> detdistill.models.Detector:
    torch.manual_seed(0)
    block = block_with("DetectionModel").replace("yolov8n.yaml", name).replace("640, 640", SIZE)
    student = run(block, classes=DIGITS)["student"]
    for path, parameter in student.exported.named_parameters():
        if "cv3" in path and path.endswith("2.bias"):  # so that some score is above the threshold
            torch.nn.init.normal_(parameter, -3, 0.5)
    return student


@pytest.mark.parametrize(
    ("name", "end2end"), [("yolov8n.yaml", False), ("yolo11n.yaml", False), ("yolov10n.yaml", True)]
)
def test_losses_and_detections_are_ultralytics_own(ultralytics: Any, name: str, end2end: bool) -> None:
    student = yolo_student(name)
    model = student.exported
    if end2end:
        model.model[-1].end2end = True
    images, objects = example()
    losses = student.train()(images, objects)
    corners = objects[0]["boxes"] / 96
    theirs = {
        "img": torch.stack(images),
        "bboxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1),
        "cls": torch.tensor([[3.0], [9.0]]),
        "batch_idx": torch.zeros(2),
    }
    torch.testing.assert_close(torch.stack(list(losses.values())), model.loss(theirs)[0] / 2)
    student.eval()
    with torch.no_grad():
        found = student(images)
        wanted = model(torch.stack(images))[0]
    if not end2end:
        nms = pytest.importorskip("ultralytics.utils.nms")
        wanted = nms.non_max_suppression(wanted, conf_thres=0.001, iou_thres=0.7, max_det=300)
    for ours, own in zip(found, wanted, strict=True):
        assert len(own) > 20
        torch.testing.assert_close(ours["boxes"], own[:, :4].clamp(0, 96))
        torch.testing.assert_close(ours["scores"], own[:, 4])
        assert torch.equal(ours["labels"], own[:, 5].long())


def test_a_yolo_learns_from_a_yolo_and_goes_back(
    ultralytics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    teacher = run(block_with("yolov8l.pt").replace("yolov8l.pt", "yolo11n.yaml").replace("640, 640", SIZE))[
        "teacher"
    ]
    assert teacher.pyramid_channels == {8: 64, 16: 128, 32: 256}
    student = yolo_student("yolov8n.yaml")
    result = distilled(teacher, student, tmp_path, monkeypatch)
    assert result.status == "finished"
    monkeypatch.chdir(tmp_path)
    run(block_with("program.save"), student=student, result=result)
    again = ultralytics.YOLO("student.pt")
    assert list(again.names.values()) == list(DIGITS)
    image = example()[0][0]
    pixels = (image * 255).round().byte()
    theirs = again.predict(
        pixels.permute(1, 2, 0).flip(2).numpy(), imgsz=96, conf=0.001, device="cpu", verbose=False
    )[0]
    student.exported.half().float()  # as their file is
    (ours,) = student.eval()([pixels])
    assert len(ours["scores"]) > 20
    apart = [float((theirs.boxes.conf - score).abs().min()) for score in ours["scores"][:20]]
    assert sum(each < 5e-3 for each in apart) >= 18  # what ties is suppressed one way or the other


def test_the_program_is_not_taken_for_its_module(ultralytics: Any) -> None:
    plain = detdistill.Preprocess(mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(UserError, match=r"a YOLO is a program around a module .*`model.model`"):
        detdistill.wrap(ultralytics.YOLO("yolov8n.yaml"), {8: "model.15"}, plain)


# --- MMDetection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", ["retinanet/retinanet_r18_fpn_1x_coco.py", "rtmdet/rtmdet_tiny_8xb32-300e_coco.py"]
)
def test_mmdetection(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("mmdet.models", reason="MMDetection with mmcv's operators is not installed")
    pytest.importorskip("mmdet.utils").register_all_modules()
    structures = pytest.importorskip("mmdet.structures")
    path = Path(inspect.getfile(models)).parents[1] / ".mim" / "configs" / config
    if not path.is_file():
        pytest.skip(f"this MMDetection has no {path}")
    torch.manual_seed(0)
    named = block_with("init_detector").replace('"gfl_r101_fpn_ms-2x_coco.py"', repr(os.fspath(path)))
    named = named.replace('"gfl_r101.pth"', "None").replace("800, 1333", SIZE)
    named = named.replace(', 64: "neck:3", 128: "neck:4"', "")
    teacher = run(named)["teacher"]
    init_detector = pytest.importorskip("mmdet.apis").init_detector
    model = init_detector(path, None, device="cpu", cfg_options={"model.bbox_head.num_classes": len(DIGITS)})
    for name, parameter in model.bbox_head.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
        if name.endswith(("cls.bias", "rtm_cls.0.bias", "rtm_cls.1.bias", "rtm_cls.2.bias")):
            parameter.data.fill_(-1)
    given = {"model": model, "taps": {8: "neck:0", 16: "neck:1", 32: "neck:2"}, "classes": DIGITS}
    preprocess = detdistill.Preprocess(size=(96, 96), bgr="rtmdet" in config)
    student = run(block_with("InstanceData"), preprocess=preprocess, **given)["student"]
    image = example()[0][0]
    sample = structures.DetDataSample(
        metainfo={"img_shape": (96, 96), "ori_shape": (96, 96), "scale_factor": (1.0, 1.0)}
    )
    student.eval()
    with torch.no_grad():
        (ours,) = student([image])
        fed = model.data_preprocessor({"inputs": [image.flip(0) * 255], "data_samples": [sample]})
        theirs = model.predict(fed["inputs"], fed["data_samples"], rescale=False)[0].pred_instances
    assert len(theirs.scores) > 20
    torch.testing.assert_close(ours["scores"], theirs.scores, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours["boxes"], theirs.bboxes.clamp(0, 96), atol=0.1, rtol=0)
    assert distilled(teacher, student, tmp_path, monkeypatch).status == "finished"
