"""Detectors in ONNX files: an exported student, used like any other detector through onnxruntime.

The file says all that is needed beside its graph, in its metadata under ``detdistill`` (and so does the .json
file beside it): :class:`OnnxFacts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from detdistill.config import UserError
from detdistill.models.base import Batch, Detections, Detector, ForeignRaw, Pyramid, Raw, Target
from detdistill.models.graph import Candidates, Letterbox, suppress

METADATA_KEY = "detdistill"
INPUT = "images"
OUTPUTS = ("boxes", "scores", "labels")
INSTALL = 'pip install "detdistill[export]"'


class OnnxFacts(BaseModel):
    """What an exported file says of itself.

    Attributes:
        format: of these facts.
        version: of the detdistill that wrote the file.
        classes: label i means ``classes[i]``.
        size: (height, width) of the input.
        keep_ratio: images are resized to fit in, and lie in the upper left corner; else stretched, antialiased.
        padding: RGB, 0…255, of the rest of the input.
        score_threshold: class scores up to it have become 0 in the graph.
        nms_threshold, max_detections: of the suppression by class, which is not in the graph.
        drop_empty: boxes without an area inside the image are left out before it.
        spec: how detdistill builds the model again, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    version: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    keep_ratio: bool
    padding: tuple[float, float, float]
    score_threshold: float
    nms_threshold: float
    max_detections: int
    drop_empty: bool
    spec: dict[str, Any] | None


class OnnxDetector(Detector):
    """A detector whose graph onnxruntime runs, on the CPU; it cannot learn.

    Args:
        path: a file that ``detdistill export`` wrote. Nothing in it is executed but its graph of operators.
        threads: of onnxruntime; 0 lets it choose.

    Raises:
        UserError: no such file, no graph in it, not from detdistill, or onnxruntime is not installed.
    """

    opaque = True
    can_learn = False

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        onnxruntime = import_for_export("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions have no common base but this
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{path}: cannot be read as an ONNX file ({reason}); export it again") from None
        stored = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if stored is None:
            raise UserError(f"{path}: does not say what detector it is: give a file of `detdistill export`")
        try:
            self.facts = OnnxFacts.model_validate_json(stored)
        except ValidationError as error:
            fault = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(
                f"{path}: written by another version of detdistill ({fault}); export it again"
            ) from None
        self.classes = self.facts.classes
        self.spec = self.facts.spec
        self.pyramid_channels = {}
        # 255 · x - padding, filled with 0: adding the padding afterwards gives each channel its own.
        self.preprocessor = Letterbox(
            size=self.facts.size,
            mean=tuple(value / 255 for value in self.facts.padding),  # type: ignore[arg-type]
            std=(1 / 255,) * 3,
            keep_ratio=self.facts.keep_ratio,
        )
        self.any_batch = not isinstance(self.session.get_inputs()[0].shape[0], int)
        self.eval()

    def preprocess(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, zoom: float = 1.0
    ) -> Batch:
        """RGB 0…255 in the graph's size."""
        batch = super().preprocess(images, targets, zoom)
        batch.images_N3HW += batch.images_N3HW.new_tensor(self.facts.padding)[:, None, None]
        return batch

    def pyramid(self, batch: Batch) -> Pyramid:
        """None: the graph keeps its maps to itself."""
        return {}

    def predict(self, pyramid: Pyramid, batch: Batch) -> ForeignRaw:
        images = batch.images_N3HW.cpu().numpy()
        runs = [images] if self.any_batch else np.split(images, len(images))
        answers = [self.session.run(OUTPUTS, {INPUT: part}) for part in runs]
        parts = (torch.from_numpy(np.concatenate(part)) for part in zip(*answers, strict=True))
        return ForeignRaw(Candidates(*parts))

    def losses(self, raw: Raw, batch: Batch) -> dict[str, Tensor]:
        raise UserError("an exported detector cannot learn: train the run or weights file that it came from")

    def decode(self, raw: Raw, batch: Batch) -> list[Detections]:
        assert isinstance(raw, ForeignRaw)
        facts = self.facts
        return suppress(
            raw.output,
            batch,
            nms_threshold=facts.nms_threshold,
            max_detections=facts.max_detections,
            drop_empty=facts.drop_empty,
        )


def import_for_export(name: str) -> Any:
    """A package of the extra ``export``.

    Raises:
        UserError: it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"ONNX files need {name}, which is not installed: {INSTALL}") from None
