"""evaluate_detector with a detector that knows the answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detdistill.config import UserError
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
