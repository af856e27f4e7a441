from __future__ import annotations

import itertools

from detdistill.seeding import mix_seed


def test_a_seed_is_the_same_on_every_machine_and_python():
    # What numpy.random.SeedSequence(0) generates; numpy promises that it stays so.
    assert mix_seed(0) == 2968811710 << 31 | 3677149159 >> 1
    assert 0 <= mix_seed(2**40, 3) < 2**63


def test_neighbors_do_not_share_a_seed():
    grid = list(itertools.product(range(20), repeat=3))
    assert len({mix_seed(*numbers) for numbers in grid}) == len(grid)
    assert mix_seed(1, 2) != mix_seed(2, 1)
