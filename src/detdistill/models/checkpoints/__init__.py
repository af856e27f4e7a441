"""Files of weights: ours, torchvision's, Hugging Face's and MMDetection's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detdistill.models.checkpoints.io import load_model, save_model

__all__ = ["load_model", "save_model"]


def __getattr__(name: str) -> Any:  # io.py builds models, and what builds them imports this package
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detdistill.models.checkpoints import io

    return getattr(io, name)
