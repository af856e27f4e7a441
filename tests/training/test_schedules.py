from __future__ import annotations

import pytest
import torch

from detdistill.recipe import ScheduleConfig
from detdistill.training.schedules import learning_rate_factor


def factors(total, **options):
    return [learning_rate_factor(ScheduleConfig(**options), step, total) for step in range(total)]


def test_the_papers_2x_schedule():
    """24 epochs of 100 steps, the rate divided by 10 after epochs 16 and 22."""
    values = factors(2400, warmup=0)
    assert values[1599] == 1
    assert values[1600] == pytest.approx(0.1)
    assert values[2199] == pytest.approx(0.1)
    assert values[2200] == pytest.approx(0.01)


def test_cosine_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert factors(50, name="cosine", warmup=0) == pytest.approx(expected)


def test_poly_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=50, power=0.9)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert factors(50, name="poly", warmup=0) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "poly"])
def test_the_final_factor_is_where_the_fall_ends(name):
    values = factors(1000, name=name, warmup=0, final_factor=0.25)
    assert values[0] == 1
    assert min(values) == values[-1] == pytest.approx(0.25, abs=2e-3)
    assert min(values) > 0.25


def test_the_fall_begins_after_the_warmup():
    values = factors(1000, name="poly", warmup=100, power=1.0)
    assert max(values) == values[100] == 1
    assert values[550] == pytest.approx(0.5)


def test_warmup_rises_linearly_and_never_takes_more_than_a_tenth():
    values = factors(1000, name="constant", warmup=50, warmup_factor=0.1)
    assert values[0] == pytest.approx(0.1)
    assert values[25] == pytest.approx(0.55)
    assert values[50:] == [1.0] * 950
    assert factors(100, name="constant", warmup=500)[10] == 1.0
