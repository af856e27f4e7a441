"""What distillation adds to a training step: time and peak memory, as ratios to the floor.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --student resnet50 --teacher resnet101 --size 800 1088 --channels 256

The floor is the student's step plus the teacher's backbone and neck: no feature method can cost less. The
variants take turns in one process, so that a machine whose speed drifts treats them alike; memory is that of a
fresh process for each (CUDA: peak allocated by tensors; CPU: peak resident size of the process). "ima, auto"
measures its gradients in every step here; in training it does so in one step of 50, and the last line says what
that adds on average.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from detdistill.distillation.method import Method, StepOutputs
from detdistill.distillation.pair import Pair
from detdistill.distillation.weighting import AUTO_EVERY
from detdistill.models import build_model
from detdistill.recipe import ModelConfig, model_config

METHODS = {"floor": None, "ima": "ima", "ima, auto": {"ima": {"weight": "auto"}}, "mimic": "mimic"}
VARIANTS = ("baseline", *METHODS)


class Floor(Method):
    """Asks for the teacher's pyramid and does nothing with it."""

    def forward(self, step_outputs: StepOutputs) -> Tensor:
        return next(iter(step_outputs.student.values())).new_zeros(())


def make_pair(variant: str, args: argparse.Namespace, device: torch.device) -> Pair:
    def detector(backbone: str, channels: int) -> ModelConfig:
        return model_config(
            family=args.family, backbone=backbone, channels=channels, strides=tuple(args.strides or ()) or None
        )

    torch.manual_seed(0)
    classes = [str(i) for i in range(args.classes)]
    student = build_model(detector(args.student, args.channels), classes)
    if variant == "baseline":
        return Pair(student).to(device).train()
    teacher = build_model(detector(args.teacher, args.teacher_channels or args.channels), classes)
    return Pair(student, teacher, [METHODS[variant] or Floor()]).to(device).train()


def make_batch(args: argparse.Namespace, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    height, width = args.size
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, height, width, generator=generator).to(device) for _ in range(args.batch)]
    corners = torch.rand(args.batch, 8, 2, 2, generator=generator).sort(dim=2).values
    scale = torch.tensor([width, height])
    boxes = [(pair * scale).flatten(1) + torch.tensor([0, 0, 4, 4]) for pair in corners]
    labels = torch.randint(args.classes, (args.batch, 8), generator=generator)
    targets = [{"boxes": b.to(device), "labels": k.to(device)} for b, k in zip(boxes, labels, strict=True)]
    return images, targets


def step(pair: Pair, optimizer: torch.optim.Optimizer, batch: tuple, bf16: bool) -> None:
    device = batch[0][0].device
    pair.at_step(0, 1000)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = torch.stack(list(pair(*batch).values())).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="retinanet")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--teacher-channels", type=int)
    parser.add_argument("--strides", type=int, nargs="*")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only-memory", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = make_batch(args, device)

    if args.only_memory:
        pair = make_pair(args.only_memory, args, device)
        step(pair, torch.optim.SGD(pair.parameters(), lr=1e-4), batch, args.bf16)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resident()
        print(peak / 2**20)
        return

    pairs = {variant: make_pair(variant, args, device) for variant in VARIANTS}
    optimizers = {name: torch.optim.SGD(pair.parameters(), lr=1e-4) for name, pair in pairs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(args.rounds + 1):
        for name in VARIANTS:
            start = time.perf_counter()
            step(pairs[name], optimizers[name], batch, args.bf16)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    memory = {
        name: float(subprocess.check_output([sys.executable, *sys.argv, "--only-memory", name]).split()[-1])
        for name in VARIANTS
    }
    height, width = args.size
    print(f"{args.family}, student {args.student}, teacher {args.teacher}, {args.channels} channels")
    print(f"batch {args.batch} of {height}×{width}, {device.type}, {torch.get_num_threads()} threads\n")
    print("| step | median s | to the floor, round by round | peak MiB | to the floor |")
    print("|---|---|---|---|---|")
    for name in VARIANTS:
        ratios = [a / b for a, b in zip(seconds[name], seconds["floor"], strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(
            f"| {name} | {statistics.median(seconds[name]):.3f} | {middle:.3f} ({low:.3f}–{high:.3f}) "
            f"| {memory[name]:.0f} | {memory[name] / memory['floor']:.3f} |"
        )
    extra = [(a - b) / b for a, b in zip(seconds["ima, auto"], seconds["ima"], strict=True)]
    print(f"\n`weight: auto` adds {statistics.median(extra) / AUTO_EVERY:.2%} to an average step")


def resident() -> int:
    """Peak resident size in KiB (Linux; unlike getrusage it does not count the parent's before exec)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
