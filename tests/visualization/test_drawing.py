"""Boxes and their labels on an image: what is on top, and that no label covers another."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detdistill.visualization.drawing import CROWD, Rectangle, class_color, draw_detections, place_labels

CLASSES = ("cat", "dog")
GRAY = torch.full((3, 240, 320), 128, dtype=torch.uint8)


def detections(*rows: tuple[list[float], int, float]) -> dict[str, Tensor]:
    boxes, labels, scores = zip(*rows, strict=True)
    return {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


def has_color(region_3HW: Tensor, label: int) -> bool:
    rgb = torch.tensor(list(bytes.fromhex(class_color(label)[1:])), dtype=torch.uint8)
    return bool((region_3HW == rgb[:, None, None]).all(dim=0).any())


CAT = ([60.0, 60.0, 200.0, 180.0], 0, 0.9)
LABEL_OF_CAT = (slice(None), slice(42, 60), slice(60, 110))  # above its box


@pytest.mark.parametrize(
    "weaker", [[60.0, 60, 200, 180], [61.0, 61, 201, 181], [58.0, 50, 150, 120], [0.0, 45, 319, 239]]
)
@pytest.mark.parametrize("weaker_first", [True, False])
def test_a_weaker_box_covers_nothing_of_a_stronger_one(weaker: list[float], weaker_first: bool) -> None:
    rows = [CAT, (weaker, 1, 0.4)]
    alone = draw_detections(GRAY, detections(CAT), CLASSES)
    both = draw_detections(GRAY, detections(*(rows[::-1] if weaker_first else rows)), CLASSES)
    assert has_color(alone[LABEL_OF_CAT], 0)
    assert torch.equal(both[LABEL_OF_CAT], alone[LABEL_OF_CAT])
    # Only the weaker one's label may lie on the stronger one's lines: the sides without labels are whole.
    right = (slice(None), slice(80, 160), slice(199, 201))
    assert torch.equal(both[right], alone[right])


def test_of_ground_truth_the_smaller_box_is_on_top() -> None:
    boxes = {
        "boxes": torch.tensor([[50.0, 50, 150, 150], [20.0, 20, 150, 220]]),
        "labels": torch.tensor([0, 1]),
    }
    drawn = draw_detections(GRAY, boxes, CLASSES)
    side = drawn[:, 80:140, 149:151]  # where both have their right side
    assert has_color(side, 0)
    assert not has_color(side, 1)


def test_where_masks_overlap_the_stronger_one_is_seen() -> None:
    both = {**detections(([10.0, 10, 60, 60], 1, 0.4), ([10.0, 10, 60, 60], 0, 0.9))}
    masks = torch.zeros(2, 240, 320, dtype=torch.bool)
    masks[:, 200:210, 200:210] = True
    drawn = draw_detections(GRAY, {**both, "masks": masks}, CLASSES)
    strongest = draw_detections(GRAY, {**{k: v[1:] for k, v in both.items()}, "masks": masks[1:]}, CLASSES)
    assert torch.equal(drawn[:, 200:210, 200:210], strongest[:, 200:210, 200:210])


corner = st.integers(-50, 400)
boxes = st.lists(st.tuples(corner, corner, st.integers(1, 300), st.integers(1, 300)), max_size=CROWD)


@settings(max_examples=200, deadline=None)
@given(boxes=boxes, width=st.integers(1, 150), height=st.integers(10, 30))
def test_labels_lie_inside_and_apart(boxes: list[tuple[int, int, int, int]], width: int, height: int) -> None:
    corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    note = Rectangle(0, 220, 90, 239)
    placed = place_labels(corners, [(width, height)] * len(corners), (320, 240), [note])
    shown = [one for one in placed if one is not None]
    pixels = torch.zeros(240, 320, dtype=torch.int64)
    for left, top, right, bottom in [note, *shown]:
        assert left >= 0
        assert top >= 0
        assert right < 320
        assert bottom < 240
        pixels[top : bottom + 1, left : right + 1] += 1
    assert pixels.max() <= 1
    if corners:  # the strongest has its label, whatever the others do
        assert place_labels(corners, [(width, height)] * len(corners), (320, 240))[0] is not None
    # A label is left out for labels of stronger boxes alone: without the weaker ones the same are placed.
    assert place_labels(corners[:5], [(width, height)] * len(corners[:5]), (320, 240), [note]) == placed[:5]


@pytest.mark.parametrize(("count", "is_noted"), [(1, False), (8, False), (20, True), (CROWD + 10, True)])
def test_the_picture_says_that_labels_were_left_out(count: int, is_noted: bool) -> None:
    small = torch.zeros(3, 240, 320, dtype=torch.uint8)
    same = detections(*[([100.0, 60, 260, 190], 0, 0.9 - i / 100) for i in range(count)])
    drawn = draw_detections(small, same, CLASSES)
    note = drawn[:, 225:, :100]
    assert bool((note > 200).all(dim=0).any()) == is_noted  # white letters
    labels = drawn.clone()
    labels[:, 220:, :] = 0
    assert bool((labels > 200).all(dim=0).any()) == (count < CROWD)


def test_a_long_name_is_cut_and_its_score_stays() -> None:
    box = [100.0, 100.0, 200.0, 150.0]
    name = "a very long name of a class " * 20
    strong, weak = (draw_detections(GRAY, detections((box, 0, score)), [name]) for score in (0.91, 0.48))
    differs = (strong != weak).any(dim=0).any(dim=0).nonzero().flatten()
    assert 0 < len(differs) <= 20  # the two digits


@pytest.mark.parametrize(
    "name", ["", "\ud83d\udc80", "\udcff.jpg", "a\nb", "\x1b[31mred", "日本", "[/x] $a_b$ | :car:"]
)
def test_any_name_can_be_drawn(name: str) -> None:
    assert draw_detections(GRAY, detections(([9.0, 9, 99, 99], 0, 0.9)), [name]).shape == GRAY.shape


def test_boxes_far_outside_and_tiny_images_are_drawn() -> None:
    far = detections(*[([-1e30, -5.0, 1e30, 1e9], 0, 0.9), ([1e20, 1e20, 2e20, 2e20], 1, 0.8)])
    assert has_color(draw_detections(GRAY, far, CLASSES), 0)
    for height, width in itertools.product((1, 5, 30), repeat=2):
        tiny = torch.zeros(3, height, width, dtype=torch.uint8)
        assert draw_detections(tiny, detections(CAT), CLASSES).shape == tiny.shape
