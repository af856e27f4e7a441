"""Several processes learn what one process learns from the same images."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import sys
import torch
from torch import distributed
from detdistill.models import build_model

world, rank, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
if world > 1:
    distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world)
generator = torch.Generator().manual_seed(0)
images = [torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
boxes = [torch.tensor([[4.0, 4, 60, 60], [20, 20, 40, 44], [2, 30, 20, 50]]), torch.tensor([[30.0, 8, 60, 34]])]
targets = [{"boxes": b, "labels": torch.zeros(len(b), dtype=torch.int64)} for b in boxes]
for i, target in enumerate(targets):
    target["semantic"] = torch.full((64, 64), 255)
    target["semantic"][: 20 * i + 5] = i  # other numbers of labeled pixels
mine = [i for i in range(2) if i % world == rank]
gradients = {}
for family in ("fcos", "retinanet", "gfl", "reppoints", "pspnet"):
    torch.manual_seed(1)
    model = build_model(family, 2, backbone="resnet18", channels=16, norm="frozen").train()
    if family == "pspnet":
        model.eval().training = True  # its BatchNorms see other images in each process
    losses = model([images[i] for i in mine], [targets[i] for i in mine])
    sum(losses.values()).backward()
    other = model.head.aux_cls if family == "pspnet" else model.head.box
    layers = {"cls": model.head.cls.weight, "other": other.bias, "first": model.backbone.body.conv1.weight}
    for name, parameter in layers.items():
        gradient = parameter.grad
        if world > 1:  # what DistributedDataParallel does
            distributed.all_reduce(gradient)
            gradient /= world
        gradients[f"{family}, {name}"] = gradient
if rank == 0:
    torch.save(gradients, out)
if world > 1:
    distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    assert_two_are_one(WORKER, tmp_path)


def assert_two_are_one(worker: str, folder: Path) -> None:
    """Run a worker as one process, then as two: the gradients that it saves, by name, must be the same.

    Args:
        worker: a program that takes world size, rank, port, and the file that rank 0 writes.
        folder: to work in.
    """
    (folder / "worker.py").write_text(worker)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    outputs = []
    for world in (1, 2):
        out = folder / f"{world}.pt"
        processes = [
            subprocess.Popen(
                [sys.executable, str(folder / "worker.py"), str(world), str(rank), str(port), str(out)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        assert [process.wait(timeout=600) for process in processes] == [0] * world
        outputs.append(torch.load(out, weights_only=True))
    one, two = outputs
    assert one.keys() == two.keys()
    wrong = {}
    for name, gradient in one.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        try:
            torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-6 + 1e-5 * scale)
        except AssertionError as error:
            wrong[name] = str(error)
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())
