"""Mask R-CNN beyond its parity with torchvision; what it shares with Cascade Mask R-CNN is tried on both."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detdistill.models import Preprocess, build_model
from detdistill.models.base import IMAGENET_MEAN, IMAGENET_STD
from detdistill.models.build import WITHOUT_MASKS
from detdistill.models.layers.masks import crop_masks, mask_loss
from detdistill.recipe.models import families

WITH_MASKS = ["mask_rcnn", "cascade_mask_rcnn"]


def small(family, **options):
    torch.manual_seed(0)
    model = build_model(
        family, 3, **{"backbone": "resnet18", "channels": 16, "score_threshold": 0.01, **options}
    )
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone") and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    return model


def image(height, width, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def target(height, width, *boxes):
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = True  # the left half of the box
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.arange(len(boxes)) % 3, "masks": masks}


@pytest.mark.parametrize("build", WITH_MASKS)
@pytest.mark.parametrize("objects", [(2, 0), (0, 0)])
def test_every_parameter_learns_and_nothing_is_nan_without_objects(build, objects):
    model = small(build).train()
    boxes = [(5, 5, 40, 50), (50, 10, 90, 30)]
    targets = [target(64, 96, *boxes[:count]) for count in objects]
    losses = model([image(64, 96), image(64, 96, 1)], targets)
    assert (losses["loss_mask"] > 0) == (sum(objects) > 0)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if sum(objects):
        # Class 1 is the first object's: its mask learns, that of the background, class 0, does not.
        for head in model.mask_branch.heads:
            assert head.mask.bias.grad[1] != 0
            assert head.mask.bias.grad[0] == 0


@pytest.mark.parametrize("build", WITH_MASKS)
def test_the_global_seed_decides_what_is_sampled(build):
    model = small(build, roi_samples=16).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model([image(64, 96)], [target(64, 96, (5, 5, 40, 50), (50, 10, 90, 30))]))
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    assert any(not torch.equal(losses[0][name], losses[2][name]) for name in losses[0])


@pytest.mark.parametrize("build", WITH_MASKS)
def test_masks_of_detections_fill_their_boxes_in_the_original_image(build):
    model = small(build, size=(64, 128)).eval()
    with torch.no_grad():
        found = model([image(30, 50), image(200, 150, 1)])
    for detections, size in zip(found, [(30, 50), (200, 150)], strict=True):
        boxes, masks = detections["boxes"], detections["masks"]
        assert len(boxes) > 5
        assert masks.shape == (len(boxes), 1, *size)
        assert masks.dtype == torch.float32
        assert masks.min() >= 0
        assert masks.max() <= 1
        for box, mask in zip(boxes, masks.squeeze(1), strict=True):
            x1, y1, x2, y2 = box.tolist()
            rows, columns = torch.where(mask > 0)
            # A mask has a rim of one cell of the 28 around its box, and goes to whole pixels.
            rim_x, rim_y = (x2 - x1) / 28 + 2, (y2 - y1) / 28 + 2
            assert columns.min() >= x1 - rim_x
            assert columns.max() <= x2 + rim_x
            assert rows.min() >= y1 - rim_y
            assert rows.max() <= y2 + rim_y


@pytest.mark.parametrize("build", WITH_MASKS)
def test_no_detection_has_no_mask(build):
    (found,) = small(build, score_threshold=0.999).eval()([image(40, 60)])
    assert found["masks"].shape == (0, 1, 40, 60)


@pytest.mark.parametrize("build", WITH_MASKS)
def test_bf16_stays_close_to_fp32(build):
    model = small(build).eval()
    model.training = True  # only the detector itself: proposals are sampled, BatchNorm stays
    outputs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model([image(64, 96)], [target(64, 96, (5, 5, 40, 50), (30, 10, 90, 60))])
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        outputs.append(torch.stack(list(losses.values())))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.1, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (found,) = model.eval()([image(64, 96)])
    assert found["masks"].dtype == torch.float32


# --- targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 100), (37, 51), (90, 90)])
def test_masks_are_resized_as_torchvision_does(size):
    images = [image(50, 70), image(80, 41, 1)]
    targets = [target(50, 70, (5, 5, 40, 45), (20, 10, 69, 30)), target(80, 41, (3, 4, 30, 70))]
    theirs = GeneralizedRCNNTransform(*size, IMAGENET_MEAN, IMAGENET_STD)
    bytes_of = [{**one, "masks": one["masks"].byte()} for one in targets]
    _, expected = theirs(images, bytes_of)
    batch = Preprocess(size=size)(images, targets, with_masks=True)
    for got, wanted, (height, width) in zip(batch.targets, expected, batch.sizes, strict=True):
        assert torch.equal(got["masks"], wanted["masks"])
        assert got["masks"].shape[1:] == (height, width)


def test_masks_are_left_out_where_nothing_learns_from_them():
    targets = [target(64, 64, (5, 5, 40, 50))]
    for model in (
        build_model("faster_rcnn", 3, backbone="resnet18", channels=16).train(),
        small("mask_rcnn").eval(),
    ):
        assert "masks" not in model.preprocess([image(64, 64)], targets).targets[0]
    assert "masks" in small("mask_rcnn").train().preprocess([image(64, 64)], targets).targets[0]
    assert "masks" in targets[0]


@pytest.mark.parametrize("build", WITH_MASKS)
def test_boxes_alone_are_refused_in_training(build):
    targets = [{name: value for name, value in target(64, 64, (5, 5, 40, 50)).items() if name != "masks"}]
    with pytest.raises(ValueError, match=r"learns from masks.*faster_rcnn, cascade_rcnn"):
        small(build).train()([image(64, 64)], targets)
    small(build).eval()([image(64, 64)], targets)


def test_what_a_region_should_say_by_hand():
    """A region of 28 × 28 pixels has a cell for each pixel, sampled in its middle: between four pixels."""
    masks = torch.zeros(2, 40, 60, dtype=torch.uint8)
    masks[1, :, 20:] = 1
    got = crop_masks(
        masks, torch.tensor([[10.0, 5.0, 38.0, 33.0], [10.0, 5.0, 38.0, 33.0]]), torch.tensor([1, 0])
    )
    row = [0.0] * 9 + [0.5] + [1.0] * 18  # cell 9 is between pixels 19 and 20
    assert got[0].tolist() == [pytest.approx(row)] * 28
    assert got[1].sum() == 0


def test_the_loss_by_hand():
    logits = torch.zeros(2, 28, 28, requires_grad=True)
    targets = torch.zeros(2, 28, 28)
    targets[0] = 1
    assert mask_loss(logits, targets).item() == pytest.approx(math.log(2))
    assert mask_loss(logits + 1, targets).item() == pytest.approx(
        (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2
    )
    assert mask_loss(logits[:0], targets[:0]).item() == 0


def test_the_table_of_families_with_masks_is_right():
    for name, config in families().items():
        if name.endswith("rcnn"):
            model = build_model(name, 2, backbone="resnet18", channels=8)
            assert model.needs_masks == config.learns_masks == (name in WITHOUT_MASKS)
            assert (model.mask_branch is not None) == model.needs_masks
    assert set(WITHOUT_MASKS.values()) == {"faster_rcnn", "cascade_rcnn"}
