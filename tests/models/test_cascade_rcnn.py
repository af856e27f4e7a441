"""Cascade R-CNN against its steps in plain float64 numpy, and against Faster R-CNN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from detdistill.models import build_model, load_weights
from detdistill.models.families.cascade_rcnn import STAGES, CascadeRCNN
from detdistill.models.families.faster_rcnn import roi_losses
from detdistill.models.families.two_stage import build_parts
from detdistill.recipe.models import CascadeRCNNConfig

OBJECTS = torch.tensor([[8.0, 6.0, 44.0, 50.0], [50.0, 12.0, 88.0, 40.0]])


def small(family="cascade_rcnn", *, classes=3, **options):
    torch.manual_seed(0)
    model = build_model(
        family, classes, **{"backbone": "resnet18", "channels": 16, "score_threshold": 0.01, **options}
    )
    return spread(model)


def spread(model):
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone") and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def image(seed=0):
    return torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(seed))


def target(count=2):
    return {"boxes": OBJECTS[:count].clone(), "labels": torch.tensor([2, 0])[:count]}


def predicted(model, targets):
    model.training = True  # the detector itself; BatchNorm stays in evaluation mode
    batch = model.preprocess([image(i) for i in range(len(targets))], targets)
    return model.forward_head(model.forward_features(batch), batch), batch


def decoded(boxes, deltas, stds):
    """(R, 4) float64: Ren et al. 2015, Eq. 2, backwards."""
    boxes, deltas = (np.asarray(x, dtype=np.float64) for x in (boxes, deltas))
    side = boxes[:, 2:] - boxes[:, :2]
    center = boxes[:, :2] + side / 2 + deltas[:, :2] * stds[:2] * side
    side = side * np.exp(deltas[:, 2:] * stds[2:])
    return np.concatenate([center - side / 2, center + side / 2], axis=1)


def encoded(boxes, objects, stds):
    boxes, objects = (np.asarray(x, dtype=np.float64) for x in (boxes, objects))
    side, wanted = boxes[:, 2:] - boxes[:, :2], objects[:, 2:] - objects[:, :2]
    shift = (objects[:, :2] + wanted / 2 - boxes[:, :2] - side / 2) / side
    return np.concatenate([shift / stds[:2], np.log(wanted / side) / stds[2:]], axis=1)


def iou(a, b):
    sides = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]))
    return sides.prod() / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - sides.prod())


def clipped(boxes):
    boxes = boxes.copy()
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, 96)
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, 64)
    return boxes


def by_rows(boxes):
    """Sorted, so that an order that does not matter is not compared."""
    boxes = np.asarray(boxes, dtype=np.float64).round(3)
    return boxes[np.lexsort(boxes.T)]


def test_each_stage_learns_from_the_boxes_of_the_one_before_as_published():
    model = small(roi_samples=10**6)  # all proposals, so that sampling decides nothing
    outputs, _ = predicted(model, [target()])
    stages = [outputs, *outputs.later]
    assert len(stages) == len(STAGES)
    objects = OBJECTS.double().numpy()
    for before, here, old, new in zip(stages, stages[1:], STAGES, STAGES[1:], strict=False):
        boxes = before.proposals[0].double().numpy()
        refined = clipped(decoded(boxes, before.roi_deltas_RQ4[:, :4].detach(), np.array(old.box_stds)))
        is_object = (boxes[:, None] == objects).all(axis=2).any(axis=1)
        assert is_object.sum() == 2
        side = refined[:, 2:] - refined[:, :2]
        refined = np.concatenate([refined[~is_object & (side >= 1e-2).all(axis=1)], objects])
        np.testing.assert_allclose(by_rows(here.proposals[0]), by_rows(refined), atol=2e-3)
        # What it learns there.
        for box, label, wanted in zip(
            here.proposals[0].double().numpy(), here.roi_labels[0], here.roi_targets[0].numpy(), strict=True
        ):
            overlaps = [iou(box, one) for one in objects]
            best = int(np.argmax(overlaps))
            if abs(overlaps[best] - new.iou) < 1e-5:
                continue
            assert label == ((3, 1)[best] if overlaps[best] >= new.iou else 0)
            if label > 0:
                np.testing.assert_allclose(
                    wanted, encoded(box[None], objects[[best]], np.array(new.box_stds))[0], atol=1e-3
                )
    assert not any(stage.proposals[0].requires_grad for stage in stages)


def test_the_losses_of_later_stages_count_less():
    model = small()
    outputs, batch = predicted(model, [target(), target(0)])
    losses = model.losses(outputs, batch)
    assert list(losses) == [
        "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg",
        "loss_classifier_2", "loss_box_reg_2", "loss_classifier_3", "loss_box_reg_3",
    ]  # fmt: skip
    for suffix, stage, weight in zip(("", "_2", "_3"), [outputs, *outputs.later], (1, 0.5, 0.25), strict=True):
        for name, plain in roi_losses(stage).items():
            torch.testing.assert_close(losses[name + suffix], weight * plain)
    deltas = torch.cat([stage.roi_deltas_RQ4 for stage in outputs.later])
    assert torch.equal(deltas[:, :4], deltas[:, 8:12])  # one box for all classes


def test_detections_are_the_last_boxes_with_the_mean_of_scores():
    model = small(score_threshold=0.0, nms_threshold=1.0, max_detections=10**5).eval()
    batch = model.preprocess([image()])
    with torch.no_grad():
        outputs = model.forward_head(model.forward_features(batch), batch)
        (found,) = model.decode(outputs, batch)
    boxes = outputs.proposals[0].double().numpy()
    scores = 0
    for stage, settings in zip([outputs, *outputs.later], STAGES, strict=True):
        np.testing.assert_allclose(stage.proposals[0].numpy(), boxes, rtol=1e-4, atol=1e-3)
        logits = stage.roi_logits_RQ.double().numpy()
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = scores + exp / exp.sum(axis=1, keepdims=True) / 3
        boxes = clipped(decoded(boxes, stage.roi_deltas_RQ4[:, :4], np.array(settings.box_stds)))
    solid = ((boxes[:, 2:] - boxes[:, :2]) >= 0.011).all(axis=1)
    best = int(np.where(solid, scores[:, 1:].max(axis=1), -1).argmax())
    assert len(found["scores"]) >= 3 * solid.sum()
    assert found["scores"][0].item() == pytest.approx(scores[best, 1:].max(), rel=1e-4)
    assert found["labels"][0] == scores[best, 1:].argmax()
    np.testing.assert_allclose(found["boxes"][0].numpy(), boxes[best], rtol=1e-3, atol=1e-2)


def test_a_cascade_of_one_stage_is_a_faster_rcnn():
    """Of one whose class rows of the box layer are all alike."""
    config = CascadeRCNNConfig(backbone="resnet18", channels=16, score_threshold=0.01)
    cascade = spread(CascadeRCNN(build_parts(config, ("a", "b", "c")), STAGES[:1]))
    faster = small("faster_rcnn")
    state = cascade.state_dict()
    for name in ("roi_head.box.weight", "roi_head.box.bias"):
        state[name] = torch.cat([state[name]] * 4)
    faster.load_state_dict(state)
    results = []
    for model in (cascade, faster):
        torch.manual_seed(3)
        outputs, batch = predicted(model, [target(), target(1)])
        losses = model.losses(outputs, batch)
        with torch.no_grad():
            results.append((losses, model.eval()([image(), image(1)])))
    (losses, found), (expected_losses, expected) = results
    assert losses.keys() == expected_losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name])
    for one, other in zip(found, expected, strict=True):
        assert len(other["boxes"]) > 5
        for name, values in other.items():
            torch.testing.assert_close(one[name], values)


@pytest.mark.parametrize("objects", [(2, 0), (0, 0)])
def test_every_parameter_learns_and_nothing_is_nan_without_objects(objects):
    model = small().train()
    losses = model([image(), image(1)], [target(count) for count in objects])
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("build", ["cascade_rcnn", "cascade_mask_rcnn", "mask_rcnn"])
def test_without_any_proposal(build, monkeypatch):
    model = small(build)
    monkeypatch.setattr(model, "_propose", lambda rpn, batch: [torch.zeros(0, 4)] * len(batch.sizes))
    empty = {**target(0), "masks": torch.zeros(0, 64, 96)}
    losses = model.train()([image()], [empty])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    (found,) = model.eval()([image()])
    assert len(found["boxes"]) == 0


def test_boxes_that_left_the_image_do_not_disturb_training():
    model = small().train()
    nn.init.constant_(model.roi_head.box.bias, 60.0)  # every box is moved by three times its width
    losses = model([image()], [target()])
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_any_regions_are_judged_by_the_first_head():
    model = small()
    outputs, batch = predicted(model, [target()])
    logits, deltas = model.classify(model.forward_features(batch), outputs.proposals, batch)
    torch.testing.assert_close(logits, outputs.roi_logits_RQ)
    torch.testing.assert_close(deltas, outputs.roi_deltas_RQ4)
    assert deltas.shape == (len(outputs.proposals[0]), 4 * 4)


def test_class_rows_of_every_stage_are_chosen_by_name():
    full = small("cascade_mask_rcnn", classes=("a", "b", "c"))
    few = small("cascade_mask_rcnn", classes=("c", "a"))
    assert load_weights(few, full.state_dict(), classes=full.classes).complete
    layers = [f"{name}.cls" for name in ("roi_head", "later_heads.0", "later_heads.1")]
    layers += [f"mask_branch.heads.{stage}.mask" for stage in range(3)]
    for layer in layers:
        mine, theirs = (model.get_submodule(layer).weight for model in (few, full))
        assert torch.equal(mine, theirs[[0, 3, 1]])
    assert torch.equal(few.later_heads[1].box.weight, full.later_heads[1].box.weight)


@pytest.mark.parametrize(
    ("build", "published"), [("cascade_rcnn", 69.17e6), ("mask_rcnn", 44.18e6), ("cascade_mask_rcnn", 77.1e6)]
)
def test_parameter_counts_are_close_to_the_published_ones(build, published):
    """MMDetection's for ResNet-50, without the stages it freezes."""
    with torch.device("meta"):
        model = build_model(build, 80, norm="frozen", freeze_stages=2)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count == pytest.approx(published, rel=0.002)
