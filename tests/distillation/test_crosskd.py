"""CrossKD: where the gradient goes, what may be crossed, and what is counted."""

from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods.crosskd import CrossKDLoss, ScaleAlign, box_distance
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError

from .pairs import batch, detector, gfl_detector, gfl_pair, make_pair, take_steps


def crosskd(pair):
    return pair.methods["crosskd"]


def touched(module):
    return [name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]


def test_gradient_goes_through_the_teachers_head_to_the_students_first_blocks():
    pair = make_pair(["crosskd"], "retinanet", head_depth=3).train()
    pair(*batch())["crosskd"].backward()
    assert crosskd(pair).student_depth == 2
    head = touched(pair.student.head)
    assert any(name.startswith("cls_tower.1") for name in head)
    assert any(name.startswith("box_tower.1") for name in head)
    # What comes after the crossing belongs to the ground truth.
    assert not [name for name in head if name.startswith(("cls_tower.2", "box_tower.2", "cls.", "box."))]
    assert touched(pair.student.backbone)
    assert not touched(pair.teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "blocks", "depth"),
    [
        ("retinanet", "retinanet", 4, 3), ("retinanet", "retinanet", 2, 1), ("retinanet", "retinanet", 1, 1),
        ("fcos", "fcos", 4, 2), ("fcos", "fcos", 1, 1), ("fcos", "retinanet", 4, 3),
        ("retinanet", "fcos", 4, 2),
    ],
)  # fmt: skip
def test_depth_is_as_published_for_the_teachers_head(student, teacher, blocks, depth):
    pair = make_pair(["crosskd"], student, teacher, head_depth=blocks)
    assert (crosskd(pair).teacher_depth, crosskd(pair).student_depth) == (depth, depth)


def test_a_shorter_student_tower_gives_its_last_map():
    pair = Pair(detector("retinanet", head_depth=1), detector("retinanet", 24, 1, head_depth=4), ["crosskd"])
    assert (crosskd(pair).teacher_depth, crosskd(pair).student_depth) == (3, 1)
    assert take_steps(pair, steps=1)["crosskd"].isfinite()


@pytest.mark.parametrize("depth", [1, 4])
def test_depth_can_be_chosen(depth):
    pair = make_pair([{"crosskd": {"depth": depth}}], head_depth=4).train()
    pair(*batch())["crosskd"].backward()
    blocks = {name.split(".")[1] for name in touched(pair.student.head) if name.startswith("cls_tower")}
    assert blocks == {str(i) for i in range(depth)}


@pytest.mark.parametrize(("student", "teacher"), [("retinanet", "fcos"), ("fcos", "retinanet")])
def test_heads_of_another_family(student, teacher):
    assert take_steps(make_pair(["crosskd"], student, teacher), steps=1)["crosskd"].item() > 0


def test_other_strides():
    student = detector("fcos", strides=(8, 16))
    teacher = detector("fcos", 24, 1, strides=(32, 64))
    pair = Pair(student, teacher, ["crosskd"])
    # Both student levels meet the one teacher level that is near enough to either.
    assert {level.teacher_stride for level in crosskd(pair).levels} == {32}
    assert take_steps(pair, steps=1)["crosskd"].item() > 0


def test_pairs_without_towers_are_refused():
    with pytest.raises(UserError, match="both must be one-stage; use"):
        make_pair(["crosskd"], "fcos", "faster_rcnn")
    with pytest.raises(UserError, match="head_depth 0 has none: use"):
        make_pair(["crosskd"], head_depth=0)
    with pytest.raises(UserError, match="have 2 blocks: use 1 to 2"):
        make_pair([{"crosskd": {"depth": 3}}])
    with pytest.raises(UserError, match="crosskd: beta: input should be greater than or equal to 1"):
        make_pair([{"crosskd": {"beta": 0.5}}])


def test_mappers_where_widths_differ():
    pair = make_pair(["crosskd"])
    assert {name for name, _ in pair.methods.named_parameters()} == {
        "crosskd.mappers.cls.weight", "crosskd.mappers.box.weight",
    }  # fmt: skip
    pair = make_pair([{"crosskd": {"align_scale": False}}])
    assert len(list(pair.methods.parameters())) == 4  # with biases, which alignment would take away
    assert not list(Pair(detector(seed=1), detector(), ["crosskd"]).methods.parameters())


