"""What the families promise beyond parity with torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detdistill.errors import UserError
from detdistill.models import Preprocess, build_model
from detdistill.models.base import Detector
from detdistill.models.families.fcos import match_cells
from detdistill.models.layers.heads import tower
from detdistill.recipe.models import FAMILIES as EVERY_FAMILY

FAMILIES = ["retinanet", "fcos", "gfl", "reppoints", "faster_rcnn"]

LOSSES = {
    "RetinaNet": {"classification", "bbox_regression"},
    "FCOS": {"classification", "bbox_regression", "bbox_ctrness"},
    "GFL": {"classification", "bbox_regression", "bbox_distribution"},
    "RepPoints": {"classification", "bbox_regression", "bbox_initial"},
    "FasterRCNN": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"},
}


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_lone_class_name_is_not_read_as_its_letters(family):
    with pytest.raises(UserError, match=r"classes is the word 'cat'.*give a list"):
        build_model(family, "cat", backbone="resnet18")


def small(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = build_model(
        family, 3, **{"backbone": "resnet18", "channels": 32, "score_threshold": 0.01, **options}
    )
    # Scores spread around the prior, so that detections differ from one another.
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone") and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    return model


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def target(*boxes: list[float]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.arange(len(boxes)) % 3,
    }


@pytest.mark.parametrize("build", FAMILIES)
@pytest.mark.parametrize("objects", [(1, 0), (0, 0)])
def test_losses_are_finite_without_boxes(build: Callable[..., Detector], objects: tuple[int, int]) -> None:
    model = small(build).train()
    targets = [target(*[[5.0, 5, 40, 50]] * count) for count in objects]
    losses = model([image(64, 96), image(64, 64, 1)], targets)
    assert set(losses) == LOSSES[type(model).__name__]
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("build", FAMILIES)
def test_an_image_is_seen_alike_whatever_it_is_batched_with(build: Callable[..., Detector]) -> None:
    """Exactly so where the padded size is the same; a larger companion adds padding, which convolutions see."""
    model = small(build).eval()
    own = image(90, 120)
    with torch.no_grad():
        (alone,) = model([own])
        together = model([image(64, 64, 1), own, image(96, 128, 2)])[1]
    assert len(alone["boxes"]) > 5
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("build", FAMILIES)
def test_detections_lie_in_the_original_image(build: Callable[..., Detector]) -> None:
    model = small(build, size=(64, 128)).eval()
    with torch.no_grad():
        found = model([image(30, 50), image(200, 150, 1)])
    for detections, (height, width) in zip(found, [(30, 50), (200, 150)], strict=True):
        boxes, scores = detections["boxes"], detections["scores"]
        assert len(boxes) > 5
        assert (boxes >= 0).all()
        assert (boxes[:, 0::2] <= width + 1e-3).all()
        assert (boxes[:, 1::2] <= height + 1e-3).all()
        assert (scores[:-1] >= scores[1:]).all()
        assert ((detections["labels"] >= 0) & (detections["labels"] < 3)).all()


@pytest.mark.parametrize("build", FAMILIES)
def test_tiny_images_and_few_levels_work(build: Callable[..., Detector]) -> None:
    model = small(build, strides=(8, 16))
    assert model.pyramid_channels == {8: 32, 16: 32}
    assert all(
        loss.isfinite() for loss in model.train()([image(20, 20)] * 2, [target([2.0, 2, 9, 9])] * 2).values()
    )
    model.eval()([image(9, 17)])


@pytest.mark.parametrize("build", FAMILIES)
def test_bf16_stays_close_to_fp32(build: Callable[..., Detector]) -> None:
    model = small(build).eval()  # BatchNorm in evaluation mode, or two images would be too few statistics
    model.training = True  # the detector itself trains: proposals are sampled
    outputs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model([image(64, 96)] * 2, [target([5.0, 5, 40, 50], [30.0, 10, 90, 60])] * 2)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        outputs.append(torch.stack(list(losses.values())))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.1, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (found,) = model.eval()([image(64, 96)])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


@pytest.mark.parametrize("build", FAMILIES)
def test_raw_predictions_are_as_the_contract_says(build: Callable[..., Detector]) -> None:
    model = small(build).train()
    batch = model.preprocess([image(64, 96), image(50, 60, 1)], [target([5.0, 5, 40, 50]), target()])
    pyramid = model.forward_features(batch)
    assert {stride: x.shape[1] for stride, x in pyramid.items()} == model.pyramid_channels
    head_outputs: Any = model.forward_head(pyramid, batch)
    if build == "faster_rcnn":
        count = sum(map(len, head_outputs.proposals))
        assert head_outputs.roi_logits_RQ.shape == (count, 4)
        assert head_outputs.roi_deltas_RQ4.shape == (count, 16)
        assert (
            [len(x) for x in head_outputs.roi_labels]
            == [len(x) for x in head_outputs.roi_targets]
            == [len(x) for x in head_outputs.proposals]
        )
        assert head_outputs.roi_labels[0].max() == 1  # label 0, after the background
        assert head_outputs.roi_labels[1].max() == 0
        assert max(map(len, head_outputs.proposals)) <= 512
        assert head_outputs.rpn.cls[8].shape == (2, 3, 8, 12)
        model.eval()
        assert model.forward_head(pyramid, batch).roi_labels is None
    else:
        anchors = 9 if build == "retinanet" else 1
        assert head_outputs.cls[8].shape == (2, anchors * 3, 8, 12)
        numbers = 4 * 17 if build == "gfl" else 4  # that encode a box
        assert head_outputs.box[16].shape == (2, anchors * numbers, 4, 6)
        assert (head_outputs.centerness is None) == (build != "fcos")


@pytest.mark.parametrize("build", FAMILIES)
def test_training_without_targets_says_so(build: Callable[..., Detector]) -> None:
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        small(build).train()([image(64, 64)])


@pytest.mark.parametrize("shape", [(2, 2000), (2000, 1), (1, 1)])
def test_thin_images_stay_images(shape: tuple[int, int]) -> None:
    batch = Preprocess(size=(96, 128))([torch.rand(3, *shape), torch.rand(3, 50, 80)])
    assert min(batch.sizes[0]) >= 1
    assert torch.isfinite(batch.images_N3HW).all()


def test_classes_are_numbers_unless_named() -> None:
    assert build_model("fcos", 3, backbone="resnet18", channels=16).classes == ("0", "1", "2")
    assert build_model("fcos", ("a", "b"), backbone="resnet18", channels=16).classes == ("a", "b")


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 8), (24, 3), (20, 2), (4, 1)])
def test_groups_of_a_narrow_head_keep_their_width(channels: int, groups: int) -> None:
    norm = tower(channels, 1, group_norm=True)[0][1]  # type: ignore[index]
    assert norm.num_groups == groups
    norm.train()(torch.rand(1, channels, 1, 1))


@pytest.mark.parametrize("seed", range(4))
def test_fcos_cells_answer_as_the_paper_says(seed: int) -> None:
    """Against the definition, cell by cell and object by object."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(12, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + torch.rand(12, 2, generator=generator) * 150 + 1], dim=1)
    levels = []
    for stride in (8, 16, 32):
        ys, xs = torch.meshgrid(*[torch.arange(0, 256, stride)] * 2, indexing="ij")
        center = torch.stack([xs, ys], dim=2).reshape(-1, 2).float()
        levels.append(torch.cat([center - stride / 2, center + stride / 2], dim=1))
    expected = []
    for cells, (low, high) in zip(levels, [(0, 64), (64, 128), (128, float("inf"))], strict=True):
        stride = float(cells[0, 2] - cells[0, 0])
        for cell in cells.tolist():
            x, y = (cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2
            fitting = []
            for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
                sides = (x - x0, y - y0, x1 - x, y1 - y)
                off = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2))
                if min(sides) > 0 and low < max(sides) < high and off < 1.5 * stride:
                    fitting.append(((x1 - x0) * (y1 - y0), i))
            expected.append(min(fitting)[1] if fitting else -1)
    got = match_cells(boxes, levels)
    assert (got >= 0).sum() > 10
    assert got.tolist() == expected


