"""Compares a loss with its formula in plain numpy: the value, and the gradient by finite differences."""

from __future__ import annotations

import numpy as np
import torch

STEP = 1e-5


def random_maps(shape, seed=0, teacher_shape=None):
    """A student's and a teacher's map that are somewhat alike where their shapes are."""
    generator = np.random.default_rng(seed)
    student = generator.normal(0.3, 1.5, shape)
    teacher = generator.normal(0.1, 1.0, teacher_shape or shape)
    return student, teacher if teacher_shape else teacher + 0.4 * student


def assert_golden(loss, formula, student, *constants, coordinates=12, also=()):
    """``loss(student, *constants)`` in torch is ``formula(student, *constants)`` in numpy, gradient included.

    Args:
        loss, formula: of tensors and of arrays.
        student: the array with respect to which the gradient is taken.
        constants: further arrays.
        coordinates: so many random coordinates of the gradient are checked.
        also: further ones, as flat indices.
    """
    expected = formula(student, *constants)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        tensors = [torch.tensor(array, dtype=dtype) for array in (student, *constants)]
        value = loss(tensors[0].requires_grad_(), *tensors[1:])
        assert value.dtype == dtype
        np.testing.assert_allclose(value.item(), expected, rtol=tolerance)
    tensors = [torch.tensor(array, dtype=torch.float64) for array in (student, *constants)]
    loss(tensors[0].requires_grad_(), *tensors[1:]).backward()
    gradient = tensors[0].grad.numpy().ravel()
    chosen = np.random.default_rng(1).choice(student.size, min(coordinates, student.size), replace=False)
    chosen = [*chosen, *also]
    slopes = [_slope(formula, student, constants, i) for i in chosen]
    np.testing.assert_allclose(gradient[chosen], slopes, rtol=1e-5, atol=1e-7 * np.abs(gradient).max())


def _slope(formula, student, constants, index):
    values = []
    for step in (STEP, -STEP):
        moved = student.copy()
        moved.flat[index] += step
        values.append(formula(moved, *constants))
    return (values[0] - values[1]) / (2 * STEP)
