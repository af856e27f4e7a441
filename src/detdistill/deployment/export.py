"""Write a trained model as a graph for devices, and hold it against PyTorch before it is called good."""

from __future__ import annotations

import importlib.metadata
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from detdistill.data.formats.digits import write_digits
from detdistill.data.images import find_images, read_image
from detdistill.errors import UserError
from detdistill.evaluation.evaluate import as_model
from detdistill.models.base import Detections, Model, Preprocess
from detdistill.models.checkpoints.weights import STUDENT_FILE
from detdistill.models.exported import (
    INPUTS,
    METADATA_KEY,
    DetectorFacts,
    ExportedDetector,
    ExportedSegmenter,
    SegmenterFacts,
    exported_model,
    import_for_export,
    load_onnx,
    output_names,
)
from detdistill.models.families.faster_rcnn import FasterRCNN
from detdistill.models.graph import DetectionGraph, SegmentationGraph, graph_of, letterbox_of
from detdistill.output import output_file, output_path
from detdistill.recipe.sections import LONGEST_SIDE

ONNX, PROGRAM = ".onnx", ".pt2"
OPSET = 19  # the first with deformable convolution
CHECK_IMAGES = 16
PIXELS, SCORE = 0.1, 1e-3  # how far a detection may be off to count as equal
EQUAL = 0.99  # share of equal detections from which the file is good


@dataclass(frozen=True)
class Agreement:
    """How an exported file's detections compare with PyTorch's, on the same images and the same input size.

    Attributes:
        images, detections: how many were compared; detections are PyTorch's.
        equal: share of detections, of either side, that the other has too: same label, box and score within
            PIXELS and SCORE; 1 where neither finds anything.
        box_difference: largest difference, in pixels of the images, of a coordinate of equal detections.
        score_difference: theirs.
        mask_overlap: mean IoU of their masks, of a detector with masks; else None.
    """

    images: int
    detections: int
    equal: float
    box_difference: float
    score_difference: float
    mask_overlap: float | None = None

    @property
    def good(self) -> bool:
        return self.equal >= EQUAL and (self.mask_overlap is None or self.mask_overlap >= EQUAL)

    def __str__(self) -> str:
        if self.detections == 0:
            return f"no detections in {self.images} images, so nothing is shown: give --check IMAGES"
        return (
            f"{self.equal:.1%} of {self.detections} detections in {self.images} images are equal; "
            f"largest difference {self.box_difference:.2g} pixels, {self.score_difference:.2g} in score"
            + ("" if self.mask_overlap is None else f"; masks overlap by {self.mask_overlap:.2%}")
        )


@dataclass(frozen=True)
class PixelAgreement:
    """How an exported file's label maps compare with PyTorch's, at the same input size.

    Attributes:
        images, pixels: how many were compared; pixels are of the network input.
        equal: share of pixels of one class in both.
        classes: how many classes PyTorch gave to any pixel.
    """

    images: int
    pixels: int
    equal: float
    classes: int

    @property
    def good(self) -> bool:
        return self.equal >= EQUAL

    def __str__(self) -> str:
        return (
            f"{self.equal:.2%} of {self.pixels} pixels in {self.images} images are equal, of {self.classes} "
            f"class{'es' * (self.classes != 1)}"
        )


@dataclass(frozen=True)
class Export:
    """A written file.

    Attributes:
        path: the file; ``facts`` are also beside it, as .json.
        bytes: its size.
        parameters: of the model.
        facts: what the file says of itself.
        agreement: with PyTorch.
    """

    path: Path
    bytes: int
    parameters: int
    facts: DetectorFacts | SegmenterFacts
    agreement: Agreement | PixelAgreement


