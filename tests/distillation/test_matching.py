from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detdistill.config import UserError
from detdistill.distillation.matching import LevelAligner, match_levels

RETINANET = dict.fromkeys((8, 16, 32, 64, 128), 256)
FASTER = dict.fromkeys((4, 8, 16, 32, 64), 256)


def test_retinanet_and_faster_rcnn_meet_by_stride_both_ways():
    for student, teacher in ((RETINANET, FASTER), (FASTER, RETINANET)):
        matching = match_levels(student, teacher)
        assert [(m.student_stride, m.teacher_stride) for m in matching.levels] == [
            (s, s) for s in (8, 16, 32, 64)
        ]
        assert {*matching.student_only, *matching.teacher_only} == {4, 128}
        assert not any(m.resized for m in matching.levels)


def test_without_a_common_stride_the_nearest_meet_and_are_resized():
    matching = match_levels({4: 8}, {8: 16, 16: 16})
    assert [(m.student_stride, m.teacher_stride) for m in matching.levels] == [(4, 8)]
    (_, s, t), *rest = LevelAligner(matching)({4: torch.randn(2, 8, 12, 16)}, {8: torch.randn(2, 16, 6, 8)})
    assert not rest
    assert s.shape == t.shape == (2, 16, 6, 8)


def test_pyramids_too_far_apart_are_refused():
    with pytest.raises(UserError, match="factor of 4 apart"):
        match_levels({4: 8}, {64: 8})


def test_adapters_only_where_channels_differ():
    matching = match_levels({8: 16, 16: 32}, {8: 32, 16: 32})
    assert set(LevelAligner(matching).adapters) == {"8"}
    assert set(LevelAligner(matching, "always").adapters) == {"8", "16"}
    with pytest.raises(UserError, match="16 channels"):
        LevelAligner(matching, "never")
    rows = matching.rows()
    assert "1×1 adapter 16→32" in rows[0][2]
    assert rows[1][2] == "as it is"


pyramids = st.dictionaries(st.sampled_from([4, 8, 16, 32, 64, 128]), st.integers(1, 9), min_size=1)


@given(pyramids, pyramids)
def test_every_level_is_accounted_for_once(student, teacher):
    try:
        matching = match_levels(student, teacher)
    except UserError:
        assert not student.keys() & teacher.keys()
        return
    assert sorted([m.student_stride for m in matching.levels] + list(matching.student_only)) == sorted(student)
    assert {m.teacher_stride for m in matching.levels} | set(matching.teacher_only) == set(teacher)
