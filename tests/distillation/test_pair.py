"""A pair: the teacher never moves, the student is what is exported, and weight 0 changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from detdistill.config import ModelConfig, UserError
from detdistill.distillation.pair import Pair
from detdistill.models import build_model

CLASSES = ("a", "b", "c")


def detector(family="fcos", channels=16, seed=0, **options):
    torch.manual_seed(seed)
    config = ModelConfig(
        family=family, backbone="mobilenetv3_small_050", channels=channels, head_depth=1, **options
    )
    return build_model(config, CLASSES)


def batch(n=2, size=64, seed=0, empty=False):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, size, size, generator=generator) for _ in range(n)]
    box = torch.zeros(0, 4) if empty else torch.tensor([[5.0, 5.0, 40.0, 50.0], [20.0, 30.0, 60.0, 60.0]])
    return images, [{"boxes": box.clone(), "labels": torch.arange(len(box))} for _ in range(n)]


def take_steps(pair, steps=2, lr=0.05, weight_decay=0.0):
    pair.train()
    optimizer = torch.optim.SGD(pair.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    for step in range(steps):
        torch.manual_seed(step)
        losses = pair(*batch(seed=step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return losses


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["ima", "mimic"])
def test_teacher_stays_and_adapters_move(method):
    strides = (8, 16, 32)
    teacher = detector(channels=24, seed=1, strides=strides)
    teacher.train()  # as a careless user leaves it
    pair = Pair(detector(strides=strides), teacher, [method])
    teacher_before, adapters_before = snapshot(teacher), snapshot(pair.methods)
    losses = take_steps(pair)
    assert losses[method] > 0
    assert_same(teacher_before, snapshot(teacher))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    # IMA standardises what an adapter gives, so that its bias has no say.
    moved = {
        name for name, value in pair.methods.state_dict().items() if not value.equal(adapters_before[name])
    }
    assert moved >= {f"{method}.align.adapters.{stride}.weight" for stride in strides}


def test_teacher_is_no_part_of_the_pair_but_follows_it():
    student, teacher = detector(), detector(channels=24, seed=1)
    pair = Pair(student, teacher, ["ima"])
    of_teacher = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in of_teacher for p in pair.parameters())
    assert not any(name.startswith("_teacher") for name in pair.state_dict())
    pair.double()
    assert next(teacher.parameters()).dtype == torch.float64
    pair.float().train()
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
    teacher.pyramid = None  # weight 0 is free: this would fail
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
    from detdistill.models.checkpoints import load_model, save_model

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
    targets[1]["boxes"] = torch.zeros(0, 4)
    assert torch.isfinite(pair(images, targets)["ima"])


def test_bf16_is_near_fp32():
    pair = Pair(detector(), detector(channels=24, seed=1), [{"ima": {"mask_ratio": 0}}, "mimic"]).eval()
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
    pair = Pair(detector(), detector(channels=24, seed=1), ["ima"]).eval()
    values = []
    for step in (3, 4, 3):
        pair.at_step(step, 10)
        values.append(pair(*batch())["ima"].item())
    assert values[0] == values[2] != values[1]


def test_mistakes_are_told():
    student, teacher = detector(), detector(channels=24, seed=1)
    with pytest.raises(UserError, match="did you mean 'ima'"):
        Pair(student, teacher, ["imma"])
    with pytest.raises(UserError, match="did you mean 'mask_ratio'"):
        Pair(student, teacher, [{"ima": {"mask_ration": 0.5}}])
    with pytest.raises(UserError, match=r"ima\.alpha is 'ten'; give a float"):
        Pair(student, teacher, [{"ima": {"alpha": "ten"}}])
    with pytest.raises(UserError, match=r"ima\.domain is 'ftf'; did you mean 'fft'"):
        Pair(student, teacher, [{"ima": {"domain": "ftf"}}])
    with pytest.raises(UserError, match=r"mask_ratio must be in \[0, 1\)"):
        Pair(student, teacher, [{"ima": {"mask_ratio": 1.0}}])
    with pytest.raises(UserError, match="preset"):
        Pair(student, teacher, [{"ima": {"preset": "letter"}}])
    with pytest.raises(UserError, match="given twice"):
        Pair(student, teacher, ["ima", "ima"])
    with pytest.raises(UserError, match="need a teacher"):
        Pair(student, None, ["ima"])
