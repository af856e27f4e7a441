from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detdistill.distillation.adapters import LevelAligner
from detdistill.distillation.alignment import resize_like
from detdistill.distillation.classes import match_classes
from detdistill.distillation.levels import input_scale, match_levels
from detdistill.errors import UserError
from detdistill.models import Preprocess

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
    maps = {"student": {4: torch.randn(2, 8, 12, 16)}, "teacher": {8: torch.randn(2, 16, 6, 8)}}
    (_, s, t), *rest = LevelAligner(matching)(SimpleNamespace(**maps, alignment=resize_like))
    assert not rest
    assert s.shape == t.shape == (2, 16, 6, 8)


def test_strides_count_in_the_students_pixels():
    """A teacher at twice the size: its cell of stride 16 covers what the student's of stride 8 does."""
    matching = match_levels(RETINANET, RETINANET, scale=0.5)
    assert [(m.student_stride, m.teacher_stride) for m in matching.levels] == [
        (8, 16), (16, 32), (32, 64), (64, 128),
    ]  # fmt: skip
    assert (matching.student_only, matching.teacher_only) == ((128,), (8,))
    assert not any(m.resized for m in matching.levels)


@pytest.mark.parametrize("scale", [0.72, 1.3])
def test_levels_within_half_an_octave_meet(scale):
    matching = match_levels(RETINANET, RETINANET, scale)
    assert [(m.student_stride, m.teacher_stride) for m in matching.levels] == [(s, s) for s in RETINANET]
    assert all(m.resized for m in matching.levels)
    assert all("resized" in row[2] for row in matching.rows())


def test_far_levels_are_told_in_the_students_pixels():
    with pytest.raises(UserError, match=r"the teacher's \[1.0, 2.0\] \(in the student's pixels\)"):
        match_levels({16: 8}, {8: 8, 16: 8}, scale=0.125)


@pytest.mark.parametrize(
    ("student", "teacher", "scale"),
    [
        (Preprocess(), Preprocess(divisor=128), 1.0),
        (Preprocess((320, 320)), Preprocess((640, 640)), 0.5),
        (Preprocess((320, 320), keep_ratio=False), Preprocess((640, 640), keep_ratio=False), 0.5),
        (Preprocess((400, 600)), Preprocess((800, 1333)), 0.5),
        (Preprocess((480, 640), keep_ratio=False), Preprocess((480, 640)), 1.0),  # of a photograph, 4:3
        (Preprocess((640, 640), keep_ratio=False), Preprocess((480, 1000)), 640 / (480 * 640) ** 0.5),
    ],
)
def test_scales_of_input_sizes(student, teacher, scale):
    assert input_scale(student, teacher) == pytest.approx(scale)
    assert input_scale(teacher, student) == pytest.approx(1 / scale)


def test_classes_meet_by_name():
    match = match_classes(("a", "b", "c"), ("c", "x", "a"))
    assert match.pairs == ((0, 2), (2, 0))
    assert (match.missing, match.extra, match.same) == (("b",), ("x",), False)
    assert match.lines() == [
        "the teacher knows 2 of the student's 3 classes",
        "not known to the teacher: b",
        "known to the teacher alone, not used: x",
    ]
    assert match_classes(("a", "b"), ("a", "b")).same
    assert not match_classes(("a", "b"), ("b", "a")).same
    assert not match_classes((), ("b",)).pairs


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


def test_unit_maps_have_the_teachers_size_taken_out_of_both():
    torch.manual_seed(0)
    s, t = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    align = LevelAligner(match_levels({8: 4}, {8: 4}), unit=True)

    def aligned(factor):
        ((_, ours, theirs),) = align(
            SimpleNamespace(student={8: factor * s}, teacher={8: factor * t}, alignment=resize_like)
        )
        return ours, theirs

    ours, theirs = aligned(1.0)
    assert theirs.square().mean().sqrt().item() == pytest.approx(1)
    torch.testing.assert_close(ours / theirs, s / t)
    for a, b in zip(aligned(70.0), (ours, theirs), strict=True):
        torch.testing.assert_close(a, b)
    assert all(x.isfinite().all() for x in aligned(0.0))
