"""Images without labels in a pair: the methods that need none teach from them, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods import METHODS
from detdistill.errors import UserError

from .pairs import DETECTION, batch, make_pair

LABEL_FREE = ("ima", "mimic", "at", "pkd", "cwd", "fkd", "skd", "cofd", "dist", "kd", "frs", "gid")
TEACHABLE = [
    (m, f) for m in LABEL_FREE for f in ("fcos", "gfl", "faster_rcnn") if (m, f) != ("gid", "faster_rcnn")
]


def still(pair):
    """The pair, learning, with BatchNorm that neither moves nor depends on the batch."""
    pair.train()
    for module in pair.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return pair


def same_draws(pair, *args, **kwargs):
    pair.at_step(0, 100)
    torch.manual_seed(0)
    return pair(*args, **kwargs)


@pytest.mark.parametrize(("method", "family"), [pair for pair in TEACHABLE if pair[1] != "faster_rcnn"])
def test_methods_that_declare_no_labels_do_not_look_at_them(method, family):
    pair = still(make_pair([method], family))
    images, targets = batch()
    others = [{"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]), "labels": torch.tensor([2])} for _ in images]
    values = [same_draws(pair, images, given)[method].item() for given in (targets, others)]
    assert values[0] == values[1] != 0


@pytest.mark.parametrize(("method", "family"), TEACHABLE)
def test_a_term_is_the_mean_over_all_images_and_the_task_sees_the_labeled_alone(method, family):
    pair = still(make_pair([method], family))
    images, targets = batch()
    more, _ = batch(n=1, seed=7)
    alone, both = same_draws(pair, images, targets), same_draws(pair, images, targets, unlabeled=more)
    assert {name: value.item() for name, value in alone.items() if name != method} == {
        name: value.item() for name, value in both.items() if name != method
    }
    if family != "faster_rcnn":  # whose proposals are not sampled without labels
        pair.at_step(0, 100)
        only = pair(more, [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}])[method]
        rtol = 1e-3 if method == "cofd" else 1e-5  # its margin moves with every batch
        torch.testing.assert_close(both[method], (2 * alone[method] + only) / 3, rtol=rtol, atol=0)
    assert both[method].isfinite()
    assert both[method].item() != alone[method].item()
    both[method].backward()
    assert all(p.grad.isfinite().all() for p in pair.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", [name for name in DETECTION if METHODS[name].needs_labels])
def test_methods_that_need_labels_do_not_see_images_without(method):
    family = "gfl" if method == "ld" else "fcos"
    pair = still(make_pair([method, "mimic"], family))
    values = [same_draws(pair, *batch(), unlabeled=more) for more in ([], batch(seed=7)[0])]
    assert values[0][method].item() == values[1][method].item()
    assert values[0]["mimic"].item() != values[1]["mimic"].item()
    assert pair.without_labels() == ["mimic"]
    with pytest.raises(UserError, match=r"needs labels, and data\.unlabeled has none: use"):
        make_pair([method], family).without_labels()


def test_neither_head_runs_for_images_whose_features_alone_teach():
    pair = make_pair(["ima"]).train()
    seen = []
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        original = model.forward_head
        model.forward_head = lambda pyramid, batch, name=name, original=original: (
            seen.append((name, len(batch.sizes))) or original(pyramid, batch)
        )
    pair(*batch(n=2), unlabeled=batch(n=3)[0])
    assert seen == [("student", 2)]
