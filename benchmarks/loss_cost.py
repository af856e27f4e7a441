"""What each method's own computation costs, forward and backward, as a ratio to plain imitation (`mimic`).

    python benchmarks/loss_cost.py
    python benchmarks/loss_cost.py --only ima pkd fgd --batch 2
    python benchmarks/loss_cost.py --family pspnet --channels 512 --size 512 1024

The maps are those of a RetinaNet: 256 channels at strides 8 to 128 of an 800×1088 image; of a segmenter, its
last map, with 19 classes. Only the method runs: backbones and necks do not, head outputs are made before the
clock starts. Backward goes to the student's maps (or head outputs) and to the method's parts. All methods take
a turn in each round, so that a machine whose speed drifts treats them alike. Memory is the peak over what was
there before (CUDA: of tensors; CPU: of the process, Linux only).
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detdistill.distillation.alignment import Alignment
from detdistill.distillation.method import Method, StepOutputs
from detdistill.distillation.methods import METHODS
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models import build_model
from detdistill.models.base import Batch, DenseOutputs, Model, SegmentationOutputs, Target, TwoStageOutputs
from detdistill.models.families.one_stage import OneStage
from detdistill.recipe import model_config

CLASSES = {"detection": 80, "segmentation": 19}  # of COCO, of Cityscapes
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
BOXES = 7  # objects in an image, as in COCO


def make_model(seed: int, args: argparse.Namespace) -> Model:
    torch.manual_seed(seed)
    config = model_config(family=args.family, backbone="mobilenetv3_small_050", channels=args.channels)
    task = config.task
    return build_model(config, [str(label) for label in range(CLASSES[task])])


def make_targets(task: str, args: argparse.Namespace, generator: torch.Generator) -> list[Target]:
    height, width = args.size
    if task == "segmentation":
        shape = (args.batch, height, width)
        labels_NHW = torch.randint(CLASSES[task], shape, generator=generator)
        return [{"semantic": labels_HW} for labels_HW in labels_NHW]
    corners = (torch.rand(args.batch, BOXES, 2, 2, generator=generator)).sort(dim=2).values
    boxes = (corners * torch.tensor([width, height]) + torch.tensor([[0, 0], [8, 8]])).flatten(2)
    labels = torch.randint(CLASSES[task], (args.batch, BOXES), generator=generator)
    return [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]


def make_signals(student: Model, teacher: Model, args: argparse.Namespace, device: torch.device) -> StepOutputs:
    height, width = args.size
    generator = torch.Generator().manual_seed(0)
    targets = [
        {key: value.to(device) for key, value in target.items()}
        for target in make_targets(student.task, args, generator)
    ]
    images = [torch.zeros(3, height, width, device=device) for _ in range(args.batch)]
    batch = student.preprocess(images, targets)
    maps = [make_maps(student, batch, generator, device) for _ in range(2)]
    maps[0] = {stride: x.requires_grad_() for stride, x in maps[0].items()}
    with torch.no_grad():
        kept = isinstance(student, OneStage)
        student_outputs = (
            student.forward_head(maps[0], batch, tower_features=True)
            if kept
            else student.forward_head(maps[0], batch)
        )
        teacher_outputs = (
            teacher.forward_head(maps[1], batch, tower_features=True)
            if kept
            else teacher.forward_head(maps[1], batch)
        )
    for x in tensors_in(student_outputs):
        x.requires_grad_()
    return StepOutputs(
        student=maps[0],
        teacher=maps[1],
        student_batch=batch,
        teacher_batch=batch,
        alignment=Alignment(batch, batch),
        student_outputs=student_outputs,
        teacher_outputs=teacher_outputs,
        student_model=student,
        teacher_model=teacher,
        generator=torch.Generator(device).manual_seed(0),
    )


def make_maps(
    model: Model, batch: Batch, generator: torch.Generator, device: torch.device
) -> dict[int, Tensor]:
    height, width = batch.padded_size
    return {
        stride: torch.randn(
            len(batch.sizes), channels, -(-height // stride), -(-width // stride), generator=generator
        ).to(device)
        for stride, channels in model.pyramid_channels.items()
    }


def tensors_in(head_outputs: Any) -> list[Tensor]:
    """Every head output that can carry gradient."""
    if isinstance(head_outputs, Tensor):
        return [head_outputs] if head_outputs.is_floating_point() else []
    if isinstance(head_outputs, DenseOutputs | TwoStageOutputs | SegmentationOutputs):
        outputs = [
            getattr(head_outputs, field.name) for field in fields(head_outputs) if field.name != "proposals"
        ]
        return [x for value in outputs for x in tensors_in(value)]
    if isinstance(head_outputs, dict):
        head_outputs = head_outputs.values()
    return [x for value in head_outputs or () for x in tensors_in(value)]


def run(method: Method, step: StepOutputs) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    inputs = [*step.student.values(), *tensors_in(step.student_outputs), *method.parameters()]
    torch.autograd.grad(method(step), inputs, allow_unused=True)
    if next(iter(step.student.values())).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mib(method: Method, step: StepOutputs) -> float:
    """MiB that one forward and backward needs over what was there before."""
    if next(iter(step.student.values())).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(method, step)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    libc = ctypes.CDLL(None)
    libc.mallopt(
        M_MMAP_THRESHOLD, 2**16
    )  # what is freed goes back to the system, or the next method inherits it
    libc.malloc_trim(0)
    status = Path("/proc/self/status")
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run(method, step)
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="retinanet")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1088), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="only these methods (and mimic)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # What is freed is kept, as it is after some steps of a training run: else new pages are what is timed.
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, 2**30)
    student, teacher = (make_model(seed, args).to(device).train() for seed in (0, 1))
    methods: dict[str, Method] = {}
    for name in METHODS:
        if args.only and name not in {*args.only, "mimic"}:
            continue
        try:
            pair = Pair(student, teacher, [name]).to(device).train()
        except UserError as error:
            print(f"{name}: {error}\n")
            continue
        methods[name] = pair.methods[name]  # type: ignore[assignment]
    step = make_signals(student, teacher, args, device)

    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(args.rounds + 1):
        for name, method in methods.items():
            value = run(method, step)
            if turn:  # the first round warms up
                seconds[name].append(value)
    memory = {name: peak_mib(method, step) for name, method in methods.items()}

    height, width = args.size
    print(
        f"{args.family}, {args.channels} channels, batch {args.batch} of {height}×{width}, {device.type}, "
        f"{torch.get_num_threads()} threads, {args.rounds} rounds\n"
    )
    print("| method | median ms | to mimic, round by round | peak MiB | to mimic |")
    print("|---|---|---|---|---|")
    for name in sorted(methods, key=lambda name: statistics.median(seconds[name])):
        ratios = [a / b for a, b in zip(seconds[name], seconds["mimic"], strict=True)]
        print(
            f"| {name} | {1000 * statistics.median(seconds[name]):.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f}) | {memory[name]:.0f} "
            f"| {memory[name] / memory['mimic']:.2f} |"
        )


if __name__ == "__main__":
    main()
