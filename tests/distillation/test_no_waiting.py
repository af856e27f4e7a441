"""On a device a step is queued without waiting for its results: no operation's shape or path depends on one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .pairs import DETECTION, SEGMENTATION, batch, gfl_pair, make_pair

WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "torchvision::nms",
}  # fmt: skip
BY_NATURE = {"gid"}  # suppresses boxes


class Waits(TorchDispatchMode):
    """Notes the operations for which the host would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masks = name.startswith(("aten::index", "aten::_index_put")) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if masks or name in WAITING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def waits(pair, family):
    pair.train().at_step(50, 100)
    images, targets = batch()
    if family == "pspnet":
        for target in targets:
            target["semantic"] = torch.arange(64 * 64).view(64, 64) // 1500
    with Waits() as mode:
        sum(pair(images, targets).values()).backward()
    return mode.found


def test_waiting_would_be_seen():
    with Waits() as mode:
        x = torch.arange(4.0)
        x[x > 2].sum().item()
    assert mode.found == ["aten::index", "aten::_local_scalar_dense"]


@pytest.mark.parametrize("family", ["fcos", "retinanet", "gfl", "reppoints", "pspnet"])
def test_a_student_never_waits(family):
    assert waits(make_pair(["mimic"], family), family) == []


@pytest.mark.parametrize("method", sorted({*DETECTION, *SEGMENTATION} - BY_NATURE))
def test_a_method_never_waits(method):
    family = "fcos" if method in DETECTION else "pspnet"
    pair = gfl_pair([method]) if method == "ld" else make_pair([method], family)
    assert waits(pair, family) == []


@pytest.mark.parametrize("method", ["ima", "kd"])
def test_a_method_of_segmenters_never_waits(method):
    assert waits(make_pair([method], "pspnet"), "pspnet") == []
