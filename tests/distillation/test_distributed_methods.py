"""Several processes learn from a teacher what one process learns from the same images."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..models.test_distributed_losses import assert_two_are_one

WORKER = """
import sys
import torch
from torch import distributed, nn
from detdistill import Pair
from detdistill.recipe import model_config
from detdistill.models import build_model

# Divided by what there are of something: of one process's images there are more than of the other's.
PAIRS = {
    "fcos": [
        "kd", "frs", "fgfi", "defeat", "scalekd", "maskd", {"gid": {"relation_weight": 0.0}},
        {"crosskd": {"align_scale": False}}, {"ima": {"instance": "box", "mask": {"ratio": 0.0}}},
    ],
    "gfl": ["ld", {"crosskd": {"align_scale": False}}],
    "faster_rcnn": [
        "kd", "frs", "fgfi", {"defeat": {"preset": "head"}},
        {"defeat": {"preset": "head", "regions": "teacher"}},
    ],
    "pspnet": ["kd", "ifvd", "ima"],
}
world, rank, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
if world > 1:
    distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)


def detector(family, channels, seed):
    torch.manual_seed(seed)
    options = {} if family == "pspnet" else {"strides": (8, 16, 32), "head_depth": 2}
    config = model_config(family=family, backbone="resnet10t", channels=channels, norm="frozen", **options)
    model = build_model(config, ("a", "b"))
    if family == "faster_rcnn":
        for sampler in (model.roi_sampler, model.rpn_sampler):  # nothing is drawn: all are taken
            sampler.batch_size_per_image = 10**6
        layers = [model.rpn.objectness, model.roi_head.cls]
    else:
        layers = [model.head.cls]
    for layer in layers:  # scores that say something
        nn.init.normal_(layer.weight, std=0.3)
        nn.init.zeros_(layer.bias)
    return model


generator = torch.Generator().manual_seed(0)
images = [torch.rand(3, 64, 64, generator=generator) * brightness for brightness in (1, 0.1)]
boxes = [torch.tensor([[4.0, 4, 60, 60], [20, 20, 40, 44], [2, 30, 20, 50]]), torch.tensor([[30.0, 8, 60, 34]])]
targets = [{"boxes": b, "labels": torch.zeros(len(b), dtype=torch.int64)} for b in boxes]
for i, target in enumerate(targets):
    target["semantic"] = torch.full((64, 64), 255)
    target["semantic"][: 40 * i + 17, : 20 + 9 * i] = i
mine = [i for i in range(2) if i % world == rank]
gradients = {}
for family, methods in PAIRS.items():
    for method in methods:
        pair = Pair(detector(family, 16, seed=0), detector(family, 24, seed=1), [method])
        pair.train()
        if family == "pspnet":
            pair.student.eval().training = True  # its BatchNorms see other images in each process
        pair.at_step(50, 100)
        losses = pair([images[i] for i in mine], [targets[i] for i in mine])
        (name,) = pair.methods
        losses[name].backward()
        for parameter_name, parameter in pair.named_parameters():
            if parameter.grad is None:
                continue
            if world > 1:  # what DistributedDataParallel does
                distributed.all_reduce(parameter.grad)
                parameter.grad /= world
        first = pair.student.backbone.body.conv1[0].weight.grad
        # Not the biases: behind them stands a standardization, which leaves rounding alone.
        parts = [p.grad.flatten() for p in pair.methods.parameters() if p.ndim > 1 and p.grad is not None]
        gradients[f"{family}, {method}"] = first
        if any(part.any() for part in parts):
            gradients[f"{family}, {method}, parts"] = torch.cat(parts)
if rank == 0:
    torch.save(gradients, out)
if world > 1:
    distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    assert_two_are_one(WORKER, tmp_path)
