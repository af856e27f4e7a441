from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods.dist import DISTLoss
from detdistill.errors import UserError

from .pairs import make_pair


def maps(seed=0, shape=(2, 6, 4, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_equal_models_and_less_sure_students_have_nothing_to_learn():
    assert DISTLoss()(maps(), maps()).item() == pytest.approx(0, abs=1e-5)
    scores = maps().sigmoid()
    shrunk = torch.logit(0.3 * scores + 0.2)  # a linear map of the scores: no relation changes
    assert DISTLoss()(shrunk, maps()).item() == pytest.approx(0, abs=1e-5)


def test_opposite_relations_cost_most():
    loss = DISTLoss(inter_weight=1.0, intra_weight=1.0)
    assert loss(-maps(), maps()).item() == pytest.approx(4, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 3), (1, 5, 1, 1), (1, 3)])
def test_degenerate_tables_are_finite(shape):
    student = maps(1, shape).requires_grad_()
    value = DISTLoss()(student, maps(2, shape))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_constant_scores_are_finite():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = DISTLoss()(student, maps(shape=(2, 3, 4, 4)))
    value.backward()
    assert value.item() == pytest.approx(2)
    assert student.grad.isfinite().all()


def test_scores_follow_the_kind():
    assert make_pair(["dist"], "retinanet").methods["dist"].loss.scores == "sigmoid"
    assert make_pair(["dist"], "fcos").methods["dist"].loss.scores == "sigmoid"
    assert make_pair(["dist"], "faster_rcnn").methods["dist"].loss.scores == "softmax"


def test_temperature_must_be_positive():
    with pytest.raises(UserError, match="temperature"):
        make_pair([{"dist": {"temperature": -1.0}}])
