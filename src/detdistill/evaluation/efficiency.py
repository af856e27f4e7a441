"""What detectors cost: parameters, FLOPs, file size, latency, throughput and memory (the paper's Table 6)."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from detdistill.models.base import Detections, Model, eval_mode

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Efficiency:
    """Cost of detecting, preprocessing and suppression included.

    Attributes:
        parameters: learnable numbers; None of an exported file, whose graph keeps them to itself.
        macs: multiply-accumulate operations on one image, of the convolutions, matrix products and attention:
            what papers on detection call FLOPs. Elementwise work, normalization and NMS are not counted. None
            of an exported file.
        checkpoint_bytes: all parameters and buffers, as a safetensors file holds them (without its header);
            None of an exported file.
        latency: seconds for one image, by percentile (50, 90, 99) of the timed runs.
        images_per_second: in batches of ``batch_size``, from the median.
        peak_memory_bytes: weights, and what detecting a batch needs beside them. CUDA: of tensors; Linux CPU:
            of the process's resident memory; None elsewhere.
        size: (height, width) of the image given.
        batch_size: of the throughput and the memory.
        device: where it was measured, on a CPU with the number of threads.
    """

    parameters: int | None
    macs: int | None
    checkpoint_bytes: int | None
    latency: dict[int, float]
    images_per_second: float
    peak_memory_bytes: int | None
    size: tuple[int, int]
    batch_size: int
    device: str

    @property
    def flops(self) -> int | None:
        """A multiplication and an addition for each of ``macs``."""
        return None if self.macs is None else 2 * self.macs


def efficiency(
    models: Mapping[str, Model],
    size: tuple[int, int] = (800, 1088),
    *,
    runs: int = 20,
    warmup: int = 3,
    batch_size: int = 1,
) -> dict[str, Efficiency]:
    """Measure detectors on images of noise, on the devices and with the threads that they have now.

    The detectors take turns, so that a machine whose speed drifts treats them alike. The work of NMS depends on
    how many boxes pass the score threshold, so that speed on photographs differs a little.

    Args:
        models: by name.
        size: (height, width) of an image before the model's own ``preprocess``; with the usual
            (short, long) = (800, 1333), (800, 1088) goes in as it is.
        runs: timed runs of each model and batch size.
        warmup: runs before them that are not timed.
        batch_size: of the throughput; latency is always that of one image.
    """
    noise = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    noise = (noise * 255).to(torch.uint8)
    images = {name: noise.to(_device(model)) for name, model in models.items()}
    macs, peaks = {}, {}
    latency: dict[str, list[float]] = {name: [] for name in models}
    whole: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        with eval_mode(model), torch.inference_mode():
            with FlopCounterMode(display=False) as counter:
                _detect(model, [images[name]])
            macs[name] = counter.get_total_flops() // 2
            peaks[name] = _peak_memory(model, [images[name]] * batch_size)
    for i in range(warmup + max(1, runs)):
        for name, model in models.items():
            with eval_mode(model), torch.inference_mode():
                one = _timed(model, [images[name]])
                several = _timed(model, [images[name]] * batch_size) if batch_size > 1 else one
            if i >= warmup:
                latency[name].append(one)
                whole[name].append(several)
    return {
        name: Efficiency(
            parameters=sum(p.numel() for p in model.parameters()) or None,
            macs=macs[name] or None,
            checkpoint_bytes=sum(value.nbytes for value in model.state_dict().values()) or None,
            latency={p: float(np.percentile(latency[name], p)) for p in PERCENTILES},
            images_per_second=batch_size / float(np.median(whole[name])),
            peak_memory_bytes=peaks[name],
            size=size,
            batch_size=batch_size,
            device=_describe(_device(model)),
        )
        for name, model in models.items()
    }


def _detect(model: Model, images: Sequence[Tensor]) -> list[Detections]:
    batch = model.preprocess(images)
    return model.decode(model.forward_head(model.forward_features(batch), batch), batch)


def _timed(model: Model, images: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    _detect(model, images)
    if images[0].is_cuda:
        torch.cuda.synchronize(images[0].device)
    return time.perf_counter() - start


def _peak_memory(model: Model, images: Sequence[Tensor]) -> int | None:
    """Bytes of the weights and of what detecting needs beside them."""
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    _detect(model, images)  # what is allocated once and kept is not told twice
    if images[0].is_cuda:
        device = images[0].device
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _detect(model, images)
        return weights + torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, or its reuse would go unseen
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        _detect(model, images)
        return weights + max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError, TypeError):  # no Linux, or another C library
        return None


def _resident(field: str) -> int:
    """Bytes, of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status")


def _device(model: Model) -> torch.device:
    return next(model.parameters(), torch.empty(0)).device


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else str(device)
