"""GFL against its equations in plain numpy, a case counted by hand, and the published structure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.errors import UserError
from detdistill.models import build_model
from detdistill.models.base import Batch, DenseOutputs
from detdistill.models.families.gfl import distribution_focal_loss, encode_boxes, quality_focal_loss
from detdistill.models.layers.heads import UNMATCHED

BINS, CLASSES, SIDE = 6, 3, 64
STRIDES = (8, 16, 32)


def small(strides=STRIDES, bins=BINS, **options):
    torch.manual_seed(0)
    return build_model(
        "gfl",
        CLASSES,
        backbone="mobilenetv3_small_050",
        channels=16,
        strides=strides,
        bins=bins,
        head_depth=2,
        **options,
    )


def batch_of(*objects, height=SIDE, width=SIDE):
    """A batch of blank images with these boxes; labels 0, 1, 2, 0, …"""
    targets = [
        {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.arange(len(boxes)) % CLASSES}
        for boxes in objects
    ]
    sizes = [(height, width)] * len(objects)
    return Batch(torch.zeros(len(objects), 3, height, width), sizes, sizes, targets)


def random_raw(images, side=SIDE):
    generator = torch.Generator().manual_seed(0)

    def maps(channels):
        return {
            stride: torch.randn(images, channels, side // stride, side // stride, generator=generator)
            for stride in STRIDES
        }

    return DenseOutputs(cls=maps(CLASSES), box=maps(4 * BINS))


# --- the losses, once more in float64, an anchor after the other ------------------------------------------


def rows_of(maps):
    """(N, P, channels) float64."""
    return np.concatenate(
        [x.detach().double().numpy().transpose(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]) for x in maps], 1
    )


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def iou_and_giou(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    overlap = max(sides[0], 0) * max(sides[1], 0)
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - overlap
    hull = (np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])).prod()
    return overlap / union, overlap / union - (hull - union) / hull


def by_hand(head_outputs, batch, matched_NP, constants=None):
    """The three losses, and the constants (quality, weight): given, they are not computed anew."""
    logits_NPQ, bins_NPE = rows_of(head_outputs.cls.values()), rows_of(head_outputs.box.values())
    cells = [
        (x * s, y * s, s)
        for s, m in head_outputs.cls.items()
        for y in range(len(m[0, 0]))
        for x in range(len(m[0, 0]))
    ]
    found, qfl, giou_sum, dfl_sum, weights = {}, 0.0, 0.0, 0.0, 0.0
    for n, target in enumerate(batch.targets):
        for p, (x, y, stride) in enumerate(cells):
            wanted = np.zeros(CLASSES)
            k = int(matched_NP[n][p])
            if k >= 0:
                box = target["boxes"][k].double().numpy()
                logits = bins_NPE[n, p].reshape(4, BINS)
                shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
                left, top, right, bottom = stride * (shares * np.arange(BINS)).sum(axis=1)
                iou, giou = iou_and_giou(np.array([x - left, y - top, x + right, y + bottom]), box)
                quality, weight = constants[n, p] if constants else (iou, sigmoid(logits_NPQ[n, p]).max())
                found[n, p] = quality, weight
                wanted[int(target["labels"][k])] = quality
                distances = np.array([x - box[0], y - box[1], box[2] - x, box[3] - y]) / stride
                dfl = 0.0
                for share, distance in zip(shares, np.clip(distances, 0, BINS - 1 - 0.1), strict=True):
                    i = int(distance)
                    dfl -= (i + 1 - distance) * np.log(share[i]) + (distance - i) * np.log(share[i + 1])
                giou_sum += weight * (1 - giou)
                dfl_sum += weight * dfl / 4
                weights += weight
            s = sigmoid(logits_NPQ[n, p])
            qfl -= (np.abs(wanted - s) ** 2 * (wanted * np.log(s) + (1 - wanted) * np.log(1 - s))).sum()
    losses = {
        "classification": qfl / max(1, len(found)),
        "bbox_regression": 2.0 * giou_sum / max(1, weights),
        "bbox_distribution": 0.25 * dfl_sum / max(1, weights),
    }
    return losses, found


@pytest.fixture(scope="module")
def case():
    """Objects of several sizes, one of them beyond the bins' reach, and an image without any."""
    model = small()
    objects = [[3.0, 5, 22, 30], [80, 12, 119, 60], [1, 2, 120, 127]], [], [[60.0, 66, 125, 125]]
    batch, head_outputs = batch_of(*objects, height=128, width=128), random_raw(3, side=128)
    anchors = model.anchors(head_outputs.cls, batch)
    matched = [model.match(target["boxes"], anchors) for target in batch.targets]
    assert [len(set(m.tolist()) - {UNMATCHED}) for m in matched] == [3, 0, 1]
    assert (torch.stack(matched)[:, :256] >= 0).any()
    assert (torch.stack(matched)[:, 256:] >= 0).any()  # positives of two levels
    return model, head_outputs, batch, matched


