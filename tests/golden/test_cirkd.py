"""CIRKD against its formula in plain numpy; its memory against queues of Python lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.cirkd import (
    CIRKDLoss,
    Memory,
    pooled,
    random_places,
)

from .differences import assert_golden, random_maps


def unit(feature):
    return feature / np.sqrt((feature**2).sum(axis=0, keepdims=True))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def divergence(student_row, teacher_row, temperature):
    q, p = softmax(teacher_row / temperature), softmax(student_row / temperature)
    return np.sum(q * np.log(q / p))


def batch_term(student, teacher, temperature=0.1):
    s, t = [unit(x) for x in student], [unit(x) for x in teacher]
    terms = []
    for a in range(len(s)):
        for b in range(len(s)):
            rows = [divergence(s[a][:, p] @ s[b], t[a][:, p] @ t[b], temperature) for p in range(s[a].shape[1])]
            terms.append(np.mean(rows))
    return np.mean(terms)


def memory_term(student, teacher, contrasts, temperature=0.1):
    return np.mean(
        [divergence(contrasts @ s, contrasts @ t, temperature) for s, t in zip(student, teacher, strict=True)]
    )


def test_batch_term():
    student, teacher = random_maps((3, 4, 6), teacher_shape=(3, 5, 6))
    assert_golden(CIRKDLoss(), batch_term, student, teacher)


def test_memory_term():
    student, teacher = random_maps((7, 4))
    contrasts = np.random.default_rng(2).normal(size=(9, 4))
    assert_golden(CIRKDLoss().memory, memory_term, student, teacher, contrasts)


def test_memory_term_of_some_rows():
    student, teacher = random_maps((7, 4))
    contrasts = np.random.default_rng(2).normal(size=(9, 4))
    valid = np.array([True, False, True, True, False, False, True])

    def loss(s, t, v):
        return CIRKDLoss().memory(s, t, v, torch.tensor(valid))

    assert_golden(loss, lambda s, t, v: memory_term(s[valid], t[valid], v), student, teacher, contrasts)


def test_no_rows_give_nothing():
    student = torch.randn(3, 4, requires_grad=True)
    none = torch.zeros(3, dtype=torch.bool)
    loss = CIRKDLoss().memory(student, torch.randn(3, 4), torch.randn(5, 4), none)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_the_batch_term_holds_one_images_pairs_at_a_time():
    """What autograd keeps for the backward pass does not grow with the square of the pixels."""
    kept = []
    student, teacher = (torch.randn(3, 4, 50) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        CIRKDLoss()(student.requires_grad_(), teacher).backward()
    assert max(kept) <= 3 * 4 * 50


def test_queues_are_those_of_lists():
    torch.manual_seed(0)
    memory = Memory(classes=3, channels=2, length=4)
    lists = [list(queue[:4]) for queue in memory.queue_QLC.clone()]
    starts = [0, 0, 0]
    for _ in range(5):
        features, valid = torch.randn(3, 6, 2), torch.rand(3, 6) < 0.5
        memory.add(features, valid)
        for q in range(3):
            kept = [features[q, k] for k in range(6) if valid[q, k]][-4:]
            for feature in kept:
                lists[q][starts[q]] = feature
                starts[q] = (starts[q] + 1) % 4
        assert memory.next_Q.tolist() == starts
        for q in range(3):
            torch.testing.assert_close(memory.queue_QLC[q, :4], torch.stack(lists[q]))


def test_a_draw_takes_as_many_of_each_class():
    memory = Memory(classes=3, channels=2, length=5)
    for q in range(3):
        memory.queue_QLC[q] = q
    drawn = memory.draw(4, torch.Generator().manual_seed(0))
    assert drawn[:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_chosen_pixels_are_of_their_class():
    labels = torch.randint(0, 4, (3, 50))
    labels[0, :] = 2
    is_class = labels[:, None] == torch.arange(5)[:, None]
    chosen, valid = random_places(is_class, 8, torch.Generator().manual_seed(0))
    for n in range(3):
        for q in range(5):
            places = chosen[n, q][valid[n, q]].tolist()
            assert len(set(places)) == len(places) == min(8, int(is_class[n, q].sum()))
            assert all(labels[n, place] == q for place in places)


def test_pooling_stops_when_an_image_has_few_enough_cells():
    assert pooled(torch.zeros(1, 2, 30, 40), 1200).shape[-2:] == (30, 40)
    assert pooled(torch.zeros(1, 2, 30, 40), 1199).shape[-2:] == (15, 20)
    assert pooled(torch.zeros(1, 2, 31, 40), 100).shape[-2:] == (8, 10)


def test_wanted_places_come_first():
    wanted = torch.zeros(20, dtype=torch.bool)
    wanted[13:16] = True
    places, valid = random_places(wanted, 5, torch.Generator().manual_seed(0))
    assert valid.tolist() == [True] * 3 + [False] * 2
    assert sorted(places[:3].tolist()) == [13, 14, 15]
    firsts = {random_places(wanted, 1, torch.Generator().manual_seed(k))[0].item() for k in range(30)}
    assert firsts == {13, 14, 15}


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature must be positive"):
        CIRKDLoss(temperature=0)
