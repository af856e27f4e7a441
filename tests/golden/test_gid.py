"""GID against its formulas in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from detdistill.distillation.methods.gid import GIDLoss

from .differences import assert_golden, random_maps

SHAPE = (5, 3, 4, 4)  # R, C and a pooled side of 4
CHOSEN = np.array([[1.0, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0]])


def smooth_l1(x, beta):
    x = abs(x)
    return x - beta / 2 if x >= beta else x**2 / (2 * beta)


def relative_distances(x):
    count = len(x)
    table = np.array([[np.linalg.norm((a - b).ravel()) for b in x] for a in x])
    return table / (table.sum() / (count * (count - 1)))


def regions(student, teacher):
    count = len(student)
    feature = 5e-4 * np.sum((teacher - student) ** 2) / (count * 16)
    if count < 3:
        return feature
    s, t = relative_distances(student), relative_distances(teacher)
    relation = sum(smooth_l1(t[i, j] - s[i, j], 1.0) for i, j in np.ndindex(count, count))
    return feature + 40 * relation / (count * (count - 1))


def responses(student_cls, teacher_cls, student_box, teacher_box, beta):
    total = 0.0
    for n, p in np.argwhere(CHOSEN):
        guess, truth = (1 / (1 + np.exp(-logits[n, p])) for logits in (student_cls, teacher_cls))
        total += 0.1 * np.sum(-truth * np.log(guess) - (1 - truth) * np.log(1 - guess))
        total += sum(smooth_l1(student_box[n, p, i] - teacher_box[n, p, i], beta) for i in range(4))
    return total / CHOSEN.sum()


@pytest.mark.parametrize("count", [5, 3, 2, 1])
def test_features_and_relations(count):
    student, teacher = random_maps(SHAPE)
    assert_golden(GIDLoss(), regions, student[:count], teacher[:count])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_responses(beta):
    student, teacher = random_maps(SHAPE)
    generator = np.random.default_rng(6)
    cls, cls_teacher = (generator.normal(0, 2, (2, 6, 3)) for _ in range(2))
    box, box_teacher = (generator.normal(0, 1, (2, 6, 4)) for _ in range(2))
    gid = GIDLoss(box_beta=beta)

    def formula(cls, box, student, teacher, cls_teacher, box_teacher, chosen):
        return regions(student, teacher) + responses(cls, cls_teacher, box, box_teacher, beta)

    def loss(cls, box, student, teacher, cls_teacher, box_teacher, chosen):
        return gid(student, teacher, cls, cls_teacher, box, box_teacher, chosen)

    rest = (student, teacher, cls_teacher, box_teacher, CHOSEN)
    assert_golden(loss, formula, cls, box, *rest, coordinates=36)
    assert_golden(
        lambda box, cls, *rest: loss(cls, box, *rest),
        lambda box, cls, *rest: formula(cls, box, *rest),
        box, cls, *rest, coordinates=48,
    )  # fmt: skip
