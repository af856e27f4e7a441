"""RepPoints against its steps taken one cell, one point and one object after the other, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.models import resnet50

from detdistill.models import build_model
from detdistill.models.base import DenseOutputs
from detdistill.models.families.reppoints import (
    TAPS,
    RepPointsHead,
    in_strides,
    look_at,
    match_first_boxes,
    match_nearest,
    moment_boxes,
    scale_gradient,
)
from detdistill.models.layers.heads import IGNORED, UNMATCHED

STRIDES = (8, 16, 32)


def cells_of(size, strides=STRIDES):
    """Squares (P_l, 4) of each level: centers at multiples of the stride from 0, rows first."""
    levels = []
    for stride in strides:
        center = [(x, y) for y in range(0, size, stride) for x in range(0, size, stride)]
        levels.append([(x - stride / 2, y - stride / 2, x + stride / 2, y + stride / 2) for x, y in center])
    return [np.array(level) for level in levels]


def random_boxes(count, seed, low=2.0, high=120.0, size=96):
    generator = np.random.default_rng(seed)
    corner = generator.uniform(-10, size, (count, 2))
    sides = np.exp(generator.uniform(math.log(low), math.log(high), (count, 2)))
    return np.concatenate([corner, corner + sides], axis=1)


def iou(a, b):
    sides = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]))
    return sides.prod() / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - sides.prod())


def tensors(arrays):
    return [torch.tensor(array, dtype=torch.float32) for array in arrays]


# --- points and boxes ------------------------------------------------------------------------------------


def test_the_moments_of_a_square_of_points():
    points = torch.tensor(TAPS, dtype=torch.float32).view(1, 18, 1, 1) * 3
    deviation = 3 * math.sqrt(6 / 8)  # of -1, 0 and 1, three times each, with n - 1
    transfer = torch.tensor([math.log(2), math.log(0.5)])
    box = moment_boxes(points, transfer).flatten().tolist()
    assert box == pytest.approx([-2 * deviation, -deviation / 2, 2 * deviation, deviation / 2])


def test_moments_as_by_hand():
    generator = np.random.default_rng(0)
    points, transfer = generator.normal(size=(2, 18, 3, 4)) * 5, generator.normal(size=2)
    got = moment_boxes(torch.tensor(points), torch.tensor(transfer))
    for n, row, column in np.ndindex(2, 3, 4):
        y, x = points[n, 0::2, row, column], points[n, 1::2, row, column]
        half_x, half_y = np.std(x, ddof=1) * np.exp(transfer[0]), np.std(y, ddof=1) * np.exp(transfer[1])
        wanted = [x.mean() - half_x, y.mean() - half_y, x.mean() + half_x, y.mean() + half_y]
        assert got[n, :, row, column].tolist() == pytest.approx(wanted, rel=1e-5)


def test_the_multiplier_of_moments_learns_by_a_hundredth():
    points = torch.randn(1, 18, 2, 2, generator=torch.Generator().manual_seed(0))
    transfer = torch.zeros(2, requires_grad=True)
    moment_boxes(points, transfer)[:, 2:].sum().backward()
    deviation = [points[:, i::2].std(dim=1).sum().item() for i in (1, 0)]
    assert transfer.grad.tolist() == pytest.approx([0.01 * each for each in deviation], rel=1e-5)


def test_points_on_one_spot_have_finite_gradients():
    points = torch.full((1, 18, 2, 2), 0.5, requires_grad=True)
    boxes = moment_boxes(points, torch.zeros(2))
    torch.testing.assert_close(boxes, torch.full_like(boxes, 0.5))
    boxes[:, 2:].sum().backward()
    assert points.grad.isfinite().all()
    assert points.grad.sum() == pytest.approx(8)  # the spot moves as one


def test_a_share_of_the_gradient():
    x = torch.tensor([3.0, -0.1], requires_grad=True)
    y = scale_gradient(x, 0.1)
    assert y.equal(x)
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx([0.1, 0.1])


# --- the head --------------------------------------------------------------------------------------------


def head_and_map(channels=8, seed=0):
    torch.manual_seed(seed)
    head = RepPointsHead(channels, depth=1, num_classes=3)
    for parameter in head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(head.points.bias, std=2.0)
    torch.nn.init.normal_(head.moment_transfer, std=0.3)
    return head, torch.randn(2, channels, 5, 6)


def test_points_on_the_taps_make_an_ordinary_convolution():
    head, x = head_and_map()
    wanted = F.relu(F.conv2d(x, head.cls_look.weight, padding=1))
    torch.testing.assert_close(look_at(head.cls_look, x, torch.zeros(2, 18, 5, 6)), wanted)


def bilinear(x_CHW, y, x):
    """Features (C,) at a place between the cells; nothing lies outside the map."""
    height, width = x_CHW.shape[1:]
    total = np.zeros(len(x_CHW))
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += x_CHW[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def test_the_second_look_goes_through_the_points():
    """Tap k of the kernel sees the feature at the cell plus point k; classes and new points follow from it."""
    head, x = head_and_map()
    with torch.no_grad():
        cls, box = head.cls_tower(x), head.box_tower(x)
        outputs = head.outputs({8: cls}, {8: box})
        points = head.points(F.relu(head.points_conv(box)))
        torch.testing.assert_close(outputs.initial_box[8], moment_boxes(points, head.moment_transfer))
    assert points.abs().max() > 2
    value = {name: p.detach().double().numpy() for name, p in head.named_parameters()}
    logits, moved = np.zeros((2, 3, 5, 6)), np.zeros((2, 18, 5, 6))
    for n, row, column in np.ndindex(2, 5, 6):
        first = points[n, :, row, column].double().numpy()
        for tower, layer, name, out in ((cls, "cls_look", "cls", logits), (box, "box_look", "box", moved)):
            kernel = value[f"{layer}.weight"].reshape(8, 8, 9)
            total = sum(
                kernel[:, :, k]
                @ bilinear(tower[n].double().numpy(), row + first[2 * k], column + first[2 * k + 1])
                for k in range(9)
            )
            weight = value[f"{name}.weight"][:, :, 0, 0]
            out[n, :, row, column] = weight @ np.maximum(total, 0) + value[f"{name}.bias"]
        moved[n, :, row, column] += first
    np.testing.assert_allclose(outputs.cls[8].numpy(), logits, rtol=1e-3, atol=1e-3)
    wanted = moment_boxes(torch.tensor(moved), head.moment_transfer.detach())
    torch.testing.assert_close(outputs.box[8], wanted, rtol=1e-3, atol=1e-3)


def test_what_moves_the_first_points():
    """A tenth of the second look's gradient does, through where it looks; through what it adds to none."""
    head, x = head_and_map()
    box = x.clone().requires_grad_()
    outputs = head.outputs({8: x}, {8: box})
    points_conv = head.points_conv.weight
    (by_classes,) = torch.autograd.grad(outputs.cls[8].sum(), points_conv, retain_graph=True)
    (by_box,) = torch.autograd.grad(outputs.box[8].sum(), points_conv)

    points = head.points(F.relu(head.points_conv(box)))
    logits = head.cls(look_at(head.cls_look, x, points - head.taps))
    (whole,) = torch.autograd.grad(logits.sum(), points_conv)
    assert whole.abs().max() > 0
    torch.testing.assert_close(by_classes, 0.1 * whole, rtol=1e-3, atol=1e-4)
    points = head.points(F.relu(head.points_conv(box)))
    moved = head.box(look_at(head.box_look, box, points - head.taps)) + points.detach()
    (whole,) = torch.autograd.grad(moment_boxes(moved, head.moment_transfer).sum(), points_conv)
    torch.testing.assert_close(by_box, 0.1 * whole, rtol=1e-3, atol=1e-4)


