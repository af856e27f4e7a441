"""Covariances against torch's own, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from detdistill.distillation.correlation import covariances


def maps(mean=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 5, 4)
    student = torch.randn(shape, generator=generator, dtype=dtype) + mean
    return student.requires_grad_(), torch.randn(shape, generator=generator, dtype=dtype) * 2 - mean


@pytest.mark.parametrize(("over", "dims"), [("instance", (2, 3)), ("batch", (0, 2, 3))])
def test_values_and_gradients(over, dims):
    student, teacher = maps()
    var_s, var_t, covariance = covariances(student, teacher, over)
    centered = [x - x.mean(dims, keepdim=True) for x in (student, teacher)]
    plain = (
        student.var(dims, correction=0),
        teacher.var(dims, correction=0),
        (centered[0] * centered[1]).mean(dims),
    )
    for ours, theirs in zip((var_s, var_t, covariance), plain, strict=True):
        torch.testing.assert_close(ours.flatten(), theirs.flatten())
    assert torch.autograd.gradcheck(lambda x: covariances(x, teacher, over)[::2], student)


def test_a_small_variance_beside_a_large_mean():
    student, teacher = maps(mean=1000.0, dtype=torch.float32)
    var_s, var_t, _ = covariances(student, teacher)
    torch.testing.assert_close(var_s, student.double().var((2, 3), correction=0).float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(var_t, teacher.double().var((2, 3), correction=0).float(), rtol=1e-3, atol=0)