def test_losses_are_the_equations(case):
    model, head_outputs, batch, matched = case
    wanted, _ = by_hand(head_outputs, batch, matched)
    got = model.losses(head_outputs, batch)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", ["classification", "bbox_regression", "bbox_distribution"])
def test_gradients_are_finite_differences(case, name):
    """Quality and weights are constants: they are held while a logit is moved."""
    model, head_outputs, batch, matched = case
    leaves = [x.requires_grad_() for maps in (head_outputs.cls, head_outputs.box) for x in maps.values()]
    gradients = torch.autograd.grad(model.losses(head_outputs, batch)[name], leaves, allow_unused=True)
    head_outputs = DenseOutputs(
        *({s: x.detach().double() for s, x in maps.items()} for maps in (head_outputs.cls, head_outputs.box))
    )
    _, constants = by_hand(head_outputs, batch, matched)
    checked = 0
    for maps, two in ((head_outputs.cls, gradients[:3]), (head_outputs.box, gradients[3:])):
        for x, gradient in zip(maps.values(), two, strict=True):
            if gradient is None or not gradient.any():
                continue
            for at in gradient.abs().flatten().topk(3).indices:
                values = []
                for step in (1e-5, -1e-5):
                    x.view(-1)[at] += step
                    values.append(by_hand(head_outputs, batch, matched, constants)[0][name])
                    x.view(-1)[at] -= step
                slope = (values[0] - values[1]) / 2e-5
                assert gradient.flatten()[at].item() == pytest.approx(slope, rel=1e-3, abs=1e-7)
                checked += 1
    assert checked >= 6  # the largest three of each level: of the classes, or of the boxes


def test_quality_and_weights_carry_no_gradient(case):
    model, head_outputs, batch, _ = case
    for name, without, of in (
        ("classification", head_outputs.box, head_outputs.cls),
        ("bbox_regression", head_outputs.cls, head_outputs.box),
    ):
        for maps in (without, of):
            for x in maps.values():
                x.requires_grad_()
        loss = model.losses(head_outputs, batch)[name]
        assert all(
            g is None
            for g in torch.autograd.grad(loss, [*without.values()], allow_unused=True, retain_graph=True)
        )
        assert torch.autograd.grad(loss, of[8])[0].abs().sum() > 0


def test_focal_losses_at_known_points():
    """QFL of a probability of 1/2 that should be 0, 1/2, 1; DFL halfway between two of four equal bins."""
    quality = torch.tensor([0.0, 0.5, 1.0])
    log2 = np.log(2)
    torch.testing.assert_close(
        quality_focal_loss(torch.zeros(3), quality), torch.tensor([log2 / 4, 0, log2 / 4]).float()
    )
    distances = torch.tensor([-5.0, 0.0, 1.5, 2.0, 99.0])
    dfl = distribution_focal_loss(torch.zeros(5, 4), distances)
    torch.testing.assert_close(dfl, torch.full((5,), 2 * log2).float())
    sure = torch.tensor([[0.0, 50, 0, 0]])
    assert distribution_focal_loss(sure, torch.tensor([1.0])).item() < 1e-6
    assert distribution_focal_loss(sure, torch.tensor([1.5])).item() == pytest.approx(25, rel=1e-3)


# --- cells, assignment, boxes -----------------------------------------------------------------------------


def test_assignment_by_hand():
    """An object of side 64 about (32, 32).

    Candidates at stride 8 are the cell there and its eight neighbors, with IoU 1, 7/9 (four), 49/79 (four); at
    stride 16 nine and at stride 32 four anchors that contain it, with IoU 1/4 and 1/16. The threshold is mean +
    deviation, 0.4133 + 0.2911.
    """
    model = small()
    batch = batch_of([[0.0, 0, 64, 64]])
    matched = model.match(batch.targets[0]["boxes"], model.anchors(random_raw(1).cls, batch))
    at = torch.where(matched[:64].view(8, 8) == 0)
    assert list(zip(*(x.tolist() for x in at), strict=True)) == [(3, 4), (4, 3), (4, 4), (4, 5), (5, 4)]
    assert (matched[64:] == UNMATCHED).all()


def test_cells_lie_a_stride_apart_from_the_corner_on():
    """Also where the padded side is no multiple of the stride, unlike torchvision's."""
    model = small(strides=(8, 16, 32, 64, 128))
    batch = batch_of([], height=96, width=160)
    pyramid = model.forward_features(batch)
    assert pyramid[128].shape[-2:] == (1, 2)
    for (stride, maps), anchors in zip(pyramid.items(), model.anchors(pyramid, batch), strict=True):
        rows, columns = maps.shape[-2:]
        wanted = [
            [x * stride - 4 * stride, y * stride - 4 * stride, x * stride + 4 * stride, y * stride + 4 * stride]
            for y in range(rows)
            for x in range(columns)
        ]
        assert anchors.tolist() == wanted


