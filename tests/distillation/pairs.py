"""Small pairs of detectors on which every method is tried."""

from __future__ import annotations

import torch

from detdistill.distillation.methods import METHODS
from detdistill.distillation.pair import Pair
from detdistill.models import build_model
from detdistill.recipe import model_config
from detdistill.recipe.models import families

CLASSES = ("a", "b", "c")
STRIDES = (8, 16, 32)
DETECTION = [name for name, method in METHODS.items() if "detection" in method.tasks]
SEGMENTATION = [name for name, method in METHODS.items() if "segmentation" in method.tasks]


def with_head(name):
    """A recipe's entry for a method, with its term on predictions where that is not its default."""
    return {name: {"preset": "head"} if name == "defeat" else {}}


def detector(family="fcos", channels=16, seed=0, **options):
    torch.manual_seed(seed)
    if families()[family].task == "detection":
        options = {"head_depth": 2, "strides": STRIDES, **options}
    config = model_config(family=family, backbone="mobilenetv3_small_050", channels=channels, **options)
    model = build_model(config, CLASSES)
    if family == "reppoints":  # whose untrained points lie on one spot: no box would be large enough for gid
        model.head.points.bias.data = 2 * model.head.taps.flatten()
    return model


def gfl_detector(channels=16, seed=0, bins=17):
    """A GFL whose cells differ: from the head's own initial weights all distributions are nearly flat."""
    torch.manual_seed(seed)
    model = build_model(
        "gfl",
        CLASSES,
        backbone="mobilenetv3_small_050",
        channels=channels,
        strides=STRIDES,
        head_depth=2,
        bins=bins,
    )
    torch.nn.init.normal_(model.head.box.weight, std=0.3)
    return model


def gfl_pair(methods, **options):
    return Pair(gfl_detector(**options), gfl_detector(channels=24, seed=1), methods)


def make_pair(methods, student="fcos", teacher=None, **options):
    """A student of 16 channels and a teacher of 24, of one family unless said otherwise."""
    return Pair(
        detector(student, **options), detector(teacher or student, channels=24, seed=1, **options), methods
    )


def batch(n=2, size=64, seed=0, empty=False, constant=False):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, size, size, generator=generator) for _ in range(n)]
    if constant:
        images = [torch.full_like(image, 0.5) for image in images]
    box = torch.zeros(0, 4) if empty else torch.tensor([[5.0, 5.0, 40.0, 50.0], [20.0, 30.0, 60.0, 60.0]])
    targets = [{"boxes": box * size / 64, "labels": torch.arange(len(box))} for _ in range(n)]
    return images, targets


def take_steps(pair, steps=2, lr=0.05, weight_decay=0.0):
    pair.train()
    optimizer = torch.optim.SGD(pair.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    for step in range(steps):
        torch.manual_seed(step)
        losses = pair(*batch(seed=step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return losses


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
