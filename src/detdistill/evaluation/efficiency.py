"""What a detector costs: parameters, FLOPs, file size, images per second and memory."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from detdistill.evaluation.detector import eval_mode
from detdistill.models.base import Detections, Detector


@dataclass(frozen=True)
class Efficiency:
    """Cost of detecting on one image.

    Attributes:
        parameters: learnable numbers.
        macs: multiply-accumulate operations of the convolutions, matrix products and attention: what papers on
            detection call FLOPs. Elementwise work, normalisation and NMS are not counted.
        flops: 2 · macs, a multiplication and an addition.
        checkpoint_bytes: all parameters and buffers, as a safetensors file holds them (without its header).
        images_per_second: from the median of the runs, one image at a time, preprocessing and NMS included.
        peak_memory_bytes: allocated on CUDA while detecting, weights included; None elsewhere.
        size: (height, width) of the image given.
        device: where it was measured.
    """

    parameters: int
    macs: int
    flops: int
    checkpoint_bytes: int
    images_per_second: float
    peak_memory_bytes: int | None
    size: tuple[int, int]
    device: str


def efficiency(model: Detector, size: tuple[int, int] = (800, 1088), runs: int = 10) -> Efficiency:
    """Measure a detector on an image of noise, on the device and with the threads that it has now.

    The work of NMS depends on how many boxes pass the score threshold, so that speed on photographs differs.

    Args:
        size: (height, width) of the image before the model's own ``preprocess``; with the usual
            (short, long) = (800, 1333), (800, 1088) goes in as it is.
        runs: timed runs, after two that are not.
    """
    device = next(model.parameters(), torch.empty(0)).device
    noise = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    image = (noise * 255).to(torch.uint8).to(device)
    cuda = device.type == "cuda"
    with eval_mode(model), torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            _detect(model, image)
        _detect(model, image)
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        seconds = [_timed(model, image, cuda) for _ in range(max(1, runs))]
        peak = torch.cuda.max_memory_allocated(device) if cuda else None
    flops = counter.get_total_flops()
    return Efficiency(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=flops // 2,
        flops=flops,
        checkpoint_bytes=sum(value.nbytes for value in model.state_dict().values()),
        images_per_second=1 / statistics.median(seconds),
        peak_memory_bytes=peak,
        size=size,
        device=torch.cuda.get_device_name(device) if cuda else str(device),
    )


def _detect(model: Detector, image_3HW: Tensor) -> list[Detections]:
    batch = model.preprocess([image_3HW])
    return model.decode(model.predict(model.pyramid(batch), batch), batch)


def _timed(model: Detector, image_3HW: Tensor, cuda: bool) -> float:
    start = time.perf_counter()
    _detect(model, image_3HW)
    if cuda:
        torch.cuda.synchronize(image_3HW.device)
    return time.perf_counter() - start
