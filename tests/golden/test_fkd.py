"""FKD against its formulas in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.fkd import FKDLoss, NonLocal

from .differences import assert_golden

N, C, H, W = 2, 4, 3, 5
OTHER = 3  # channels of a student that is narrower
WEIGHTS = {"feature_weight": 0.3, "pooled_weight": 0.7, "relation_weight": 1.1}


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def pixels(maps, tau):
    """H W softmax(vec(mean_c |F|) / tau)."""
    return np.stack([
        H * W * softmax(np.abs(x).mean(axis=0).ravel() / tau).reshape(1, H, W) for x in maps
    ])  # fmt: skip


def channels(maps, tau):
    """C softmax(mean_hw |F| / tau)."""
    return np.stack([
        x.shape[0] * softmax(np.abs(x).mean(axis=(1, 2)) / tau).reshape(-1, 1, 1) for x in maps
    ])  # fmt: skip


def mask_of(student, adapted, teacher, tau, channel_mask):
    mask = (pixels(student, tau) + pixels(teacher, tau)) / 2
    if channel_mask:
        looked = student if student.shape[1] == C else adapted
        mask = mask * (channels(looked, tau) + channels(teacher, tau)) / 2
    return mask


def fkd(adapted, teacher, mask, lin, conv, student_relation, teacher_relation, reduction="paper"):
    def size(x):
        return np.mean(x**2) if reduction == "mean" else np.sqrt(np.sum(x**2))

    return (
        WEIGHTS["feature_weight"] * size((adapted - teacher) * np.sqrt(mask))
        + WEIGHTS["pooled_weight"] * size(lin - teacher.mean(axis=(2, 3)))
        + WEIGHTS["pooled_weight"] * size(conv - teacher.mean(axis=1, keepdims=True))
        + WEIGHTS["relation_weight"] * size(student_relation - teacher_relation)
    )


def arrays(student_channels):
    generator = np.random.default_rng(0)
    maps = (N, C, H, W)
    shapes = ((N, student_channels, H, W), maps, maps, (N, C), (N, 1, H, W), maps, maps)
    return [generator.normal(0.2, 1.0, shape) for shape in shapes]


@pytest.mark.parametrize("reduction", ["paper", "mean"])
@pytest.mark.parametrize("channel_mask", [True, False])
@pytest.mark.parametrize("student_channels", [C, OTHER])
@pytest.mark.parametrize("moved", [0, 3, 4, 5])  # φ(S), linear, conv, ψ(R_S(S)); 6 is the teacher's relation
def test_value_and_gradient(reduction, channel_mask, student_channels, moved):
    loss = FKDLoss(**WEIGHTS, tau=0.5, channel_mask=channel_mask, reduction=reduction)
    student, teacher, *others = arrays(student_channels)
    inputs = [others[0], teacher, student, *others[1:]]
    mask = mask_of(student, others[0], teacher, 0.5, channel_mask)  # no gradient: it stays when inputs move

    def ours(x, *rest):
        adapted, t, s, lin, conv, ours, theirs = [*rest[:moved], x, *rest[moved:]]
        return loss(
            s, t, adapted_NCHW=adapted, channels_NC=lin, pixels_N1HW=conv,
            student_relation_NCHW=ours, teacher_relation_NCHW=theirs,
        )  # fmt: skip

    def plain(x, *rest):
        adapted, t, _, *parts = [*rest[:moved], x, *rest[moved:]]
        return fkd(adapted, t, mask, *parts, reduction)

    rest = [array for i, array in enumerate(inputs) if i != moved]
    assert_golden(ours, plain, inputs[moved], *rest, coordinates=6)


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_non_local_block(pool):
    """F + out(sum over keys of (query · key) value / keys), keys pooled by their maximum.

    A window is no larger than the map, and what no whole window covers is dropped.
    """
    torch.manual_seed(0)
    block = NonLocal(C, reduction=2, pool=pool).double()
    x = np.random.default_rng(0).normal(size=(C, H, W))

    def layer(part, at):
        return part.weight.detach().numpy()[:, :, 0, 0] @ at + part.bias.detach().numpy()

    def pooled(part):
        y = np.stack([[layer(part, x[:, i, j]) for j in range(W)] for i in range(H)])
        h, w = min(pool, H), min(pool, W)
        return [
            y[i : i + h, j : j + w].max(axis=(0, 1))
            for i in range(0, H - h + 1, h)
            for j in range(0, W - w + 1, w)
        ]

    keys, values = pooled(block.key), pooled(block.value)
    expected = np.empty_like(x)
    for i, j in np.ndindex(H, W):
        query = layer(block.query, x[:, i, j])
        found = sum((query @ k) * v for k, v in zip(keys, values, strict=True)) / len(keys)
        expected[:, i, j] = x[:, i, j] + layer(block.out, found)
    np.testing.assert_allclose(block(torch.from_numpy(x)[None])[0].detach().numpy(), expected, rtol=1e-9)