def test_fcos_boxes_are_alive_before_training() -> None:
    """A box output that starts at 0 behind a ReLU gets no gradient, and AP stays 0."""
    torch.manual_seed(0)
    model = build_model("fcos", 3, backbone="resnet18", channels=32)
    batch = model.preprocess([image(128, 128)], [target([10, 10, 60, 60])])
    head_outputs = model.forward_head(model.forward_features(batch), batch)
    alive = torch.cat([distances.flatten() for distances in head_outputs.box.values()]) > 0
    assert alive.float().mean() > 0.99
    model.losses(head_outputs, batch)["bbox_regression"].backward()
    assert model.head.box.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.rand(3, 32, 32) * 255], "values up to 25"),
        ([torch.ones(3, 32, 32, dtype=torch.int32)], "is torch.int32"),
        ([torch.rand(3, 0, 32)], "has shape"),
        ([torch.rand(1, 32, 32)], "has shape"),
    ],
)
def test_images_of_another_kind_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        build_model(
            "fcos", ["a", "b"], backbone="mobilenetv3_small_050", channels=8, strides=(8, 16), head_depth=1
        ).eval()(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.tensor([[5.0, 5.0, 2.0, 9.0]])}, "x1 ≤ x2"),
        ({"boxes": torch.tensor([[5.0, 5.0, float("nan"), 9.0]])}, "x1 ≤ x2"),
        ({"labels": torch.tensor([0, 1])}, "boxes of shape"),
        ({"labels": torch.tensor([9])}, "has the label 9: labels are 0 to"),
        ({"labels": torch.tensor([-1])}, "has the label -1"),
    ],
)
def test_targets_that_would_train_something_else_are_refused(change, message):
    target = {"boxes": torch.tensor([[5.0, 5.0, 20.0, 20.0]]), "labels": torch.tensor([0])} | change
    model = build_model(
        "fcos", ["a", "b"], backbone="mobilenetv3_small_050", channels=8, strides=(8, 16), head_depth=1
    ).train()
    with pytest.raises(ValueError, match=message):
        model([torch.rand(3, 32, 32)], [target])
    with pytest.raises(ValueError, match="give one for each image"):
        model([torch.rand(3, 32, 32)], [target, target])
