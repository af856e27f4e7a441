"""With one random state dict our detectors give torchvision's own losses and detections."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection._utils import Matcher, overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN as TorchvisionFasterRCNN
from torchvision.ops import FrozenBatchNorm2d, box_iou, generalized_box_iou_loss

from detdistill.errors import UserError
from detdistill.models import build_model, load_torchvision
from detdistill.models.base import Detector
from detdistill.models.checkpoints.torchvision import COCO_CATEGORIES, conventions_of, is_torchvision
from detdistill.models.layers.heads import giou_loss, match_boxes

SIZE = (160, 224)
CATEGORIES = ("background", "cat", "dog", "bird", "horse", "sheep")
EVERYTHING = 10**6  # a sample so large that it takes all: then both sides sample the same
TWO_STAGE = ("faster_rcnn", "mask_rcnn")


def torchvision_model(family: str) -> nn.Module:
    builder: dict[str, Any] = {
        "retinanet": detection.retinanet_resnet50_fpn,
        "fcos": detection.fcos_resnet50_fpn,
        "faster_rcnn": detection.fasterrcnn_resnet50_fpn,
        "mask_rcnn": detection.maskrcnn_resnet50_fpn,
    }
    options: dict[str, Any] = {"min_size": SIZE[0], "max_size": SIZE[1], "num_classes": len(CATEGORIES)}
    if family in TWO_STAGE:
        options |= {"rpn_batch_size_per_image": EVERYTHING, "box_batch_size_per_image": EVERYTHING}
    torch.manual_seed(1)  # whichever tests ran before
    model = builder[family](weights=None, weights_backbone=None, **options)
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Head weights and BatchNorm statistics under which everything has something to do."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "head" in name and parameter.ndim == 4:
            nn.init.normal_(parameter, std=0.02)
        if "bbox_reg" in name and name.endswith("bias"):
            nn.init.constant_(parameter, 2.0)  # FCOS: boxes of some size
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def our_model(family: str, theirs: nn.Module) -> Detector:
    classes, options = CATEGORIES, {}
    if family in TWO_STAGE:
        classes, options = CATEGORIES[1:], {"rpn_samples": EVERYTHING, "roi_samples": EVERYTHING}
    if family == "fcos":
        options = {"score_threshold": 0.2, "nms_threshold": 0.6}  # torchvision's defaults
    model: Any = build_model(family, classes, size=SIZE, **options)
    report = load_torchvision(model, theirs.state_dict(), CATEGORIES)
    assert report.complete
    return model


@pytest.fixture(params=["retinanet", "fcos", *TWO_STAGE], scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, Detector, int]:
    """(torchvision's model, ours, how much larger their labels are)."""
    theirs = torchvision_model(request.param)
    return theirs, our_model(request.param, theirs), int(request.param in TWO_STAGE)


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, 150, 220, generator=generator), torch.rand(3, 200, 130, generator=generator)]


def targets(shift: int, boxes_of_second: int = 1) -> list[dict[str, Tensor]]:
    first = torch.tensor([[10.0, 20, 110, 130], [50, 50, 90, 80], [5, 5, 215, 140], [60, 60, 75, 78]])
    second = torch.tensor([[20.0, 30, 100, 180]])[:boxes_of_second]
    labels = torch.tensor([1, 4, 2, 3]), torch.tensor([2])[:boxes_of_second]
    masks = ellipses(first, 150, 220), ellipses(second, 200, 130)
    return [
        {"boxes": b, "labels": y + shift, "masks": m}
        for b, y, m in zip((first, second), labels, masks, strict=True)
    ]


