"""Half precision: maps as large as trained teachers' must not leave its range on the way to a loss."""

from __future__ import annotations

import pytest
import torch

from .pairs import DETECTION, SEGMENTATION, batch, make_pair

SIZE = 60.0  # root mean square: the square of a value of 256 is more than float16 holds


def with_large_maps(model):
    pyramid = model.forward_features

    def large(inputs):
        maps = {stride: x.float() for stride, x in pyramid(inputs).items()}
        return {stride: (x * (SIZE / x.detach().square().mean().sqrt())).half() for stride, x in maps.items()}

    model.forward_features = model.forward_features_only = large


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *((name, "gfl" if name == "ld" else "fcos") for name in DETECTION),
        *((name, "pspnet") for name in SEGMENTATION),
    ],
)
def test_large_maps_in_float16(method, family):
    pair = make_pair([method], family).train()
    for model in (pair.student, pair.teacher):
        with_large_maps(model)
    images, targets = batch()
    for target in targets:
        target["semantic"] = torch.arange(64 * 64).view(64, 64) // 1500
    pair.at_step(50, 100)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = pair(images, targets)[method]
    loss.backward()
    assert loss.isfinite()
    for name, parameter in pair.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
