"""evaluate_detector with a detector that knows the answers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detdistill.data.masks import encode_mask
from detdistill.errors import UserError
from detdistill.evaluation.detector import evaluate_detector


def is_one(value: float) -> bool:
    return value == pytest.approx(1)  # precision is 1 - 2e-16 at best


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (16, 1)])
def test_perfect_detector_has_ap_1(batch_size, workers, oracle):
    model, split = oracle(10)
    calls = []
    evaluation = evaluate_detector(
        model, split, batch_size=batch_size, workers=workers, progress=lambda *done: calls.append(done)
    )
    assert is_one(evaluation.coco.AP)
    assert calls[-1] == (10, 10)
    assert len(evaluation.detections) == 10
    for record, found in zip(split.records, evaluation.detections, strict=True):
        torch.testing.assert_close(found["boxes"], torch.from_numpy(record.boxes_K4))
        assert not found["boxes"].is_inference()
    assert evaluation.images_per_second == pytest.approx(10 / evaluation.seconds)


def test_wrong_boxes_lower_ap(oracle):
    model, split = oracle(10)
    for answer in model.answers.values():
        answer["boxes"] = answer["boxes"] + torch.tensor([30.0, 0, 30, 0])
    assert evaluate_detector(model, split).coco.AP < 0.7


@pytest.mark.parametrize("fail", [False, True])
def test_each_module_gets_its_mode_back(fail, oracle):
    model, split = oracle(3)
    model.train()
    model.norm.eval()  # frozen, as a user may have it
    if fail:
        model.answers.clear()
        with pytest.raises(KeyError):
            evaluate_detector(model, split)
    else:
        evaluate_detector(model, split)
    assert model.training
    assert model.pool.training
    assert not model.norm.training
    assert torch.equal(model.norm.running_mean, torch.zeros(3))
    assert model.norm.num_batches_tracked == 0


def test_limit_is_spread_over_the_split(oracle):
    model, split = oracle(10)
    evaluation = evaluate_detector(model, split, limit=4)
    assert [record.image_id for record in evaluation.split.records] == [0, 2, 5, 7]
    assert len(evaluation.detections) == 4
    assert len(evaluate_detector(model, split, limit=99).detections) == 10


def test_classes_are_matched_by_name(oracle):
    model, split = oracle(10)
    order = [1, 0, 2]  # the model's label of each class of the split
    model.classes = ("box", "ball", "cone", "tree")
    for answer in model.answers.values():
        answer["labels"] = torch.tensor(order)[answer["labels"]]
    stray = {
        "boxes": torch.tensor([[0.0, 0, 9, 9]]),
        "labels": torch.tensor([3]),
        "scores": torch.tensor([1.0]),
    }
    model.answers[0] = {name: torch.cat([value, stray[name]]) for name, value in model.answers[0].items()}
    assert is_one(evaluate_detector(model, split).coco.AP)

    model.classes = ("box", "tree", "rock", "bush")
    with pytest.warns(UserWarning, match="does not know ball, cone"):
        result = evaluate_detector(model, split).coco
    assert result.per_class["ball"] == 0
    model.classes = ("tree", "rock", "bush", "fern")
    with pytest.raises(UserError, match="no class in common"):
        evaluate_detector(model, split)


def with_rectangles(model, split):
    """The detector and the split with each box filled, as its mask."""
    model.needs_masks = True
    records = []
    for record, answer in zip(split.records, model.answers.values(), strict=True):
        masks = np.zeros((len(record.labels_K), record.height, record.width), dtype=bool)
        for mask, (x1, y1, x2, y2) in zip(masks, record.boxes_K4.astype(int), strict=True):
            mask[y1:y2, x1:x2] = True
        answer["masks"] = torch.from_numpy(masks[:, None]).float()
        records.append(replace(record, masks=tuple(encode_mask(mask) for mask in masks)))
    return model, replace(split, records=records)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_masks_are_measured_beside_the_boxes(batch_size, oracle):
    model, split = with_rectangles(*oracle(6))
    evaluation = evaluate_detector(model, split, batch_size=batch_size)
    assert is_one(evaluation.coco.AP)
    assert is_one(evaluation.coco_masks.AP)
    assert [len(masks) for masks in evaluation.masks] == [len(record.labels_K) for record in split.records]
    numbers = evaluation.numbers()
    assert len(numbers) == 24
    assert is_one(numbers["mask_AP75"])
    assert all("masks" not in found for found in evaluation.detections)
    for answer in model.answers.values():
        assert "masks" in answer  # what the model gave is not touched
        answer["masks"] = answer["masks"] * 0.4
    assert evaluate_detector(model, split).numbers()["mask_AP"] == 0
    assert is_one(evaluate_detector(model, split).coco.AP)


def test_masks_are_matched_by_class_names_too(oracle):
    model, split = with_rectangles(*oracle(6))
    model.classes = ("box", "tree", "rock")
    for answer in model.answers.values():
        answer["labels"] = torch.tensor([1, 0, 2])[answer["labels"]]  # ball becomes tree, box stays box
    with pytest.warns(UserWarning, match="does not know"):
        evaluation = evaluate_detector(model, split)
    assert is_one(evaluation.coco_masks.per_class["box"])
    assert evaluation.coco_masks.per_class["ball"] == 0
    for found, masks in zip(evaluation.detections, evaluation.masks, strict=True):
        assert len(found["labels"]) == len(masks)


def test_without_masks_on_both_sides_there_are_none(oracle):
    model, split = oracle(3)
    masked_model, masked_split = with_rectangles(*oracle(3))
    for one, data in ((model, masked_split), (masked_model, split)):
        evaluation = evaluate_detector(one, data)
        assert evaluation.masks is evaluation.coco_masks is None
        assert len(evaluation.numbers()) == 12


def test_bf16_runs_under_autocast(oracle):
    model, split = oracle(3)
    seen = []
    model.pool.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    evaluate_detector(model, split, precision="bf16")
    assert seen == [torch.bfloat16]


def test_errors(oracle, make_split):
    model, split = oracle(1)
    with pytest.raises(UserError, match="no images"):
        evaluate_detector(model, make_split([]))
    with pytest.raises(UserError, match="limit is 0"):
        evaluate_detector(model, split, limit=0)


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 5])
def test_ranks_share_the_images_and_agree(images, oracle, tmp_path):
    script = Path(__file__).with_name("one_rank.py")
    commands = [[sys.executable, str(script), str(rank), "2", str(images), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(120) for process in processes] == [0, 0]
    alone = evaluate_detector(*oracle(images), batch_size=2)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result["AP"] == pytest.approx(alone.coco.AP, nan_ok=True)
        assert len(result["detections"]) == images
        for one, other in zip(result["detections"], alone.detections, strict=True):
            torch.testing.assert_close(one, other)
