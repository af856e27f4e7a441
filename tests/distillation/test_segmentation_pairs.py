"""Every method on a pair of segmenters: those for maps run, those for boxes refuse in one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detdistill.distillation.methods import METHODS
from detdistill.distillation.methods.ima import IMALoss
from detdistill.distillation.pair import Pair
from detdistill.distillation.regions import class_labels
from detdistill.errors import UserError
from detdistill.models import EncoderDecoder, Preprocess, build_model

from .pairs import SEGMENTATION, assert_same, detector, snapshot

CLASSES = ("road", "sky", "tree")
ABLE = SEGMENTATION
UNABLE = [name for name in METHODS if name not in ABLE]


def student(preprocess=None) -> EncoderDecoder:
    torch.manual_seed(0)
    return with_input(build_model("pspnet", CLASSES, backbone="mobilenetv3_small_050", channels=16), preprocess)


def teacher(classes=CLASSES, preprocess=None) -> EncoderDecoder:
    torch.manual_seed(1)
    model = build_model("deeplabv3", classes, backbone="mobilenetv3_small_050", channels=24)
    return with_input(model, preprocess)


def with_input(model, preprocess):
    model.preprocessor = preprocess or model.preprocessor
    return model


def batch(size=(64, 48), ignored=False, seed=0) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator) for _ in range(2)]
    labels_NHW = torch.randint(0, 3, (2, *size), generator=generator, dtype=torch.uint8)
    labels_NHW[:, :20, :40] = 0
    labels_NHW[1, :, 40:] = 255
    labels_NHW = torch.full_like(labels_NHW, 255) if ignored else labels_NHW
    return images, [{"semantic": labels_HW} for labels_HW in labels_NHW]


@pytest.mark.parametrize("name", ABLE)
def test_it_teaches_a_segmenter(name: str) -> None:
    pair = Pair(student(), teacher(), [name]).train()
    before = snapshot(pair.teacher)
    losses = pair(*batch())
    assert list(losses) == ["cross_entropy", "cross_entropy_aux", name]
    assert losses[name].isfinite()
    losses[name].backward()
    gradients = [p.grad for p in pair.student.backbone.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)
    assert_same(before, snapshot(pair.teacher))


@pytest.mark.parametrize("name", ABLE)
def test_finite_where_nothing_is_labeled(name: str) -> None:
    losses = Pair(student(), teacher(), [name]).train()(*batch(ignored=True))
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", ABLE)
def test_finite_in_half_precision(name: str) -> None:
    pair = Pair(student(), teacher(), [name]).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = pair(*batch())
    sum(losses.values()).backward()
    assert losses[name].isfinite()
    assert losses[name].dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in pair.parameters())


@pytest.mark.parametrize("name", UNABLE)
def test_methods_for_boxes_refuse_and_name_the_others(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is not for segmentation; these are: ima, ") as refused:
        Pair(student(), teacher(), [name])
    assert "\n" not in str(refused.value)


def test_one_task_for_both() -> None:
    with pytest.raises(UserError, match="the teacher is for detection and the student for segmentation"):
        Pair(student(), detector())


def test_the_name_alone_means_the_preset_for_segmentation() -> None:
    ima = Pair(student(), teacher(), ["ima"]).methods["ima"]
    assert (ima.loss.instance, ima.loss.mask.ratio) == ("class_region", 0.0)
    with pytest.raises(UserError, match="instance 'box' is for detection, and this pair for segmentation"):
        Pair(student(), teacher(), [{"ima": {"instance": "box"}}])
    with pytest.raises(UserError, match="instance 'class_region' is for segmentation"):
        Pair(detector(), detector(channels=24), [{"ima": {"instance": "class_region"}}])


def test_ima_sees_the_regions_of_the_labels() -> None:
    """The method's term is the loss of the same maps and of labels taken from the cells' centers."""
    pair = Pair(student(), teacher(), [{"ima": {"min_region": 2}}]).eval()
    images, targets = batch()
    with torch.no_grad():
        term = pair(images, targets)["ima"]
        maps = [model.forward_features(model.preprocess(images))[8] for model in (pair.student, pair.teacher)]
        adapted = pair.methods["ima"].align.adapters["8"](maps[0])
        centers = torch.stack([target["semantic"] for target in targets])[:, 4::8, 4::8]
        options = {"instance": "class_region", "mask": {"ratio": 0.0}, "alpha": 100.0, "min_region": 2}
        expected = IMALoss(**options)(adapted, maps[1], labels_NHW=centers)
    torch.testing.assert_close(term, expected)


def test_labels_on_the_map_do_not_see_padding() -> None:
    model = student()
    images, targets = batch(size=(40, 44))
    images[1], targets[1] = torch.rand(3, 64, 64), {"semantic": torch.ones(64, 64, dtype=torch.uint8)}
    labels = class_labels(model.preprocess(images, targets), torch.zeros(2, 1, 8, 8))
    assert torch.equal(labels[0, :5, :5], targets[0]["semantic"][4::8, 4::8].long())
    assert (labels[0, 5:] == 255).all()
    assert (labels[0, :, 6:] == 255).all()
    assert (labels[1] == 1).all()


@pytest.mark.parametrize("name", ABLE)
def test_inputs_may_differ_in_size(name: str) -> None:
    small, large = (Preprocess(size=size, divisor=8) for size in ((48, 64), (96, 128)))
    pair = Pair(student(small), teacher(preprocess=large), [name])
    losses = pair.train()(*batch(size=(80, 100)))
    assert losses[name].isfinite()
    sum(losses.values()).backward()


def test_a_teacher_of_other_classes_teaches_by_its_maps() -> None:
    other = teacher(classes=("tree", "car"))
    pair = Pair(student(), other, ["ima"])
    assert pair.classes.missing == ("road", "sky")
    assert pair.train()(*batch())["ima"].isfinite()


def test_weight_0_is_the_student_alone() -> None:
    values = []
    for pair in (Pair(student()), Pair(student(), teacher(), [{"mimic": {"weight": 0}}])):
        torch.manual_seed(2)  # of dropout
        values.append({name: value.item() for name, value in pair.train()(*batch()).items()})
    assert values[0] == values[1]