# --- assignment ------------------------------------------------------------------------------------------


def nearest_by_hand(boxes, levels):
    strides = [level[0][2] - level[0][0] for level in levels]
    cells = np.concatenate(levels)
    start = np.cumsum([0, *map(len, levels)])
    best, owner = np.full(len(cells), np.inf), np.full(len(cells), UNMATCHED)
    for k, (x0, y0, x1, y1) in enumerate(boxes):
        width, height = max(x1 - x0, 1e-6), max(y1 - y0, 1e-6)
        level = int((math.log2(width / 4) + math.log2(height / 4)) / 2)
        at = min(max(level - int(math.log2(strides[0])), 0), len(levels) - 1)
        far = [
            math.hypot(
                ((c[0] + c[2]) / 2 - (x0 + x1) / 2) / width, ((c[1] + c[3]) / 2 - (y0 + y1) / 2) / height
            )
            for c in levels[at]
        ]
        i = start[at] + int(np.argmin(far))
        if min(far) < best[i]:
            best[i], owner[i] = min(far), k
    return owner


@pytest.mark.parametrize("seed", range(6))
def test_nearest_as_by_hand(seed):
    levels, boxes = cells_of(96), random_boxes(60, seed, high=400.0)
    wanted = nearest_by_hand(boxes, levels)
    got = match_nearest(*tensors([boxes]), tensors(levels))
    assert got.tolist() == wanted.tolist()
    taken = (wanted >= 0).sum()
    assert 10 < taken < 60  # some cells were wanted by several objects
    assert all((part >= 0).any() for part in np.split(wanted, np.cumsum([len(level) for level in levels])[:-1]))


