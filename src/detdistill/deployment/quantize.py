"""An exported file with 8-bit weights and activations, for devices: smaller, and quicker where it counts."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from detdistill.data.images import find_images, read_image
from detdistill.deployment.export import ONNX, PixelAgreement, compare_pixels
from detdistill.errors import UserError
from detdistill.models.base import Detections
from detdistill.models.exported import (
    INPUTS,
    METADATA_KEY,
    ExportedDetector,
    ExportedSegmenter,
    import_for_export,
    load_onnx,
)
from detdistill.output import output_file, output_path

CALIBRATED, CHECKED = 128, 32
OPERATORS = ("Conv", "Gemm")  # nearly all weights; attention, decoding and suppression stay as they are
SCORE, OVERLAP = 0.3, 0.5


@dataclass(frozen=True)
class Likeness:
    """What two detectors find in the same images.

    Attributes:
        images: how many.
        detections: of the first with a score of SCORE or more.
        alike: share of the detections of SCORE or more, of either, that the other has too: the same label, at
            an IoU of OVERLAP or more, of whatever score; NaN where there are none.
    """

    images: int
    detections: int
    alike: float

    def __str__(self) -> str:
        if not self.detections:
            return f"nothing scores {SCORE} or more in {self.images} images, so nothing is shown"
        return (
            f"{self.alike:.1%} of what scores {SCORE} or more is found by both "
            f"({self.detections} detections in {self.images} images)"
        )


@dataclass(frozen=True)
class Quantized:
    """A written file.

    Attributes:
        path: the file; facts are also beside it, as .json.
        bytes, bytes_before: its size, and that of the file that it was made from.
        calibrated: images whose activations set the ranges.
        likeness: of what both files find.
    """

    path: Path
    bytes: int
    bytes_before: int
    calibrated: int
    likeness: Likeness | PixelAgreement


def quantize(file: str | Path, images: str | Path, out: str | Path | None = None) -> Quantized:
    """Write an exported ONNX file again with 8-bit convolutions and fully connected layers.

    Static quantization by onnxruntime, as pairs of QuantizeLinear and DequantizeLinear, which runtimes for
    devices know: weights by output channel, signed; activations unsigned, in the range that they take on the
    images.

    Args:
        file: an ONNX file of :func:`~detdistill.export`.
        images: an image or a folder of images like those that the model will see, up to 128 of which, evenly
            chosen, set the ranges.
        out: the file to write; ``student.int8.onnx`` for ``student.onnx`` if not given.

    Raises:
        UserError: no such file or images, the file is 8-bit already or cannot be written, or packages of the
            extra ``export`` are not installed.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file; give an ONNX file that `detdistill export` wrote")
    path = output_path(out) if out is not None else file.with_suffix(f".int8{ONNX}")
    if path.suffix != ONNX or path == file:
        raise UserError(f"{path}: give --out a name of its own that ends in {ONNX}")
    output_file(path)
    before = load_onnx(file)
    onnx = import_for_export("onnx")
    if any(node.op_type == "QuantizeLinear" for node in onnx.load(file, load_external_data=False).graph.node):
        raise UserError(f"{file}: is 8-bit already; give the file that `detdistill export` wrote")
    chosen = _spread(find_images(Path(images)), CALIBRATED)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{ONNX}")
    try:
        _write(file, temporary, before, chosen)
        after = load_onnx(temporary)
        checked = [read_image(image) for image in _spread(chosen, CHECKED)]
        with torch.inference_mode():
            likeness = _likeness(before, after, checked)
        temporary.replace(path)
        path.with_suffix(".json").write_text(before.facts.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    finally:
        temporary.unlink(missing_ok=True)
    return Quantized(path, path.stat().st_size, file.stat().st_size, len(chosen), likeness)


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """So many of them, evenly chosen."""
    count = min(count, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


def _write(file: Path, path: Path, model: ExportedDetector | ExportedSegmenter, images: Sequence[Path]) -> None:
    onnx = import_for_export("onnx")
    quantization = import_for_export("onnxruntime.quantization")
    shapes = import_for_export("onnxruntime.quantization.shape_inference")
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / file.name
        # With symbolic shape inference it would need sympy; the shapes are in the file already.
        shapes.quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        try:
            quantization.quantize_static(
                str(prepared), str(path), _Calibration(_inputs(model, images)), per_channel=True,
                quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=list(OPERATORS),
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
        except AssertionError as error:  # onnxruntime's, of a scale that is not finite
            raise UserError(
                f"{file}: cannot be quantized ({error}): its weights are not finite; export a "
                "model that `detdistill evaluate` finds good"
            ) from None
    written = onnx.load(path)
    notes = {entry.key: entry.value for entry in written.metadata_props}
    onnx.helper.set_model_props(written, {METADATA_KEY: notes[METADATA_KEY]})
    onnx.save(written, path)


def _inputs(model: ExportedDetector | ExportedSegmenter, images: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """What the graph is fed for each image."""
    for image in images:
        batch = model.preprocess([read_image(image)])
        inputs = [batch.images_N3HW]
        if isinstance(model, ExportedDetector) and model.facts.needs_sizes:
            inputs.append(torch.tensor(batch.sizes, dtype=torch.float32))
        yield {name: x.numpy() for name, x in zip(INPUTS, inputs, strict=False)}


class _Calibration:
    """onnxruntime's CalibrationDataReader over an iterator; it asks for this one method."""

    def __init__(self, inputs: Iterator[dict[str, Any]]) -> None:
        self.inputs = inputs

    def get_next(self) -> dict[str, Any] | None:
        return next(self.inputs, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice on the root logger, which is for those who call it by themselves."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _likeness(
    before: ExportedDetector | ExportedSegmenter,
    after: ExportedDetector | ExportedSegmenter,
    images: Sequence[Tensor],
) -> Likeness | PixelAgreement:
    if isinstance(after, ExportedSegmenter):
        return compare_pixels(before, after, images)
    strong = alike = detections = 0
    for image in images:
        (first,), (second,) = before([image]), after([image])
        detections += int((first["scores"] >= SCORE).sum())
        for ours, theirs in ((first, second), (second, first)):
            found_K = _found(ours, theirs)
            strong += len(found_K)
            alike += int(found_K.sum())
    return Likeness(len(images), detections, alike / strong if strong else float("nan"))


def _found(ours: Detections, theirs: Detections) -> Tensor:
    """Of each of our detections of SCORE or more: whether they have it too, (K,) bool."""
    strong_K = ours["scores"] >= SCORE
    iou_KL = box_iou(ours["boxes"][strong_K], theirs["boxes"])
    same_KL = ours["labels"][strong_K][:, None] == theirs["labels"]
    return ((iou_KL >= OVERLAP) & same_KL).any(dim=1)
