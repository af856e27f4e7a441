from __future__ import annotations

import pytest
import torch

from detdistill.errors import UserError
from detdistill.recipe import OptimizerConfig
from detdistill.training.step import build_optimizer

from .pairs import assert_same, batch, make_pair, snapshot

STEPS = 10


def train(pair, first, last, optimizer=None):
    """Steps [first, last) of 10."""
    pair.train()
    optimizer = optimizer or torch.optim.SGD(pair.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    for step in range(first, last):
        pair.at_step(step, STEPS)
        torch.manual_seed(step)
        losses = pair(*batch(seed=step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return losses, optimizer


def parts(pair):
    return pair.methods["maskd"].learning, pair.methods["maskd"].in_use


def test_tokens_learn_first_and_then_stay():
    pair = make_pair([{"maskd": {"token_fraction": 0.5}}])
    _, optimizer = train(pair, 0, 5)
    learning, in_use = map(snapshot, parts(pair))
    assert all(not torch.equal(learning[name], in_use[name]) for name in learning)  # one update behind
    train(pair, 5, 7, optimizer)
    assert_same(in_use, snapshot(parts(pair)[1]))
    # although momentum and decay go on moving what learned them, and every part has a gradient, for DDP
    assert all(not torch.equal(learning[name], value) for name, value in snapshot(parts(pair)[0]).items())
    assert all(p.grad is not None and not p.grad.any() for p in parts(pair)[0].parameters())


@pytest.mark.parametrize(("family", "until"), [("fcos", 4), ("faster_rcnn", 2)])
def test_resumes_exactly(family, until):
    recipe = [{"maskd": {"token_fraction": 0.3}}]  # 3 of these 5 steps
    whole, part = make_pair(recipe, family), make_pair(recipe, family)
    train(whole, 0, 5)
    _, optimizer = train(part, 0, until)
    again = make_pair(recipe, family)
    again.load_state_dict(part.state_dict())
    other = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    other.load_state_dict(optimizer.state_dict())
    train(again, until, 5, other)
    assert_same(snapshot(whole), snapshot(again))


@pytest.mark.parametrize("family", ["fcos", "retinanet", "faster_rcnn"])
def test_the_first_stage_moves_tokens_alone(family):
    """Its gradient reaches neither the student nor the adapters, and its value is not reported."""
    gradients, values = [], []
    for fraction in (1.0, 0.0):
        pair = make_pair([{"maskd": {"token_fraction": fraction}}], family).train()
        pair.at_step(5, STEPS)
        torch.manual_seed(0)
        losses = pair(*batch())
        losses["maskd"].backward()
        values.append(losses["maskd"].item())
        gradients.append({
            name: p.grad for name, p in pair.named_parameters() if p.grad is not None and "learning" not in name
        })  # fmt: skip
        tokens = [p.grad.any() for p in parts(pair)[0].parameters()]
        assert all(tokens) if fraction else not any(tokens)
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("method", ["maskd", "scalekd"])
@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn"])
def test_ground_truth_losses_leave_randomness_and_the_teacher_alone(method, family):
    """They sample anchors and regions: the student must draw the same without them."""
    states, values = [], []
    for methods in ([], [method], [method]):
        pair = make_pair(methods, family).train()
        before = snapshot(pair.teacher)
        torch.manual_seed(0)
        values.append(pair(*batch()))
        states.append(torch.get_rng_state())
        assert not any(module.training for module in pair.teacher.modules())
        assert_same(before, snapshot(pair.teacher))
    assert torch.equal(states[0], states[1])
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert torch.equal(values[1][method], values[2][method])


def test_the_first_stage_lowers_the_teachers_loss_on_masked_maps():
    pair = make_pair([{"maskd": {"token_fraction": 1.0}}], "retinanet").train()
    for p in pair.teacher.head.parameters():  # an untrained head hardly sees its input
        p.data.mul_(8)
    method = pair.methods["maskd"]
    seen = []
    stage_1 = method._stage_1
    method._stage_1 = lambda step_outputs: seen.append(stage_1(step_outputs)) or seen[-1]
    optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
    for step in range(12):
        pair.at_step(step, 100)
        losses = pair(*batch())
        optimizer.zero_grad()
        losses["maskd"].backward()
        optimizer.step()
    assert seen[-1] < 0.98 * seen[0]


def test_the_students_masks_count_from_their_share_of_training_on():
    values = []
    for start in (0.0, 0.5, 1.0):
        pair = make_pair([{"maskd": {"student_masks_from": start}}]).train()
        pair.at_step(2, STEPS)
        values.append(pair(*batch())["maskd"].item())
    # masks begin near 1/2, so that one more factor halves M² / M
    assert values[0] == pytest.approx(values[1] / 2, rel=0.1)
    assert values[1] == values[2]


def test_student_masks_from_1_is_never_also_where_the_length_of_training_is_unknown():
    values = []
    for start in (0.5, 1.0):
        pair = make_pair([{"maskd": {"student_masks_from": start}}]).train()
        values.append(pair(*batch())["maskd"].item())  # no step is told
    assert values[0] == pytest.approx(values[1] / 2, rel=0.1)


def test_segmenters_never_use_the_students_masks():
    pair = make_pair(["maskd"], "pspnet").train()
    assert pair.methods["maskd"].student_masks_from == 1.0


def test_where_the_length_of_training_is_unknown_tokens_always_learn():
    pair = make_pair([{"maskd": {"token_fraction": 0.01}}]).train()
    pair(*batch())["maskd"].backward()
    assert all(p.grad.any() for p in parts(pair)[0].parameters())


def test_tokens_in_use_are_no_parameters():
    pair = make_pair(["maskd"])
    assert not list(parts(pair)[1].parameters())
    assert parts(pair)[0].state_dict().keys() == parts(pair)[1].state_dict().keys()
    optimizer = build_optimizer(pair, OptimizerConfig())
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in optimized for p in parts(pair)[0].parameters())


def test_tokens_without_shares():
    pair = make_pair([{"maskd": {"token_shares": False, "tokens": 1}}])
    assert [name.split(".")[-1] for name, _ in parts(pair)[0].named_parameters()] == ["tokens_TC"] * 3
    losses, _ = train(pair, 0, 2)
    assert losses["maskd"].isfinite()


def test_presets_and_wrong_options():
    for family, expected in (("retinanet", 7.0), ("fcos", 10.0), ("faster_rcnn", 1.0)):
        assert make_pair(["maskd"], family).methods["maskd"].loss.alpha == expected
    for option, value in (("tokens", 0), ("token_fraction", 1.5), ("student_masks_from", -0.1)):
        with pytest.raises(UserError, match=option):
            make_pair([{"maskd": {option: value}}])
