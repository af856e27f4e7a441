"""What is special to FGFI: whose anchors make the mask, and what lies outside it."""

from __future__ import annotations

import copy

import pytest
import torch

from detdistill.distillation.methods.fgfi import FGFI, FGFILoss
from detdistill.distillation.pair import Pair
from detdistill.distillation.regions import object_mask
from detdistill.errors import UserError

from .pairs import batch, detector, make_pair


def masks_of(teacher_family):
    """The masks that a pair makes, the teacher's batch, and the teacher's pyramid."""
    pair = make_pair(["fgfi"], "fcos", teacher_family)
    method, seen = pair.methods["fgfi"], {}
    assert isinstance(method, FGFI)
    masks = method._masks
    method._masks = lambda step: seen.update(step=step, masks=masks(step)) or seen["masks"]
    pair(*batch())
    return seen["masks"], seen["step"].teacher_batch, seen["step"].teacher


def test_a_teacher_without_anchors_gives_the_cells_of_the_boxes():
    masks, inputs, pyramid = masks_of("fcos")
    assert masks.keys() == pyramid.keys()
    assert all(torch.equal(masks[stride], object_mask(inputs, x)) for stride, x in pyramid.items())


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn"])
def test_anchors_of_the_teacher_make_the_mask(family):
    masks, inputs, pyramid = masks_of(family)
    assert all(masks[stride].shape == (2, *x.shape[-2:]) for stride, x in pyramid.items())
    assert any(not torch.equal(masks[stride], object_mask(inputs, x)) for stride, x in pyramid.items())
    assert all(mask.any(dim=(1, 2)).all() for mask in masks.values())  # each level has a best anchor


def test_what_lies_outside_the_mask_does_not_count():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    mask = torch.rand(2, 4, 5) > 0.5
    padded = [torch.nn.functional.pad(x, (0, 3, 0, 2), value=9.0) for x in (student, -teacher)]
    wider = torch.nn.functional.pad(mask, (0, 3, 0, 2))
    torch.testing.assert_close(FGFILoss()(student, -teacher, mask), FGFILoss()(*padded, wider))


def test_an_empty_mask_counts_nothing():
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss = FGFILoss()(student, torch.randn(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_adapters_are_3x3_and_reach_negative_features():
    method = make_pair(["fgfi"]).methods["fgfi"]
    adapters = list(method.align.adapters.values())
    assert len(adapters) == 3
    assert all(isinstance(a, torch.nn.Conv2d) and a.kernel_size == (3, 3) for a in adapters)


@pytest.mark.parametrize("method", ["fgfi", {"defeat": {}}, {"frs": {"cls_weight": 0}}])
def test_an_equal_student_without_adapters_has_nothing_to_learn(method):
    name = method if isinstance(method, str) else next(iter(method))
    options = {} if isinstance(method, str) else method[name]
    teacher = detector("faster_rcnn", seed=1)
    pair = Pair(copy.deepcopy(teacher), teacher, [{name: {"adapt": "never", **options}}]).eval()
    pair.student.training = True
    assert pair(*batch())[name].abs().item() < 1e-6


def test_psi_out_of_range_is_refused():
    with pytest.raises(UserError, match="fgfi: psi: input should be less than 1"):
        make_pair([{"fgfi": {"psi": 1.0}}])
