"""FGD against its formulas in plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.fgd import FGDLoss, GlobalContext, focal_masks
from detdistill.models.base import Batch

from .differences import assert_golden, random_maps

WEIGHTS = {
    "foreground_weight": 0.7,
    "background_weight": 0.4,
    "attention_weight": 0.3,
    "relation_weight": 0.05,
}
GENERATOR = np.random.default_rng(2)
SHAPE = (2, 4, 5, 6)
FOREGROUND, BACKGROUND = (GENERATOR.uniform(0, 0.2, (2, 5, 6)) for _ in range(2))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def attention(image, tau):
    """As = HW softmax(vec(mean_c |F|) / tau) and Ac = C softmax(mean_hw |F| / tau) of one image."""
    channels, height, width = image.shape
    spatial = height * width * softmax(np.abs(image).mean(axis=0).ravel() / tau).reshape(height, width)
    return spatial, channels * softmax(np.abs(image).mean(axis=(1, 2)) / tau)


def fgd(student, teacher, foreground, background, added_s, added_t, alpha, beta, gamma, lam, tau):
    total = 0.0
    for n in range(len(student)):
        spatial_t, channel_t = attention(teacher[n], tau)
        spatial_s, channel_s = attention(student[n], tau)
        for c, i, j in np.ndindex(student[n].shape):
            focus = spatial_t[i, j] * channel_t[c] * (teacher[n, c, i, j] - student[n, c, i, j]) ** 2
            total += (alpha * foreground[n, i, j] + beta * background[n, i, j]) * focus
            related_s, related_t = student[n, c, i, j] + added_s[n, c], teacher[n, c, i, j] + added_t[n, c]
            total += lam * (related_s - related_t) ** 2
        total += gamma * (np.abs(spatial_t - spatial_s).sum() + np.abs(channel_t - channel_s).sum())
    return total / len(student)


def context(image, block):
    """W2 ReLU(LN(W1 sum_p softmax(Wk x)_p x_p)) of one image."""
    parts = {name: value.detach().numpy() for name, value in block.named_parameters()}
    pixels = image.reshape(len(image), -1)
    pooled = pixels @ softmax(parts["key_C"] @ pixels)
    tower_features = parts["transform.0.weight"] @ pooled + parts["transform.0.bias"]
    tower_features = (tower_features - tower_features.mean()) / np.sqrt(tower_features.var() + 1e-5)
    tower_features = np.maximum(tower_features * parts["transform.1.weight"] + parts["transform.1.bias"], 0)
    return parts["transform.3.weight"] @ tower_features + parts["transform.3.bias"]


def blocks():
    """Two blocks of global context, away from 0, where their last layer starts."""
    torch.manual_seed(0)
    made = [GlobalContext(4).double() for _ in range(2)]
    for block in made:
        for parameter in block.parameters():
            parameter.data += torch.randn_like(parameter)
    return made


def assert_is_formula(weights, tau=0.5, coordinates=12):
    """Whole: the student moves its own attention, its own context, and the difference."""
    student_block, teacher_block = blocks()

    def ours(student, teacher, *masks):
        made = [block.to(student.dtype) for block in (student_block, teacher_block)]
        return FGDLoss(**weights, tau=tau)(student, teacher, *masks, *made)

    def plain(student, teacher, *masks):
        added = [
            np.stack([context(image, block.double()) for image in x])
            for block, x in ((student_block, student), (teacher_block, teacher))
        ]
        return fgd(student, teacher, *masks, *added, *weights.values(), tau)

    assert_golden(ours, plain, *random_maps(SHAPE), FOREGROUND, BACKGROUND, coordinates=coordinates)


@pytest.mark.parametrize("tau", [0.5, 0.8])
def test_value_and_gradient(tau):
    assert_is_formula(WEIGHTS, tau)


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_term_alone(name):
    assert_is_formula({**dict.fromkeys(WEIGHTS, 0.0), name: 1.0}, coordinates=4)


def test_without_context_blocks():
    nothing = np.zeros((2, 4))
    assert_golden(
        FGDLoss(**WEIGHTS),
        lambda *arrays: fgd(*arrays, nothing, nothing, *WEIGHTS.values(), 0.5),
        *random_maps(SHAPE),
        FOREGROUND,
        BACKGROUND,
    )


def test_gradients_of_maps_and_keys_are_their_slopes():
    blocks_, (student, teacher) = blocks(), torch.randn(2, 2, 4, 3, 5, dtype=torch.float64)
    masks = torch.rand(2, 2, 3, 5, dtype=torch.float64)
    loss = FGDLoss(**WEIGHTS)

    def of(student, *keys):
        for block, key in zip(blocks_, keys, strict=True):
            block.key_C = key
        return loss(student, teacher, *masks, *blocks_, unit=True)

    keys = [block.key_C.detach().requires_grad_() for block in blocks_]
    for block in blocks_:
        del block.key_C  # a parameter: what stands for it in `of` is none
    assert torch.autograd.gradcheck(of, (student.requires_grad_(), *keys))


def test_masks():
    """Mfg = max over boxes of 1/(h w) on the box, in cells; Mbg = [no box] / N_bg; on the padded map."""
    boxes = np.array([[3.0, 5.0, 30.0, 50.0], [20.0, 8.0, 60.0, 63.0], [41.0, 41.0, 42.0, 42.0]])
    batch = Batch(
        images_N3HW=torch.zeros(2, 3, 64, 96),
        sizes=[(64, 64), (64, 96)],
        original_sizes=[(64, 64), (64, 96)],
        targets=[
            {"boxes": torch.tensor(boxes), "labels": torch.zeros(3)},
            {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)},
        ],
    )
    foreground, background = focal_masks(batch, torch.zeros(2, 1, 8, 12))
    expected = np.zeros((8, 12))
    for x1, y1, x2, y2 in boxes / 8:
        left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
        for i in range(top, bottom):
            for j in range(left, right):
                expected[i, j] = max(expected[i, j], 1 / ((bottom - top) * (right - left)))
    np.testing.assert_allclose(foreground[0], expected, rtol=1e-6)
    np.testing.assert_allclose(background[0], (expected == 0) / (expected == 0).sum(), rtol=1e-6)
    assert not foreground[1].any()
    np.testing.assert_allclose(background[1], np.full((8, 12), 1 / 96), rtol=1e-6)
