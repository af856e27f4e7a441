from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detdistill.training.sampler import StepSampler, steps_per_epoch


def indices(*args, **kwargs):
    return [[index for _, index in batch] for batch in StepSampler(*args, **kwargs)]


def test_an_epoch_sees_every_image_once_and_is_shuffled_anew():
    batches = list(StepSampler(12, 4, stop=6, seed=1))
    first, second = batches[:3], batches[3:]
    assert sorted(i for batch in first for _, i in batch) == list(range(12))
    assert sorted(i for batch in second for _, i in batch) == list(range(12))
    assert {epoch for batch in first for epoch, _ in batch} == {0}
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    assert [i for b in first for _, i in b] != [i for b in second for _, i in b]
    assert indices(12, 4, stop=6, seed=1) != indices(12, 4, stop=6, seed=2)


@given(
    length=st.integers(1, 40), batch=st.integers(1, 12), start=st.integers(0, 15), more=st.integers(0, 15),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_starting_later_is_the_tail_of_the_whole(length, batch, start, more, seed):
    whole = indices(length, batch, stop=start + more, seed=seed)
    assert indices(length, batch, stop=start + more, start=start, seed=seed) == whole[start:]
    assert all(len(images) == batch for images in whole)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 3), (4, 1)])
def test_processes_and_micro_batches_share_the_same_step(world, accumulate):
    whole = indices(50, 12, stop=9, seed=3)
    shares = [
        indices(50, 12, stop=9, seed=3, world=world, accumulate=accumulate, rank=rank) for rank in range(world)
    ]
    for step, images in enumerate(whole):
        parts = [share[step * accumulate + micro] for share in shares for micro in range(accumulate)]
        assert sorted(index for part in parts for index in part) == sorted(images)
        assert {len(part) for part in parts} == {12 // (world * accumulate)}
    assert len(StepSampler(50, 12, stop=9, accumulate=accumulate, world=world)) == 9 * accumulate


def test_a_set_smaller_than_a_batch_is_repeated():
    assert (
        sorted(indices(3, 8, stop=1)[0]) == [0, 0, 0, 1, 1, 1, 2, 2] or len(set(indices(3, 8, stop=1)[0])) == 3
    )
    assert steps_per_epoch(3, 8) == 1


def test_an_uneven_share_is_refused():
    with pytest.raises(ValueError, match="cannot be shared"):
        StepSampler(10, 5, stop=1, world=2)
