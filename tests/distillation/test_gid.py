"""GID: which instances are chosen, and what may be compared."""

from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods.gid import GIDLoss, distances
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError

from .pairs import batch, detector, make_pair, take_steps


def signals_of(pair, inputs):
    """What the method sees."""
    method, seen = pair.methods["gid"], []
    handle = method.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pair(*inputs)
    handle.remove()
    return method, seen[0]


def quiet(outputs, spots=(), distance=2.0):
    """No scores but at the spots (image, stride, row, column, logit), and boxes of one size all over."""
    for maps, value in ((outputs.cls, -20.0), (outputs.box, distance)):
        for stride in maps:
            maps[stride] = torch.full_like(maps[stride], value)
    for image, stride, row, column, logit in spots:
        outputs.cls[stride][image, 0, row, column] = logit


def test_the_more_confident_model_gives_the_box():
    method, step = signals_of(make_pair(["gid"]), batch())
    quiet(step.student_outputs, [(1, 8, 3, 3, 3.0)], distance=1.5)
    quiet(step.teacher_outputs, [(0, 8, 4, 2, 3.0)], distance=1.0)
    first, second = method._choose(step)
    torch.testing.assert_close(first[0], torch.tensor([8.0, 24.0, 24.0, 40.0]))  # 8 from (16, 32)
    torch.testing.assert_close(second[0], torch.tensor([12.0, 12.0, 36.0, 36.0]))  # 12 from (24, 24)


def test_instances_are_cut_at_the_image_limited_and_large_enough():
    pair = make_pair([{"gid": {"instances": 3}}])
    method, step = signals_of(pair, batch())
    quiet(step.student_outputs, distance=1.0)
    quiet(step.teacher_outputs, [(0, 8, row, column, 1.0 + row) for row in range(0, 8, 2) for column in (0, 4)])
    quiet_boxes = method._choose(step)
    assert [len(boxes) for boxes in quiet_boxes] == [3, 3]
    assert all(((boxes >= 0) & (boxes <= 64)).all() for boxes in quiet_boxes)
    method.min_side = 100.0
    assert [len(boxes) for boxes in method._choose(step)] == [0, 0]


def test_boxes_that_overlap_are_suppressed_whatever_their_class():
    method, step = signals_of(make_pair(["gid"]), batch())
    quiet(step.student_outputs)
    quiet(step.teacher_outputs)
    step.teacher_outputs.cls[8][0, 0, 3, 3] = 3.0
    step.teacher_outputs.cls[8][0, 1, 3, 4] = 2.0  # 8 pixels beside it, boxes of 32
    boxes = method._choose(step)[0]
    torch.testing.assert_close(boxes[0], torch.tensor([8.0, 8.0, 40.0, 40.0]))
    assert not (boxes == torch.tensor([16.0, 8.0, 48.0, 40.0])).all(dim=1).any()


def test_no_gradient_flows_through_the_boxes():
    pair = make_pair([{"gid": {"cls_weight": 0, "box_weight": 0}}]).train()
    pair(*batch())["gid"].backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in pair.student.head.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in pair.student.neck.parameters())


def test_regions_are_pooled_from_the_level_of_their_size():
    pair = Pair(detector(seed=1), detector(), ["gid"])
    method, step = signals_of(pair, batch())
    for maps in (step.student, step.teacher):
        for stride in maps:
            maps[stride] = torch.full_like(maps[stride], float(stride))
    small, middle = torch.tensor([[0.0, 0.0, 30.0, 30.0]]), torch.tensor([[0.0, 0.0, 250.0, 250.0]])
    student, teacher = method._pool(step, [small, torch.cat([small, middle])])
    assert student.shape == (3, 16, 10, 10)
    # The large box leaves the map; what it sees of it has the value of stride 16.
    assert [x.max().item() for x in teacher] == [8.0, 8.0, 16.0]
    torch.testing.assert_close(student, teacher)


def test_one_adapter_serves_all_levels():
    method = make_pair(["gid"]).methods["gid"]
    assert [tuple(p.shape) for p in method.parameters()] == [(24, 16, 3, 3), (24,)]
    assert len(method.align.adapters) == 3


def test_unlike_heads_need_response_weights_of_zero():
    with pytest.raises(UserError, match="use gid's cls_weight 0 and box_weight 0"):
        make_pair(["gid"], "fcos", "retinanet")
    without = {"gid": {"cls_weight": 0, "box_weight": 0}}
    for student, teacher in (("fcos", "retinanet"), ("retinanet", "fcos")):
        pair = make_pair([without], student, teacher)
        method, step = signals_of(pair, batch())
        assert not method.by_anchor
        assert all(1 <= len(boxes) <= 10 for boxes in method._choose(step))
        assert take_steps(pair, steps=1)["gid"].item() > 0
    assert make_pair([without], "retinanet").methods["gid"].by_anchor


def test_a_cells_best_anchor_speaks_for_it():
    pair = make_pair([{"gid": {"cls_weight": 0, "box_weight": 0}}], "fcos", "retinanet")
    method, step = signals_of(pair, batch())
    quiet(step.student_outputs, distance=0.0)
    quiet(step.teacher_outputs, distance=0.0)
    step.teacher_outputs.cls[16][0, 3 * 4 + 1, 2, 1] = 3.0  # class 1 of anchor 4 at cell (2, 1)
    anchors = step.teacher_model.anchors(step.teacher_outputs.cls, step.teacher_batch)[1]
    wanted = anchors[(2 * 4 + 1) * 9 + 4].clamp(0, 64)
    torch.testing.assert_close(method._choose(step)[0][0], wanted)


def test_other_pairs_that_are_refused():
    with pytest.raises(UserError, match="must be one-stage: use"):
        make_pair(["gid"], "fcos", "faster_rcnn")
    with pytest.raises(UserError, match=r"the teacher's strides \[16, 32\], or use"):
        Pair(detector(), detector(strides=(16, 32)), ["gid"])
    with pytest.raises(UserError, match="gid: instances: input should be greater than or equal to 1"):
        make_pair([{"gid": {"instances": 0}}])
    with pytest.raises(UserError, match="gid: box_beta: input should be greater than or equal to 0"):
        make_pair([{"gid": {"box_beta": -1.0}}])


def test_equal_and_constant_regions_are_finite():
    for regions in (torch.ones(4, 2, 3, 3), torch.zeros(0, 2, 3, 3)):
        student = regions.clone().requires_grad_()
        loss = GIDLoss()(student, regions)
        loss.backward()
        assert loss.item() == 0
        assert student.grad.isfinite().all()
    assert distances(torch.ones(3, 5)).abs().sum() == 0


def test_distances_off_the_origin_and_between_twins():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, generator=generator)
    x[4] = x[3]
    expected = torch.cdist(x.double(), x.double())
    expected = expected / (expected.sum() / 20)
    torch.testing.assert_close(distances(x + 100).double(), expected, rtol=1e-3, atol=1e-3)
    x.requires_grad_()
    distances(x).square().sum().backward()
    assert x.grad.isfinite().all()