def test_boxes_are_the_means_of_their_sides():
    model = small()
    anchors = torch.tensor([[-32.0, -32, 32, 32], [40 - 64, 24 - 64, 40 + 64, 24 + 64]])  # of strides 8 and 16
    logits = torch.full((2, 4, BINS), -100.0)
    logits[:, 0, 2] = logits[:, 1, 0] = logits[:, 2, 1] = logits[:, 2, 2] = logits[:, 3, 5] = 0  # 2, 0, 1.5, 5
    boxes = model.decode_boxes(logits.flatten(1), anchors)
    wanted = torch.tensor([[-16.0, 0, 12, 40], [8, 24, 64, 104]])
    torch.testing.assert_close(boxes, wanted)
    torch.testing.assert_close(encode_boxes(wanted, anchors), torch.tensor([[2.0, 0, 1.5, 5]] * 2))
    torch.testing.assert_close(model.decode_boxes(logits.flatten(1)[None], anchors)[0], wanted)


def test_detections_are_scored_by_the_class_alone():
    """One sure cell: a class logit of 2 and sides of 1, 2, 1, 2 strides about (24, 32)."""
    model = small().eval()
    head_outputs, batch = random_raw(1), batch_of([])
    for x in (*head_outputs.cls.values(), *head_outputs.box.values()):
        x.fill_(-30)
    head_outputs.cls[8][0, 2, 4, 3] = 2.0
    sides = head_outputs.box[8][0].unflatten(0, (4, BINS))
    for side, distance in enumerate((1, 2, 1, 2)):
        sides[side, distance] = 30
    (found,) = model.decode(head_outputs, batch)
    torch.testing.assert_close(found["boxes"], torch.tensor([[16.0, 16, 32, 48]]))
    assert found["labels"].tolist() == [2]
    assert found["scores"].item() == pytest.approx(sigmoid(2.0))


# --- the network ------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_published_network():
    """32.27 M are published; here each part is counted by hand."""
    with torch.device("meta"):
        model = build_model("gfl", 80, backbone="resnet50")
    backbone = 23_508_032  # ResNet-50 without its classifier
    neck = (512 + 1024 + 2048 + 3) * 256 + 5 * (9 * 256 + 1) * 256
    towers = 8 * (9 * 256 * 256 + 2 * 256)  # no bias before a GroupNorm
    outputs = (9 * 256 + 1) * (80 + 4 * 17) + 5  # and a scale for each level
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == backbone + neck + towers + outputs
    assert count == pytest.approx(32.27e6, rel=0.02)


def test_head_has_the_published_entries():
    """So that a published file can be read entry by entry."""
    blocks = [f"{tower}_tower.{i}.{entry}" for tower in ("cls", "box") for i in range(2)
              for entry in ("0.weight", "1.weight", "1.bias")]  # fmt: skip
    outputs = [f"{output}.{entry}" for output in ("cls", "box") for entry in ("weight", "bias")]
    assert set(small().head.state_dict()) == {*blocks, *outputs, "scales.8", "scales.16", "scales.32"}


def test_each_level_has_its_own_scale():
    model, batch = small(), batch_of([])
    pyramid = model.forward_features(batch)
    before = model.forward_head(pyramid, batch)
    model.head.scales["16"].data.fill_(3)
    after = model.forward_head(pyramid, batch)
    assert torch.equal(after.box[8], before.box[8])
    torch.testing.assert_close(after.box[16], 3 * before.box[16])
    assert torch.equal(after.cls[16], before.cls[16])


def test_the_coarse_levels_have_no_relu_between_them():
    neck = small(strides=(8, 16, 32, 64, 128)).neck
    widths = {stride: neck.fpn.inner_blocks[i][0].in_channels for i, stride in enumerate((8, 16, 32))}
    maps = {stride: torch.randn(1, width, 256 // stride, 256 // stride) for stride, width in widths.items()}
    there, back = neck(maps), neck({stride: -x for stride, x in maps.items()})
    for stride in (64, 128):  # biases are 0 before training
        torch.testing.assert_close(back[stride], -there[stride])


def test_the_head_goes_on_from_its_hidden_maps():
    model, batch = small(), batch_of([])
    head_outputs = model.forward_head(model.forward_features(batch), batch, tower_features=True)
    assert len(head_outputs.tower_features) == 2
    for depth, (cls, box) in enumerate(head_outputs.tower_features, start=1):
        again = model.head.go_on(cls, box, depth)
        for stride in STRIDES:
            torch.testing.assert_close(again.cls[stride], head_outputs.cls[stride])
            torch.testing.assert_close(again.box[stride], head_outputs.box[stride])


def test_training_is_deterministic():
    gradients = []
    for _ in range(2):
        model = small().train()
        images = list(torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))
        sum(model(images, batch_of([[3.0, 5, 22, 30]], [[10.0, 12, 61, 60]]).targets).values()).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_one_bin_is_refused():
    with pytest.raises(UserError, match="bins: input should be greater than or equal to 2"):
        small(bins=1)
