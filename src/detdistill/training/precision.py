"""Where a run computes, and in which numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


def resolve_device(wanted: Literal["auto", "cpu"]) -> torch.device:
    """What ``training.device`` means on this machine."""
    found = torch.accelerator.current_accelerator(check_available=True) if wanted == "auto" else None
    return found or torch.device("cpu")


def resolve_precision(wanted: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """What ``training.precision`` means on a device: ``auto`` is bf16 where that is quicker, else fp32."""
    if wanted != "auto":
        return wanted
    return "bf16" if computes_bf16(device) else "fp32"


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16; one without emulates it, ten times as slowly as fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # torch has no public word for it, and not every build has this one.
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return False
