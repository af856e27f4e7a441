"""Teachers by name, what they provide, and students that share one."""

from __future__ import annotations

import copy

import pytest
import torch

from detdistill.distillation.distiller import Distiller, Trainable
from detdistill.distillation.pair import Pair
from detdistill.distillation.teachers import LiveTeacher, Samples, Teacher
from detdistill.errors import UserError

from .pairs import batch, detector


class FeaturesAlone(LiveTeacher):
    """As a cache of feature maps would be."""

    provides = frozenset({"features"})


class Counting(LiveTeacher):
    """Counts how often it looks, and at what."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.asked = []

    def observe(self, samples, requires):
        self.asked.append(requires)
        return super().observe(samples, requires)


def step(distiller, samples):
    views = distiller.observe(samples)
    found = []
    for trainable in distiller.trainables:
        torch.manual_seed(0)
        found.append(trainable.train()(samples, views))
    return found


def test_a_live_teacher_is_a_teacher():
    live = LiveTeacher(detector(), "big")
    assert isinstance(live, Teacher)
    assert live.provides == {"features", "outputs", "tower_features"}
    assert not any(parameter.requires_grad for parameter in live.model.parameters())


def test_each_term_has_its_own_teacher():
    first, second = (LiveTeacher(detector(channels=c, seed=c), f"of {c}") for c in (16, 24))
    student = detector(seed=1)
    trainable = Trainable(copy.deepcopy(student))
    trainable.learn_from(first, ["mimic"])
    trainable.learn_from(second, ["mimic", "pkd"])
    assert list(trainable.terms) == ["mimic", "mimic@of 24", "pkd"]
    (losses,) = step(Distiller([first, second], [trainable]), Samples(*batch()))
    for teacher, methods in ((first, ["mimic"]), (second, ["mimic", "pkd"])):
        alone = Trainable(copy.deepcopy(student))
        alone.learn_from(teacher, methods)
        ours = {name: f"{name}@{teacher.name}" for name in methods}
        ours = {name: long if long in trainable.terms else name for name, long in ours.items()}
        for name, term in alone.terms.items():
            assert trainable.terms[ours[name]].teacher == teacher.name
            term.load_state_dict(trainable.terms[ours[name]].state_dict())
        (expected,) = step(Distiller([teacher], [alone]), Samples(*batch()))
        assert all(torch.equal(losses[ours[name]], expected[name]) for name in methods)


def test_what_a_teacher_does_not_provide_is_refused_when_the_term_is_built():
    trainable = Trainable(detector(seed=1))
    trainable.learn_from(FeaturesAlone(detector(), "cache"), ["ima"])
    with pytest.raises(
        UserError, match="kd compares outputs, and cache provides features only: use a method on"
    ):
        trainable.learn_from(FeaturesAlone(detector(), "cache"), ["kd"])
    with pytest.raises(UserError, match="method 'ima' is given twice"):
        trainable.learn_from(FeaturesAlone(detector(), "cache"), ["ima"])


def test_students_share_a_teacher_bit_for_bit():
    """Each loss is that of a pair of its own, and the teacher looks once."""
    teacher = detector(channels=24)
    pairs = [
        Pair(detector(seed=seed), copy.deepcopy(teacher), methods)
        for seed, methods in ((1, ["ima"]), (2, ["kd"]))
    ]
    counting = Counting(teacher, "shared")
    trainables = []
    for pair, methods in zip(pairs, (["ima"], ["kd"]), strict=True):
        trainable = Trainable(copy.deepcopy(pair.student))
        trainable.learn_from(counting, methods)
        trainable.load_state_dict(pair.state_dict())
        trainables.append(trainable)
    shared = step(Distiller([counting], trainables), Samples(*batch()))
    assert counting.asked == [{"features", "outputs"}]
    for pair, losses in zip(pairs, shared, strict=True):
        torch.manual_seed(0)
        expected = pair.train()(*batch())
        assert expected.keys() == losses.keys()
        assert all(torch.equal(value, losses[name]) for name, value in expected.items())


def test_two_teachers_of_one_name_are_refused():
    with pytest.raises(ValueError, match="the same name"):
        Distiller([LiveTeacher(detector()), LiveTeacher(detector())], [])


def test_a_state_of_version_0_1_is_loaded():
    pair = Pair(detector(seed=1), detector(channels=24), [{"ima": {"weight": "auto", "adapt": "always"}}])
    state = {key: value.clone() for key, value in pair.state_dict().items()}
    old = {
        key.replace("terms.ima.method.", "methods.ima.").replace("terms.ima.auto.", "auto.ima."): ~value
        if value.dtype == torch.bool
        else value + 1
        for key, value in state.items()
    }
    assert {key.split(".")[0] for key in old} == {"student", "methods", "auto"}
    pair.load_state_dict(old)
    assert not any(torch.equal(value, state[key]) for key, value in pair.state_dict().items())
