"""A pair: the teacher never moves, the student is what is exported, and weight 0 changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from detdistill.distillation.pair import Pair
from detdistill.errors import UserError

from .pairs import assert_same, batch, detector, snapshot, take_steps


def test_teacher_is_no_part_of_the_pair_and_stays_in_evaluation_mode():
    student, teacher = detector(), detector(channels=24, seed=1)
    pair = Pair(student, teacher, ["ima"])
    of_teacher = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in of_teacher for p in pair.parameters())
    assert {name.split(".")[0] for name in pair.state_dict()} == {"student", "terms"}
    teacher.train()  # as a careless user leaves it
    pair.train()(*batch())
    assert not teacher.training


def test_feature_methods_never_run_the_teachers_head():
    teacher = detector(channels=24, seed=1)
    calls = []
    teacher.head.register_forward_hook(lambda *_: calls.append(1))
    pair = Pair(detector(), teacher, ["ima", "mimic"])
    take_steps(pair, steps=1)
    assert not calls


@pytest.mark.parametrize("methods", [[], [{"ima": {"weight": 0}}]])
def test_weight_zero_is_plain_training_bit_for_bit(methods):
    plain, distilled = detector(family="faster_rcnn"), detector(family="faster_rcnn")
    assert_same(snapshot(plain), snapshot(distilled))
    take_steps(Pair(plain), steps=3)
    teacher = detector(channels=24, seed=1)
    teacher.forward_features = None  # weight 0 is free: this would fail
    take_steps(Pair(distilled, teacher, methods), steps=3)
    assert_same(snapshot(plain), snapshot(distilled))


def test_distillation_does_not_change_the_students_draws():
    """Proposal sampling uses the global generator; the mask does not."""
    student = detector(family="faster_rcnn")
    twin = copy.deepcopy(student)
    pair = Pair(student, detector(channels=24, seed=1), ["ima"]).train()
    torch.manual_seed(0)
    losses = pair(*batch())
    state = torch.get_rng_state()
    torch.manual_seed(0)
    alone = Pair(twin).train()(*batch())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(losses[name], alone[name]) for name in alone)


def test_exported_student_is_unchanged(tmp_path):
    from detdistill.models.checkpoints.io import load_model, save_model

    student = detector()
    keys, count = list(student.state_dict()), sum(p.numel() for p in student.parameters())
    pair = Pair(student, detector(channels=24, seed=1), ["ima"])
    take_steps(pair)
    save_model(pair.student, tmp_path / "student.safetensors")
    again = load_model(tmp_path / "student.safetensors")
    assert sorted(again.state_dict()) == sorted(keys)
    assert sum(p.numel() for p in again.parameters()) == count
    images, _ = batch()
    student.eval(), again.eval()
    with torch.no_grad():
        for a, b in zip(student(images), again(images), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize(
    ("student", "teacher"), [("retinanet", "faster_rcnn"), ("faster_rcnn", "retinanet"), ("fcos", "retinanet")]
)
def test_families_pair_and_images_without_boxes_are_finite(student, teacher, empty):
    pair = Pair(detector(student), detector(teacher, channels=24, seed=1), ["ima", "mimic"]).train()
    losses = pair(*batch(empty=empty))
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    gradients = [p.grad for p in pair.student.backbone.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_box_instances_follow_the_padded_size():
    pair = Pair(detector(), detector(channels=24, seed=1), [{"ima": {"instance": "box"}}]).train()
    images, targets = batch()
    images[1] = images[1][:, :40]
    targets[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert torch.isfinite(pair(images, targets)["ima"])


def test_bf16_is_near_fp32():
    pair = Pair(detector(), detector(channels=24, seed=1), [{"ima": {"mask": {"ratio": 0}}}, "mimic"]).eval()
    full = pair(*batch())
    with torch.autocast("cpu", torch.bfloat16):
        half = pair(*batch())
    for name, value in full.items():
        assert half[name].item() == pytest.approx(value.item(), rel=0.05), name


def test_schedule_of_weights():
    pair = Pair(
        detector(),
        detector(channels=24, seed=1),
        [{"ima": {"weight": 2, "warmup": 0.5}}, {"mimic": {"decay_from": 0.5}}],
    )
    assert pair.current_weights() == {"ima": 2, "mimic": 1}
    seen = []
    for step in range(10):
        pair.at_step(step, 10)
        seen.append(pair.current_weights())
    ima, mimic = ([weights[name] for weights in seen] for name in ("ima", "mimic"))
    assert 0 < ima[0] < ima[3] < ima[5] == ima[9] == 2
    assert mimic[0] == mimic[4] == 1 > mimic[6] > mimic[9] > 0


def test_masks_are_drawn_anew_and_repeat_with_the_step():
    pair = Pair(detector(), detector(channels=24, seed=1), [{"ima": {"preset": "paper"}}]).eval()
    values = []
    for step in (3, 4, 3):
        pair.at_step(step, 10)
        values.append(pair(*batch())["ima"].item())
    assert values[0] == values[2] != values[1]


def test_mistakes_are_told():
    student, teacher = detector(), detector(channels=24, seed=1)
    with pytest.raises(UserError, match="did you mean 'ima'"):
        Pair(student, teacher, ["imma"])
    with pytest.raises(UserError, match="did you mean 'ratio'"):
        Pair(student, teacher, [{"ima": {"mask": {"ration": 0.5}}}])
    with pytest.raises(UserError, match="ima: alpha: input should be a valid number"):
        Pair(student, teacher, [{"ima": {"alpha": "ten"}}])
    with pytest.raises(UserError, match=r"ima: mask\.domain: input should be 'fft', .* \(got 'ftf'\)"):
        Pair(student, teacher, [{"ima": {"mask": {"domain": "ftf"}}}])
    with pytest.raises(UserError, match=r"ima: mask\.ratio: input should be less than 1"):
        Pair(student, teacher, [{"ima": {"mask": {"ratio": 1.0}}}])
    with pytest.raises(UserError, match="preset"):
        Pair(student, teacher, [{"ima": {"preset": "letter"}}])
    with pytest.raises(UserError, match="given twice"):
        Pair(student, teacher, ["ima", "ima"])
    with pytest.raises(UserError, match="need a teacher"):
        Pair(student, None, ["ima"])


# --- weights that look after themselves ------------------------------------------------------------------


def pyramid_gradient(pair, name):
    """‖∂(term)/∂pyramid‖ of one returned term, by backward instead of the pair's own way."""
    maps = {}
    pair.student.neck.register_forward_hook(lambda module, inputs, output: maps.update(output))
    losses = pair(*batch())
    wanted = losses[name] if name in losses else sum(v for k, v in losses.items() if k not in pair.methods)
    gradients = torch.autograd.grad(wanted, list(maps.values()), allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None]).norm().item()