def export(
    model: Model | str | Path,
    out: str | Path | None = None,
    *,
    size: tuple[int, int] | None = None,
    dynamic_batch: bool = False,
    check: str | Path | None = None,
) -> Export:
    """Write a model as a file that needs nothing beside it, after comparing it with PyTorch.

    Args:
        model: a detector or segmenter, a run folder, or a file that detdistill saved. It is moved to the CPU.
        out: the file to write, ``.onnx`` or, for a program of torch.export, ``.pt2``; ``student.onnx`` in the
            run folder, or the weights' name with ``.onnx``, if not given.
        size: (height, width) of the input; the model's own where it has one.
        dynamic_batch: let the graph take any number of images; else one.
        check: a folder of images to compare on (the first 16); default: synthetic digits and noise.

    Raises:
        UserError: a wrapped model, no or a wrong size, a file that cannot be written,
            packages that are not installed, or the file's detections are not PyTorch's; no file is left then.
    """
    path = _target(model, out)
    if path.suffix == ONNX:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            import_for_export(package)
    model = as_model(model).cpu().eval()
    graph = graph_of(model)
    if dynamic_batch and not graph.any_batch:
        raise UserError(
            "two-stage detectors and DETRs are exported for one image at a time: leave out --dynamic-batch"
        )
    size = _input_size(model.preprocessor, size)
    facts = _facts(graph, size)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write = _write_onnx if path.suffix == ONNX else _write_program
        exported = write(_traced(graph, size, dynamic_batch), facts, dynamic_batch, temporary)
        images = _check_images(check, size)
        agreement = compare(model, exported, images)
        if check is not None:
            _warn_of_scales(model.preprocessor, size, images)
        if not agreement.good:
            raise UserError(
                f"{path}: not written: only {agreement.equal:.1%} of what it finds is PyTorch's; "
                f"please report it with the versions that `detdistill --version` prints"
            )
        temporary.replace(path)
        path.with_suffix(".json").write_text(facts.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    finally:
        temporary.unlink(missing_ok=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Export(path, path.stat().st_size, parameters, facts, agreement)


def _target(model: Model | str | Path, out: str | Path | None) -> Path:
    if out is not None:
        path = output_path(out)
    elif isinstance(model, Model):
        raise UserError("say where to write the file: out='student.onnx'")
    else:
        path = (Path(model) / STUDENT_FILE if Path(model).is_dir() else Path(model)).with_suffix(ONNX)
    if path.suffix not in (ONNX, PROGRAM):
        raise UserError(f"{path}: give a name that ends in .onnx, or in .pt2 for a program of torch.export")
    return output_file(path)


def _input_size(preprocess: Preprocess, size: tuple[int, int] | None) -> tuple[int, int]:
    divisor = preprocess.divisor
    if size is None:
        if preprocess.size is None:
            raise UserError("this model takes images of any size: give one height and width (--size 320 320)")
        short, long = (-(-side // divisor) * divisor for side in preprocess.size)
        return short, long
    if any(not 1 <= side <= LONGEST_SIDE or side % divisor for side in size):
        raise UserError(
            f"size {size[0]} {size[1]}: height and width must be multiples of {divisor}, at most {LONGEST_SIDE}"
        )
    return size


def _warn_of_scales(preprocess: Preprocess, size: tuple[int, int], images: Sequence[Tensor]) -> None:
    """Warn where the fixed input shows images at another scale than PyTorch does without the file."""
    if preprocess.size is None or not preprocess.keep_ratio:
        return
    canvas, factors = letterbox_of(preprocess, size), []
    for image in images:
        height, width = image.shape[-2:]
        factors.append(canvas.scale(height, width) / preprocess.scale(height, width))
    other = [factor for factor in factors if not 0.95 < factor < 1.05]
    if other:
        worst = min(other, key=lambda factor: min(factor, 1 / factor))
        warnings.warn(
            f"{len(other)} of {len(images)} images are seen at another scale than in PyTorch, by a factor of "
            f"up to {worst:.2f}, as a landscape input shrinks upright images: compare `detdistill evaluate` of "
            f"both files, and try --size {max(size)} {max(size)}",
            stacklevel=2,
        )


def _facts(graph: DetectionGraph | SegmentationGraph, size: tuple[int, int]) -> DetectorFacts | SegmenterFacts:
    convention = graph.model.preprocessor
    red, green, blue = (
        255 * (convention.fill * std + mean) for mean, std in zip(convention.mean, convention.std, strict=True)
    )
    shared: dict[str, Any] = {
        "version": importlib.metadata.version("detdistill"),
        "classes": graph.model.classes,
        "category_ids": graph.model.category_ids,
        "size": size,
        "keep_ratio": convention.keep_ratio,
        "padding": (red, green, blue),
        "spec": graph.model.spec,
    }
    if isinstance(graph, SegmentationGraph):
        return SegmenterFacts(**shared)
    model = graph.model
    with_masks = isinstance(model, FasterRCNN) and model.mask_branch is not None
    return DetectorFacts(
        **shared,
        score_threshold=model.score_threshold,
        nms_threshold=None if with_masks else model.nms_threshold,  # then it has been done in the graph
        max_detections=model.max_detections,
        drop_empty=model.drop_empty,
        needs_sizes=graph.needs_sizes,
        mask_convention=model.convention if with_masks else None,
    )


def _traced(
    graph: DetectionGraph | SegmentationGraph, size: tuple[int, int], dynamic_batch: bool
) -> ExportedProgram:
    example = [torch.rand(2 if dynamic_batch else 1, 3, *size) * 255]
    if graph.needs_sizes:
        example.append(torch.tensor([size], dtype=torch.float32))
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, on its own internals
        traced = torch.export.export(graph, tuple(example), dynamic_shapes=shapes)
    # Assertions within a model (those of transformers) and what only they need: ONNX knows no such operators.
    for node in reversed(traced.graph.nodes):
        if str(node.target).startswith("aten._assert"):
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    return traced


def _write_onnx(
    traced: ExportedProgram, facts: DetectorFacts | SegmenterFacts, dynamic_batch: bool, path: Path
) -> ExportedDetector | ExportedSegmenter:
    takes_sizes = isinstance(facts, DetectorFacts) and facts.needs_sizes
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            traced, input_names=list(INPUTS[: 1 + takes_sizes]), output_names=output_names(facts),
            opset_version=OPSET, dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    # The exporter notes for each node from which line of which file it came: paths of this machine.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.model.metadata_props[METADATA_KEY] = facts.model_dump_json()
    program.save(str(path))
    return load_onnx(path)


def _write_program(
    traced: ExportedProgram, facts: DetectorFacts | SegmenterFacts, dynamic_batch: bool, path: Path
) -> ExportedDetector | ExportedSegmenter:
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # as for ONNX
    torch.export.save(traced, path, extra_files={METADATA_KEY: facts.model_dump_json()})
    return exported_model(facts, torch.export.load(path).module(), any_batch=dynamic_batch)


# --- the check -------------------------------------------------------------------------------------------


def compare(
    model: Model, exported: ExportedDetector | ExportedSegmenter, images: Sequence[Tensor]
) -> Agreement | PixelAgreement:
    """What the exported file and the model's own five steps find, at the exported size.

    Args:
        model: what was exported, on the CPU, in evaluation mode.
        exported: the file.
        images: (3, H, W) each, of any size.
    """
    with torch.inference_mode(), _at_size(model, exported.facts.size):
        if isinstance(exported, ExportedSegmenter):
            return compare_pixels(model, exported, images)
        return _compare_detections(model, exported, images)


def _compare_detections(model: Model, exported: ExportedDetector, images: Sequence[Tensor]) -> Agreement:
    found = total = detections = 0
    boxes, scores, overlaps = [0.0], [0.0], []
    for image in images:
        (ours,), (theirs,) = exported([image]), model([image])
        pairs, equal = _equal(theirs, ours)
        found += equal
        total += len(theirs["scores"]) + len(ours["scores"])
        detections += len(theirs["scores"])
        for i, j in pairs:
            boxes.append(float((theirs["boxes"][i] - ours["boxes"][j]).abs().max()))
            scores.append(float((theirs["scores"][i] - ours["scores"][j]).abs()))
            if "masks" in theirs:
                overlaps.append(_overlap(theirs["masks"][i], ours["masks"][j]))
    return Agreement(
        len(images), detections, found / total if total else 1.0, max(boxes), max(scores),
        statistics.mean(overlaps) if overlaps else None,
    )  # fmt: skip


def _overlap(first: Tensor, second: Tensor) -> float:
    """IoU of two masks of probabilities; 1 where both are empty."""
    first, second = first > 0.5, second > 0.5
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def compare_pixels(model: Model, exported: ExportedSegmenter, images: Sequence[Tensor]) -> PixelAgreement:
    """At the size of the input: how maps are enlarged afterwards is not the file's matter.

    Args:
        model: a segmenter that gives its input the same size.
        exported: the file.
        images: (3, H, W) each, of any size.
    """
    equal = pixels = 0
    classes: set[int] = set()
    for image in images:
        batch = exported.preprocess([image])
        outputs = exported.forward_head({}, batch)
        ours = outputs.output[0, : batch.sizes[0][0], : batch.sizes[0][1]]
        batch = model.preprocess([image])
        batch.original_sizes = batch.sizes
        (theirs,) = model.decode(model.forward_head(model.forward_features(batch), batch), batch)
        equal += int((ours == theirs["semantic"]).sum())
        pixels += ours.numel()
        classes.update(theirs["semantic"].unique().tolist())
    return PixelAgreement(len(images), pixels, equal / pixels, len(classes))


@contextmanager
def _at_size(model: Model, size: tuple[int, int]) -> Iterator[None]:
    own = model.preprocessor
    model.preprocessor = letterbox_of(own, size)
    try:
        yield
    finally:
        model.preprocessor = own


def _equal(first: Detections, second: Detections) -> tuple[list[tuple[int, int]], int]:
    """(place in the first, nearest in the second) of equal detections; and how many, of both, have an equal."""
    box_KL = (first["boxes"][:, None] - second["boxes"]).abs().amax(dim=2)
    score_KL = (first["scores"][:, None] - second["scores"]).abs()
    equal_KL = (box_KL <= PIXELS) & (score_KL <= SCORE) & (first["labels"][:, None] == second["labels"])
    if not equal_KL.any():
        return [], 0
    # Of several that are near enough, the nearest: the next anchor's box is no difference.
    apart_KL = torch.where(equal_KL, box_KL / PIXELS + score_KL / SCORE, float("inf"))
    nearest_K = apart_KL.argmin(dim=1).tolist()
    has_K = equal_KL.any(dim=1)
    pairs = [(i, nearest_K[i]) for i in has_K.nonzero().flatten().tolist()]
    return pairs, int(has_K.sum()) + int(equal_KL.any(dim=0).sum())


def _check_images(folder: str | Path | None, size: tuple[int, int]) -> list[Tensor]:
    if folder is not None:
        return [read_image(path) for path in find_images(Path(folder))[:CHECK_IMAGES]]
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator)
        for shape in (size, (size[0], size[1] // 2), (size[0] // 2 + 1, size[1]))
    ]
    with tempfile.TemporaryDirectory() as name:
        write_digits(Path(name), 1, 5, max(64, min(size)))
        drawn = [read_image(path) for path in find_images(Path(name))]
    return noise + drawn