def ellipses(boxes: Tensor, height: int, width: int) -> Tensor:
    """(K, height, width) uint8: what fills each box but for its corners."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    center, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    across, down = (
        (v - c[:, None, None]) / r[:, None, None] for v, c, r in zip((x, y), center.T, radius.T, strict=True)
    )
    return (across**2 + down**2 <= 1).byte()


@pytest.mark.parametrize("boxes_of_second", [1, 0])
def test_losses_are_torchvisions(
    pair: tuple[nn.Module, Detector, int], images: list[Tensor], boxes_of_second: int
) -> None:
    theirs, ours, shift = pair
    # BatchNorm in evaluation mode, so that the models stay as they are for the other tests.
    for model in (theirs, ours):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    expected = theirs(images, targets(shift, boxes_of_second))
    got = ours(images, targets(0, boxes_of_second))
    assert got.keys() == expected.keys()
    for name, loss in expected.items():
        assert loss > 0
        torch.testing.assert_close(got[name], loss, rtol=1e-5, atol=1e-5)


def test_detections_are_torchvisions(pair: tuple[nn.Module, Detector, int], images: list[Tensor]) -> None:
    theirs, ours, shift = pair
    theirs.eval()
    ours.eval()
    ours.max_detections = getattr(theirs, "detections_per_img", 100)  # type: ignore[assignment]
    with torch.no_grad():
        expected, got = theirs(images), ours(images)
    for theirs_found, ours_found in zip(expected, got, strict=True):
        assert len(theirs_found["boxes"]) > 5
        torch.testing.assert_close(ours_found["boxes"], theirs_found["boxes"], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(ours_found["scores"], theirs_found["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(ours_found["labels"] + shift, theirs_found["labels"])
        assert ours_found.keys() == theirs_found.keys()
        if "masks" in theirs_found:
            assert ours_found["masks"].std() > 0.1
            torch.testing.assert_close(ours_found["masks"], theirs_found["masks"], rtol=1e-4, atol=1e-4)


def test_class_rows_are_chosen_by_name(pair: tuple[nn.Module, Detector, int], images: list[Tensor]) -> None:
    theirs, ours, shift = pair
    few: Any = build_model(ours.family or "", ("sheep", "unicorn", "cat"), size=SIZE)
    with pytest.raises(UserError, match="unicorn"):
        load_torchvision(few, theirs.state_dict(), CATEGORIES)
    report = load_torchvision(few, theirs.state_dict(), CATEGORIES, require=("backbone",))
    assert report.absent_classes == ["unicorn"]
    few.eval()
    ours.eval()
    with torch.no_grad():
        outputs = []
        for model in (ours, few):
            batch = model.preprocess(images)
            outputs.append(model.forward_head(model.forward_features(batch), batch))
    if shift:
        torch.testing.assert_close(
            outputs[1].roi_logits_RQ[:, [0, 1, 3]], outputs[0].roi_logits_RQ[:, [0, 5, 1]]
        )
        if ours.needs_masks:
            full, part = (model.state_dict()["mask_branch.heads.0.mask.weight"] for model in (ours, few))
            assert torch.equal(part[[0, 1, 3]], full[[0, 5, 1]])
        return
    full, part = (
        head_outputs.cls[8].unflatten(1, (-1, len(m.classes)))
        for head_outputs, m in zip(outputs, (ours, few), strict=True)
    )
    torch.testing.assert_close(part[:, :, [0, 2]], full[:, :, [5, 1]])


def test_earlier_names_load_too(pair: tuple[nn.Module, Detector, int]) -> None:
    """Published files may hold the names from before torchvision 0.13; torchvision itself still takes them."""
    theirs, ours, _ = pair
    old = {}
    for name, tensor in theirs.state_dict().items():
        name = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.", r"\1.", name)
        name = re.sub(r"(rpn\.head\.conv)\.0\.0\.", r"\1.", name)
        name = re.sub(r"mask_head\.(\d)\.0\.", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}.", name)
        if type(ours).__name__ == "RetinaNet":
            name = re.sub(r"conv\.(\d)\.0\.", lambda match: f"conv.{2 * int(match[1])}.", name)
        old[name] = tensor
    theirs.load_state_dict(dict(old))
    assert is_torchvision(old)
    assert load_torchvision(ours, old, CATEGORIES).complete


def test_norm_epsilon_of_the_published_weights_is_kept() -> None:
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    theirs = TorchvisionFasterRCNN(backbone, len(CATEGORIES), min_size=SIZE[0], max_size=SIZE[1])
    randomize(theirs)
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_var"):
            buffer[::2] = 2e-6  # so small that an epsilon of 1e-5 would more than halve the channel
        if name.endswith(".weight"):
            buffer[::2] = 1e-3
    overwrite_eps(theirs, 0.0)
    image = torch.rand(1, 3, 64, 96)
    expected = theirs.eval().backbone(image)
    for norm in ("frozen", "batch"):
        ours = build_model("faster_rcnn", CATEGORIES[1:], backbone="resnet50", norm=norm)
        load_torchvision(ours, theirs.state_dict(), CATEGORIES, norm_epsilon=0.0)
        got = ours.eval().neck(ours.backbone(image))
        for mine, other in zip(got.values(), expected.values(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize(
    ("family", "weights", "classes"),
    [
        ("retinanet", detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1, 91),
        ("fcos", detection.FCOS_ResNet50_FPN_Weights.COCO_V1, 91),
        ("faster_rcnn", detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1, 90),
        ("mask_rcnn", detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1, 90),
    ],
)
def test_parameter_counts_are_the_published_ones(family: str, weights: Any, classes: int) -> None:
    with torch.device("meta"):
        model = build_model(family, classes, norm="frozen")
    assert sum(parameter.numel() for parameter in model.parameters()) == weights.meta["num_params"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("high", "low", "keep_best"), [(0.5, 0.4, True), (0.7, 0.3, True), (0.5, 0.5, False)])
def test_matching_is_torchvisions(seed: int, high: float, low: float, keep_best: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Whole coordinates, so that ties happen.
    corners = torch.randint(0, 12, (300, 2), generator=generator).float()
    anchors = torch.cat([corners, corners + torch.randint(1, 9, (300, 2), generator=generator)], dim=1)
    objects = anchors[:7] + torch.tensor([0.0, 0.0, 1.0, 1.0])
    expected = Matcher(high, low, allow_low_quality_matches=keep_best)(box_iou(objects, anchors))
    assert torch.equal(match_boxes(objects, anchors, high, low, keep_best), expected)


def test_rows_of_a_torchvision_file_are_understood() -> None:
    def state(rows: int) -> dict[str, Tensor]:
        return {
            "head.classification_head.cls_logits.bias": torch.zeros(9 * rows),
            "head.regression_head.bbox_reg.bias": torch.zeros(36),
        }

    assert conventions_of(state(91), ["cat"]) == (COCO_CATEGORIES, 0.0)
    assert conventions_of(state(2), ["cat", "dog"])[0] == ("cat", "dog")
    assert conventions_of(state(3), ["cat", "dog"])[0][1:] == ("cat", "dog")
    assert conventions_of({"roi_heads.box_predictor.cls_score.bias": torch.zeros(3)}, ["a", "b"])[0][1:] == (
        "a",
        "b",
    )
    with pytest.raises(UserError, match="5 class rows"):
        conventions_of(state(5), ["cat", "dog"])


def test_giou_is_torchvisions_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    corner, sides = (torch.rand(2, 500, 2, generator=generator) * scale for scale in (20.0, 12.0))
    sides[0, :50] = 0  # boxes without an area, too
    a, b = torch.cat([corner, corner + sides], dim=2)
    b[50:80] = a[50:80]
    found = []
    for loss in (giou_loss, generalized_box_iou_loss):
        ours = a.clone().requires_grad_()
        value = loss(ours, b)
        value.sum().backward()
        assert ours.grad is not None
        found.append((value.detach(), ours.grad))
    assert (found[0][0] > 1).any()  # some do not touch
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-7)