def test_an_object_has_one_cell_at_the_level_of_its_size():
    cells = tensors(cells_of(64))
    first = [0, 64, 64 + 16]  # of each level
    #                      x  y   x   y
    boxes = torch.tensor([[4.0, 4, 29, 30]])  # below 32 pixels: the finest level all the same
    assert match_nearest(boxes, cells).argmax() == first[0] + 2 * 8 + 2  # center 16.5, 17
    boxes = torch.tensor([[2.0, 2, 65, 65]])  # 63 pixels, still the first level
    assert match_nearest(boxes, cells).argmax() == first[0] + 4 * 8 + 4
    boxes = torch.tensor([[1.0, 1, 65, 65]])  # 64 pixels
    assert match_nearest(boxes, cells).argmax() == first[1] + 2 * 4 + 2
    boxes = torch.tensor([[-200.0, 0, 400, 60]])  # 190 pixels, at the third of three levels
    assert match_nearest(boxes, cells).argmax() == first[2] + 1 * 2 + 1
    assert (match_nearest(boxes, cells) >= 0).sum() == 1


def overlap_by_hand(boxes, first):
    table = np.array([[iou(box, each) for each in first] for box in boxes])
    owner = np.full(len(first), IGNORED)
    for p in range(len(first)):
        if table[:, p].max() < 0.4:
            owner[p] = UNMATCHED
        elif table[:, p].max() >= 0.5:
            owner[p] = table[:, p].argmax()
    for k in range(len(boxes)):
        if table[k].max() > 0:
            owner[table[k] == table[k].max()] = k
    return owner


@pytest.mark.parametrize("seed", range(4))
def test_overlap_as_by_hand(seed):
    generator = np.random.default_rng(seed)
    boxes = np.round(random_boxes(12, seed, low=8))
    near = boxes[generator.integers(0, 12, 150)] + generator.normal(0, 4, (150, 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    first = np.concatenate([near, near[:20], random_boxes(40, seed + 50)])  # some twice: ties
    wanted = overlap_by_hand(boxes, first)
    assert match_first_boxes(*tensors([boxes, first])).tolist() == wanted.tolist()
    assert {IGNORED, UNMATCHED} < set(wanted.tolist())


def test_an_objects_best_box_is_its_own():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 40, 40], [100, 100, 120, 120]])
    first = torch.tensor([[0.0, 0, 10, 11], [60, 60, 70, 70], [0, 0, 0, 0]])
    # The first is above 0.5 with object 0 and the only one that object 1 has; object 2 overlaps none at all.
    assert match_first_boxes(boxes, first).tolist() == [1, UNMATCHED, UNMATCHED]
    assert match_first_boxes(boxes[:1], first).tolist() == [0, UNMATCHED, UNMATCHED]
    assert match_first_boxes(boxes[:0], first).tolist() == [UNMATCHED] * 3
    assert match_nearest(boxes[:0], [first]).tolist() == [UNMATCHED] * 3


# --- losses ----------------------------------------------------------------------------------------------


def smooth_l1(distance):
    return 0.5 * distance**2 / 0.11 if distance < 0.11 else distance - 0.055


def losses_by_hand(cls, first, moved, boxes, labels, levels):
    """cls (N, P, Q) logits, first and moved (N, P, 4) in strides."""
    cells = np.concatenate(levels)
    strides = cells[:, 2] - cells[:, 0]
    points = np.concatenate([(cells[:, :2] + cells[:, 2:]) / 2] * 2, axis=1)
    total, counts = {"classification": 0.0, "bbox_regression": 0.0, "bbox_initial": 0.0}, [0, 0]
    for n in range(len(cls)):
        first_owner = nearest_by_hand(boxes[n], levels)
        owner = overlap_by_hand(boxes[n], first[n] * strides[:, None] + points)
        for p in range(len(cells)):
            if first_owner[p] >= 0:
                counts[0] += 1
                wanted = (boxes[n][first_owner[p]] - points[p]) / strides[p]
                total["bbox_initial"] += 0.5 * sum(smooth_l1(d / 4) for d in abs(first[n, p] - wanted))
            if owner[p] >= 0:
                counts[1] += 1
                wanted = (boxes[n][owner[p]] - points[p]) / strides[p]
                total["bbox_regression"] += sum(smooth_l1(d / 4) for d in abs(moved[n, p] - wanted))
            if owner[p] == IGNORED:
                continue
            for q in range(cls.shape[2]):
                right = owner[p] >= 0 and labels[n][owner[p]] == q
                score = 1 / (1 + math.exp(-cls[n, p, q]))
                share = score if right else 1 - score
                total["classification"] -= (0.25 if right else 0.75) * (1 - share) ** 2 * math.log(share)
    return {
        "classification": total["classification"] / counts[1],
        "bbox_regression": total["bbox_regression"] / counts[1],
        "bbox_initial": total["bbox_initial"] / counts[0],
    }, counts