@pytest.mark.parametrize("alpha", [1e-2, 1.0, 100.0])
def test_auto_weight_gives_the_gradient_its_ratio_whatever_the_scale(alpha):
    pair = Pair(
        detector(),
        detector(channels=24, seed=1),
        [{"mimic": {"weight": "auto", "ratio": 0.5, "alpha": alpha}}, {"ima": {"weight": "auto", "ratio": 1}}],
    ).train()
    pair.student.eval()  # the same numbers at each call
    pair.at_step(0, 100)
    pair(*batch())
    task = pyramid_gradient(pair, "task")
    pair.at_step(1, 100)  # not measured anew
    assert pyramid_gradient(pair, "mimic") == pytest.approx(0.5 * task, rel=1e-3)
    pair.at_step(0, 100)
    assert pyramid_gradient(pair, "ima") == pytest.approx(task, rel=1e-3)


def test_auto_weight_trains_alike_from_any_scale():
    teacher, ends = detector(channels=24, seed=1), []
    for alpha in (0.01, 100.0):
        pair = Pair(detector(), teacher, [{"mimic": {"weight": "auto", "alpha": alpha}}])
        take_steps(pair, steps=3)
        ends.append(torch.cat([p.detach().flatten() for p in pair.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-5)


def test_the_micro_batches_of_a_step_draw_apart_and_auto_looks_at_the_first():
    pair = Pair(
        detector(), detector(channels=24, seed=1), [{"ima": {"mask": {"ratio": 0.5}, "weight": "auto"}}]
    ).train()
    masked, measured = [], []
    pair.methods["ima"].register_forward_pre_hook(
        lambda _, args: masked.append(args[0].generator.initial_seed())
    )
    pair.terms["ima"].auto.update = lambda *_: measured.append(pair.step)
    for step in (0, 1, 0):
        pair.at_step(step, 100)
        pair(*batch())
        pair(*batch())
    assert len(set(masked[:4])) == 4
    assert masked[4:] == masked[:2]  # a resumed step draws what it drew
    assert measured == [0, 0]


def test_auto_weight_is_measured_now_and_then_and_saved():
    from detdistill.distillation.weighting import AUTO_EVERY

    pair = Pair(detector(), detector(channels=24, seed=1), [{"mimic": {"weight": "auto"}}]).train()
    seen = []
    for step in range(AUTO_EVERY + 1):
        if step in (0, 1, AUTO_EVERY):
            pair.at_step(step, 1000)
            pair(*batch(seed=step))
            seen.append(pair.applied_weights()["mimic"])
    assert seen[0] == seen[1] != seen[2]
    again = Pair(detector(), detector(channels=24, seed=1), [{"mimic": {"weight": "auto"}}])
    again.load_state_dict(pair.state_dict())
    assert again.applied_weights()["mimic"] == seen[2]


def test_auto_weight_passes_over_a_gradient_of_zero_or_nan():
    from detdistill.distillation.weighting import AutoWeight

    weight = AutoWeight(ratio=2.0)
    for task, term in ((1.0, 0.0), (float("nan"), 1.0), (0.0, 1.0)):
        weight.update(torch.tensor(task), torch.tensor(term))
        assert weight.factor == 1
    weight.update(torch.tensor(3.0), torch.tensor(1.0))
    assert weight.factor.item() == pytest.approx(6.0)  # the first measurement counts whole
    weight.update(torch.tensor(3.0), torch.tensor(4.0))
    assert weight.factor.item() == pytest.approx(3.0)  # half the way from 6 to 1.5, in logarithms


def test_a_loss_term_of_the_student_is_not_replaced_by_a_method_of_its_name():
    student = detector()
    losses = student.losses
    student.losses = lambda outputs, batch: {"ima": sum(losses(outputs, batch).values())}
    pair = Pair(student, detector(channels=24, seed=1), ["ima"]).train()
    with pytest.raises(UserError, match="have a term 'ima', as a method is called"):
        pair(*batch())
