"""torchvision's segmenters, wrapped: what they answer and learn is what torchvision's own code says."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

import detdistill
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models import Preprocess, build_model
from detdistill.models.base import Segmenter

CLASSES = ("road", "sky", "tree")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TAPS = {16: "classifier.3"}


def torchvision_model(seed=0, aux=None):
    torch.manual_seed(seed)
    return deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=len(CLASSES), aux_loss=aux
    ).eval()


def out(model, output, batch):
    return output["out"]


def wrapped(model=None, **options):
    preprocess = options.pop("preprocess", Preprocess(divisor=16))
    options.setdefault("logits", out)
    return detdistill.wrap(model or torchvision_model(), TAPS, preprocess, CLASSES, **options)


def classifier_alone(model, images, batch):
    return model.classifier(model.backbone(images)["out"])


def example(size=(64, 96)):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for _ in range(2)]
    labels_NHW = torch.randint(0, 3, (2, *size), generator=generator)
    labels_NHW[0, :10] = 255
    return images, [{"semantic": labels_HW.to(torch.uint8)} for labels_HW in labels_NHW]


def normalized(images):
    return torch.stack([(image - MEAN[:, None, None]) / STD[:, None, None] for image in images])


def test_its_label_maps_are_torchvisions() -> None:
    model = torchvision_model()
    segmenter = wrapped(model).eval()
    assert isinstance(segmenter, Segmenter)
    images, _ = example()
    with torch.no_grad():
        expected = model(normalized(images))["out"].argmax(dim=1)
        found = segmenter(images)
    for one, labels_HW in zip(found, expected, strict=True):
        assert torch.equal(one["semantic"], labels_HW)


def test_it_learns_by_the_cross_entropy_of_its_logits() -> None:
    model = torchvision_model()
    segmenter = wrapped(copy.deepcopy(model)).train()
    images, targets = example()
    labels_NHW = torch.stack([target["semantic"] for target in targets]).long()
    gradients = []
    for losses in (
        lambda: segmenter(images, targets)["cross_entropy"],
        lambda: F.cross_entropy(model.train()(normalized(images))["out"], labels_NHW, ignore_index=255),
    ):
        torch.manual_seed(1)  # of dropout
        value = losses()
        value.backward()
        gradients.append(value.detach())
    torch.testing.assert_close(*gradients)
    for ours, theirs in zip(segmenter.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3)


def test_losses_of_its_own_see_all_that_it_answered() -> None:
    def losses(model, output, batch):
        labels_NHW = batch.semantic_labels()
        return {name: F.cross_entropy(x, labels_NHW, ignore_index=255) for name, x in output.items()}

    segmenter = wrapped(torchvision_model(aux=True), losses=losses).train()
    assert set(segmenter(*example())) == {"out", "aux"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ima", {"min_region": 2}),  # the map has 4×6 cells
        ("kd", {}),
        ("cwd", {}),
        ("dist", {}),
        ("skds", {}),
        ("cirkd", {"pixel_places": 40, "region_places": 6}),
    ],
)
def test_it_teaches_by_its_maps_and_its_logits(name, options) -> None:
    torch.manual_seed(2)
    student = build_model("pspnet", CLASSES, backbone="mobilenetv3_small_050", channels=8)
    student.preprocessor = Preprocess(divisor=16)
    pair = Pair(student, wrapped(call=classifier_alone, logits=lambda m, output, b: output), [{name: options}])
    losses = pair.train()(*example())
    assert losses[name].isfinite()
    losses[name].backward()
    assert any(p.grad is not None and p.grad.any() for p in student.backbone.parameters())


def test_it_is_taught() -> None:
    pair = Pair(wrapped(), wrapped(torchvision_model(seed=1)), ["ima", "kd"])
    losses = pair.train()(*example())
    assert list(losses) == ["cross_entropy", "ima", "kd"]
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in pair.student.parameters())


def test_a_student_is_trained_and_measured_as_any_other(tmp_path) -> None:
    training = {"max_steps": 1, "batch_size": 2, "workers": 0, "device": "cpu", "evaluate_every": 0}
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        write_split(tmp_path / "data", split)
    (tmp_path / "data" / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    model = torchvision_model()
    result = detdistill.distill(
        wrapped(torchvision_model(seed=1)), wrapped(model), str(tmp_path / "data"), "kd",
        training=training, out=tmp_path / "run",
    )  # fmt: skip
    assert 0 <= result.metrics["mIoU"] <= 1


def write_split(root, split):
    from PIL import Image

    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True)
    images, targets = example((32, 48))
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        pixels = (image * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / "images" / split / f"{i}.png")
        Image.fromarray(target["semantic"].numpy()).save(root / "labels" / split / f"{i}.png")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"logits": lambda m, output, b: output}, r"gave a OrderedDict of 1 .*: return a tensor \(2 images, 3"),
        ({"logits": lambda m, output, b: output["out"][:, :2]}, r"gave a tensor \(2, 2, .*3 classes"),
        ({"decode": lambda *_: []}, "decode is for detectors, and logits makes it a segmenter"),
        ({"kind": "anchor"}, "kind is for detectors"),
        ({"losses": lambda *_: torch.zeros(())}, "return a dict of scalar tensors by name"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_line(options, told) -> None:
    with pytest.raises(UserError, match=told) as error:
        wrapped(**options).train()(*example())
    assert "\n" not in str(error.value)


def test_classes_are_needed() -> None:
    with pytest.raises(UserError, match="classes is missing"):
        detdistill.wrap(torchvision_model(), TAPS, Preprocess(), logits=out)
    with pytest.raises(UserError, match="logits goes with taps"):
        detdistill.wrap(nn.Identity(), logits=out)