def maps_of(values_NPC, levels, size=96):
    """(N, P, C) by level as maps."""
    found, start = {}, 0
    for stride, level in zip(STRIDES, levels, strict=True):
        part = values_NPC[:, start : start + len(level)]
        side = size // stride
        found[stride] = torch.tensor(part, dtype=torch.float32).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        start += len(level)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_losses_as_by_hand(seed):
    generator = np.random.default_rng(seed)
    model = build_model("reppoints", 3, backbone="mobilenetv3_small_050", channels=8, strides=STRIDES)
    levels, size = cells_of(96), 96
    cells = np.concatenate(levels)
    points = np.concatenate([(cells[:, :2] + cells[:, 2:]) / 2] * 2, axis=1)
    strides = (cells[:, 2] - cells[:, 0])[:, None]
    boxes = [np.round(random_boxes(count, seed * 2 + i, low=8)) for i, count in enumerate((5, 3))]
    labels = [generator.integers(0, 3, len(each)) for each in boxes]
    near = [each[generator.integers(0, len(each), len(cells))] for each in boxes]
    first = np.stack([(each + generator.normal(0, 5, cells.shape) - points) / strides for each in near])
    first[..., 2:] = np.maximum(first[..., 2:], first[..., :2] + 0.1)
    moved = first + generator.normal(0, 0.5, first.shape)
    cls = generator.normal(-2, 1, (2, len(cells), 3))
    wanted, counts = losses_by_hand(cls, first, moved, boxes, labels, levels)
    assert min(counts) > 4

    batch = model.preprocess(
        [torch.rand(3, size, size)] * 2,
        [
            {"boxes": torch.tensor(b, dtype=torch.float32), "labels": torch.tensor(q)}
            for b, q in zip(boxes, labels, strict=True)
        ],
    )
    outputs = DenseOutputs(
        cls=maps_of(cls, levels), box=maps_of(moved, levels), initial_box=maps_of(first, levels)
    )
    for got, level in zip(model.anchors(outputs.cls, batch), levels, strict=True):
        torch.testing.assert_close(got.double(), torch.tensor(level))
    losses = model.losses(outputs, batch)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(wanted, rel=1e-4)


def test_boxes_go_there_and_back():
    cells, boxes = torch.tensor(cells_of(96)[1], dtype=torch.float32), torch.rand(36, 4) * 90
    model = build_model("reppoints", 3, backbone="mobilenetv3_small_050", channels=8, strides=STRIDES)
    torch.testing.assert_close(model.decode_boxes(in_strides(boxes, cells), cells), boxes)
    assert model.decode_boxes(torch.tensor([-1.0, -0.5, 1, 2]), torch.tensor([8.0, 24, 24, 40])).tolist() == [
        0, 24, 32, 64,
    ]  # fmt: skip


# --- the detector ----------------------------------------------------------------------------------------


def test_it_has_as_many_parameters_as_the_published_configuration():
    """mmdetection's reppoints-moment_r50_fpn-gn_head-gn; 36.6 M without what it freezes (stem, layer1)."""
    norm, conv1, conv3 = 2 * 256, 256, 9 * 256 * 256
    backbone = sum(p.numel() for p in resnet50().parameters()) - (2048 + 1) * 1000
    neck = conv1 * (512 + 1024 + 2048) + 3 * conv3 + 9 * 2048 * 256 + conv3 + 8 * norm
    towers = 6 * (conv3 + norm)
    points = conv3 + 256 + 2 * (256 + 1) * 18 + conv3
    classes = conv3 + (256 + 1) * 80
    model = build_model("reppoints", 80, backbone="resnet50", freeze_stages=2)
    assert sum(p.numel() for p in model.parameters()) == backbone + neck + towers + points + classes + 2
    learnable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learnable == pytest.approx(36.6e6, rel=1e-3)


def test_a_picture_of_one_color_has_finite_gradients():
    """Then GroupNorm gives zeros and all nine points lie on one spot."""
    model = build_model("reppoints", 3, backbone="mobilenetv3_small_050", channels=16, strides=STRIDES).train()
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}] * 2
    sum(model([torch.full((3, 64, 64), 0.5)] * 2, targets).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