def test_alignment_gives_the_teachers_statistics_whatever_the_students_scale():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = 3 * teacher - 1
    align = ScaleAlign()
    aligned = align(student, teacher)
    for statistic in (torch.mean, torch.var):
        torch.testing.assert_close(
            statistic(aligned, (0, 2, 3)), statistic(teacher, (0, 2, 3)), rtol=1e-5, atol=0
        )
    torch.testing.assert_close(align(100 * student + 7, teacher), aligned, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(align(teacher, teacher), teacher, rtol=1e-5, atol=1e-5)
    still = torch.zeros_like(student, requires_grad=True)
    align(still, teacher).sum().backward()
    assert still.grad.isfinite().all()


class Recorder(CrossKDLoss):
    def forward(self, *args):
        self.count, self.valid_NP = args[4:]
        return super().forward(*args)


def record(pair, images, targets):
    crosskd(pair).loss = Recorder()
    pair(images, targets)
    return crosskd(pair).loss


def test_n_is_the_number_of_positive_anchors_and_ignored_ones_are_left_out():
    pair = make_pair(["crosskd"], "retinanet")
    images, targets = batch(n=2)
    loss = record(pair, images, targets)
    inputs = pair.teacher.preprocess(images, targets)
    anchors = pair.teacher.anchors(pair.teacher.forward_features(inputs), inputs)
    matched = torch.stack([pair.teacher.match(target["boxes"], anchors) for target in targets])
    assert loss.count.item() == (matched >= 0).sum().item() > 1
    assert loss.valid_NP.tolist() == (matched != -2).tolist()
    assert not loss.valid_NP.all()
    # an image without objects counts 1, as in the published code
    one = record(pair, images[:1], targets[:1]).count.item()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert record(pair, images, [targets[0], nothing]).count.item() == one + 1
    assert record(pair, *batch(empty=True)).count.item() == 2


def test_n_is_the_sum_of_centerness_without_anchors():
    pair = make_pair(["crosskd"])
    images, targets = batch(n=1)
    targets[0] = {"boxes": torch.tensor([[8.0, 4.0, 48.0, 52.0]]), "labels": torch.tensor([0])}
    inputs = pair.teacher.preprocess(images, targets)
    cells = torch.cat(pair.teacher.anchors(pair.teacher.forward_features(inputs), inputs))
    matched = pair.teacher.match(targets[0]["boxes"], [cells[:64], cells[64:80], cells[80:]])
    wanted = 0.0
    for cell in cells[matched >= 0]:
        x, y = ((cell[:2] + cell[2:]) / 2).tolist()
        left, top, right, bottom = x - 8, y - 4, 48 - x, 52 - y
        ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
        wanted += ratio**0.5
    assert wanted > 1
    assert record(pair, images, targets).count.item() == pytest.approx(wanted, rel=1e-5)


def test_equal_boxes_are_no_distance_apart():
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0], [0.0, 0.0, 0.5, 0.25]])
    for kind in ("giou", "iou"):
        assert box_distance(boxes, boxes, kind).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["giou", "iou"])
def test_boxes_with_little_or_no_area_have_no_large_gradient(kind):
    boxes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 9.0], [3.0, 3.0, 3.0001, 3.0001]])
    others = torch.tensor([[0.0, 0.0, 4.0, 4.0], [5.0, 5.0, 5.0, 9.0], [3.0, 3.0, 3.0001, 3.0001]])
    for moving, still in ((boxes, others), (others, boxes), (boxes, boxes)):
        moving = moving.clone().requires_grad_()
        distance = box_distance(moving, still, kind)
        distance.sum().backward()
        assert distance.isfinite().all()
        assert moving.grad.abs().max() < 1e3, (moving, still)


def test_distributions_are_compared_bin_by_bin_by_the_teachers_head():
    pair = gfl_pair(["crosskd"], bins=4)  # the student's own bins play no part
    assert crosskd(pair).loss.box_weight == 4.0
    assert take_steps(pair)["crosskd"].item() > 0
    pair = Pair(gfl_detector(seed=1), gfl_detector(seed=1), ["crosskd"]).eval()
    assert pair(*batch())["crosskd"].abs().item() < 1e-5


@pytest.mark.parametrize(
    ("family", "weights"), [("fcos", (0.4, 0.75, "iou")), ("retinanet", (1.0, 1.0, "giou"))]
)
def test_presets(family, weights):
    loss = crosskd(make_pair(["crosskd"], family)).loss
    assert (loss.cls_weight, loss.box_weight, loss.box_loss) == weights
