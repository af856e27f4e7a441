"""Exported students: a graph of one input size, used like any other detector.

A file says all that is needed beside its graph, in its metadata under ``detdistill`` (and so does the .json
file beside it): :class:`ExportFacts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize

from detdistill.errors import UserError
from detdistill.models.base import (
    Batch,
    Candidates,
    Detections,
    Detector,
    HeadOutputs,
    Model,
    Pyramid,
    Segmenter,
    Target,
    ThirdPartyOutputs,
)
from detdistill.models.checkpoints.spec import (
    CategoryIds,
    ClassNames,
    first_fault,
    read_json,
    require_id_for_each,
    require_spec,
)
from detdistill.models.graph import Letterbox, suppress
from detdistill.recipe import Convention
from detdistill.recipe.sections import LONGEST_SIDE, MOST_DETECTIONS

METADATA_KEY = "detdistill"
WITHOUT_NMS = ("rtdetr_v2", "d_fine", None)  # families whose queries give each object once; or it is unknown
INPUTS = ("images", "sizes")
INSTALL = 'pip install "detdistill[export]"'


_Side = Annotated[int, Field(gt=0, le=LONGEST_SIDE)]
_Padding = Annotated[float, Field(ge=-1e6, le=1e6)]


class ExportFacts(BaseModel):
    """What an exported file says of itself.

    Attributes:
        format: of these facts.
        version: of the detdistill that wrote the file.
        classes: label i means ``classes[i]``.
        category_ids: by label, those of the data that it was trained on; None: they had none.
        size: (height, width) of the input.
        keep_ratio: images are resized to fit in, and lie in the upper left corner; else stretched, antialiased.
        padding: RGB, 0…255, of the rest of the input.
        spec: how detdistill builds the model again, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal[1] = 1
    version: str
    classes: ClassNames
    category_ids: CategoryIds | None = None
    size: tuple[_Side, _Side]
    keep_ratio: bool
    padding: tuple[_Padding, _Padding, _Padding]
    spec: dict[str, Any] | None

    @model_validator(mode="after")
    def _an_id_for_each_class(self) -> ExportFacts:
        require_id_for_each(self.classes, self.category_ids)
        return self


class DetectorFacts(ExportFacts):
    """Of a detector.

    Attributes:
        score_threshold: class scores up to it have become 0 in the graph.
        nms_threshold: of the suppression by class, which is not in the graph; None: none is needed.
        max_detections: of an image.
        drop_empty: boxes without an area inside the image are left out before it.
        needs_sizes: the graph also takes ``sizes``: (height, width) of what is image in its input.
        mask_convention: whose way ``masks``, a further output, are laid into the image; None: there are none.
    """

    task: Literal["detection"] = "detection"
    score_threshold: float = Field(ge=0, le=1)
    nms_threshold: float | None = Field(ge=0, le=1)
    max_detections: int = Field(gt=0, le=MOST_DETECTIONS)
    drop_empty: bool
    needs_sizes: bool = False
    mask_convention: Convention | None = None


class SegmenterFacts(ExportFacts):
    """Of a segmenter."""

    task: Literal["segmentation"] = "segmentation"


Graph = Callable[..., Sequence[Tensor]]
"""(N, 3, H, W) float32 RGB, 0…255, and perhaps (N, 2) float32 sizes, to the outputs of its task."""


_Interface = dict[str, tuple[str, tuple[int | None, ...]]]
"""Name, type and shape of the inputs or outputs of a graph; None is any size."""


def _expected_inputs(facts: DetectorFacts | SegmenterFacts) -> _Interface:
    inputs: _Interface = {"images": ("float", (None, 3, *facts.size))}
    if isinstance(facts, DetectorFacts) and facts.needs_sizes:
        inputs["sizes"] = ("float", (None, 2))
    return inputs


def _expected_outputs(facts: DetectorFacts | SegmenterFacts) -> _Interface:
    if isinstance(facts, SegmenterFacts):
        return {"labels": ("uint8", (None, *facts.size))}
    outputs: _Interface = {
        "boxes": ("float", (None, None, 4)),
        "scores": ("float", (None, None)),
        "labels": ("int64", (None, None)),
        "masks": ("float", (None, None, None, None)),
    }
    return {name: outputs[name] for name in output_names(facts)}


def output_names(facts: DetectorFacts | SegmenterFacts) -> list[str]:
    """Of the graph's outputs, in their order."""
    if isinstance(facts, SegmenterFacts):
        return ["labels"]
    return ["boxes", "scores", "labels", *["masks"] * (facts.mask_convention is not None)]


class _Exported(Model):
    """A model whose graph something else runs, on the CPU; it cannot learn.

    Args:
        facts: what the file says of itself.
        graph: runs it.
        any_batch: whether it takes any number of images; else one.
    """

    incomparable = True
    can_learn = False

    def __init__(self, facts: ExportFacts, graph: Graph, *, any_batch: bool) -> None:
        super().__init__()
        self.any_batch = any_batch
        self.classes = facts.classes
        self.category_ids = facts.category_ids
        self._spec = facts.spec
        self.pyramid_channels = {}
        # 255 · x - padding, filled with 0: adding the padding afterwards gives each channel its own.
        self.padding = facts.padding
        self.preprocessor = Letterbox(
            size=facts.size,
            mean=tuple(value / 255 for value in facts.padding),  # type: ignore[arg-type]
            std=(1 / 255,) * 3,
            keep_ratio=facts.keep_ratio,
        )
        self._graph = (graph,)  # in a tuple: a graph that is a module would become a part of this one
        self.eval()

    @property
    def spec(self) -> dict[str, Any] | None:
        return self._spec

    def preprocess(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, scale_factor: float = 1.0
    ) -> Batch:
        """RGB 0…255 in the graph's size."""
        batch = super().preprocess(images, targets, scale_factor)
        batch.images_N3HW += batch.images_N3HW.new_tensor(self.padding)[:, None, None]
        return batch

    def forward_features(self, batch: Batch) -> Pyramid:
        """None: the graph keeps its maps to itself."""
        return {}

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """The graph's outputs for a batch; inputs have a row for each image.

        Raises:
            UserError: a label is not of a class, or a number is NaN.
        """
        (graph,) = self._graph
        parts = [inputs] if self.any_batch else zip(*(x.split(1) for x in inputs), strict=True)
        runs = [graph(*part) for part in parts]
        outputs = [torch.cat(part) for part in zip(*runs, strict=True)]
        if any(part.is_floating_point() and part.isnan().any() for part in outputs):
            raise UserError("an exported graph gives NaN: its weights are damaged, export the model again")
        labels = outputs[-1] if isinstance(self, Segmenter) else outputs[2]
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise UserError(
                f"an exported graph gives the label {int(labels.max())}, and its metadata name "
                f"{len(self.classes)} classes: export the model again"
            )
        return outputs

    def losses(self, head_outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        raise UserError("an exported model cannot learn: train the run or weights file that it came from")


class ExportedDetector(_Exported, Detector):
    """A detector in a file."""

    def __init__(self, facts: DetectorFacts, graph: Graph, *, any_batch: bool) -> None:
        super().__init__(facts, graph, any_batch=any_batch)
        self.facts = facts
        self.needs_masks = facts.mask_convention is not None

    def forward_head(self, pyramid: Pyramid, batch: Batch) -> ThirdPartyOutputs:
        inputs = [batch.images_N3HW.cpu()]
        if self.facts.needs_sizes:
            inputs.append(torch.tensor(batch.sizes, dtype=torch.float32))
        return ThirdPartyOutputs(Candidates(*self.run(*inputs)))

    def decode(self, head_outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(head_outputs, ThirdPartyOutputs)
        facts = self.facts
        return suppress(
            head_outputs.output,
            batch,
            nms_threshold=facts.nms_threshold,
            max_detections=facts.max_detections,
            drop_empty=facts.drop_empty,
            mask_convention=facts.mask_convention,
        )


class ExportedSegmenter(_Exported, Segmenter):
    """A segmenter in a file. Its label maps are enlarged to the images' size, not its logits."""

    def __init__(self, facts: SegmenterFacts, graph: Graph, *, any_batch: bool) -> None:
        super().__init__(facts, graph, any_batch=any_batch)
        self.facts = facts

    def forward_head(self, pyramid: Pyramid, batch: Batch) -> ThirdPartyOutputs:
        (labels_NHW,) = self.run(batch.images_N3HW.cpu())
        return ThirdPartyOutputs(labels_NHW)

    def decode(self, head_outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(head_outputs, ThirdPartyOutputs)
        maps = []
        for labels_HW, (height, width), size in zip(
            head_outputs.output, batch.sizes, batch.original_sizes, strict=True
        ):
            image_HW = labels_HW[None, :height, :width]
            maps.append({"semantic": resize(image_HW, list(size), InterpolationMode.NEAREST_EXACT)[0].long()})
        return maps


def exported_model(
    facts: DetectorFacts | SegmenterFacts, graph: Graph, *, any_batch: bool
) -> ExportedDetector | ExportedSegmenter:
    """The model of a graph, by its task."""
    if isinstance(facts, SegmenterFacts):
        return ExportedSegmenter(facts, graph, any_batch=any_batch)
    return ExportedDetector(facts, graph, any_batch=any_batch)


def load_onnx(path: str | Path, threads: int = 0) -> ExportedDetector | ExportedSegmenter:
    """The model of an ONNX file that ``detdistill export`` wrote, run by onnxruntime.

    Nothing in the file is executed but its graph of operators.

    Args:
        path: the file.
        threads: of onnxruntime; 0 lets it choose.

    Raises:
        UserError: no such file, no graph in it, not from detdistill, or onnxruntime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    onnxruntime = import_for_export("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base but this
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path}: cannot be read as an ONNX file ({reason}); export it again") from None
    stored = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if stored is None:
        raise UserError(f"{path}: does not say what model it is: give a file of `detdistill export`")
    facts = parse_facts(stored, path)
    _require_interface(session, facts, path)

    def run(*inputs: Tensor) -> list[Tensor]:
        named = {name: x.numpy() for name, x in zip(INPUTS, inputs, strict=False)}
        try:
            return [torch.from_numpy(part) for part in session.run(output_names(facts), named)]
        except Exception as error:  # as above
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{path}: its graph fails ({reason}); export it again") from None

    return exported_model(facts, run, any_batch=not isinstance(session.get_inputs()[0].shape[0], int))


def parse_facts(text: str, path: Path) -> DetectorFacts | SegmenterFacts:
    """What a file says of itself.

    Args:
        text: JSON.
        path: the file, for messages.

    Raises:
        UserError: it is no JSON, or says something that cannot be.
    """
    tree = read_json(text, str(path))
    is_segmenter = isinstance(tree, dict) and tree.get("task") == SegmenterFacts.model_fields["task"].default
    kind: type[DetectorFacts | SegmenterFacts] = SegmenterFacts if is_segmenter else DetectorFacts
    fault = None
    try:
        facts = kind.model_validate(tree)
    except ValidationError as error:
        fault = first_fault(error)
    else:
        spec = None if facts.spec is None else require_spec(facts.spec, str(path))
        family = None if spec is None else spec.model.family
        if isinstance(facts, DetectorFacts) and facts.nms_threshold is None and facts.mask_convention is None:
            fault = f"nms_threshold: is null, and {family} needs one" if family not in WITHOUT_NMS else None
    if fault is not None:
        raise UserError(
            f"{path}: what it says of its model cannot be used ({fault}); "
            "export it again with this version of detdistill"
        )
    return facts


def _require_interface(session: Any, facts: DetectorFacts | SegmenterFacts, path: Path) -> None:
    """Compare what the metadata say with the graph's inputs and outputs.

    Raises:
        UserError: they disagree in names, types or sizes.
    """
    for what, expected, found in (
        ("input", _expected_inputs(facts), session.get_inputs()),
        ("output", _expected_outputs(facts), session.get_outputs()),
    ):
        by_name = {node.name: node for node in found}
        if by_name.keys() != expected.keys():
            raise UserError(
                f"{path}: its graph has the {what}s {', '.join(by_name)}, its metadata say "
                f"{', '.join(expected)}; export it again"
            )
        for name, (kind, shape) in expected.items():
            node = by_name[name]
            sides = list(zip(node.shape, shape, strict=False))
            if (
                node.type != f"tensor({kind})"
                or len(node.shape) != len(shape)
                or any(isinstance(side, int) and wanted not in (None, side) for side, wanted in sides)
            ):
                raise UserError(
                    f"{path}: the {what} {name} of its graph is {node.type} {node.shape}, its metadata say "
                    f"tensor({kind}) {['any' if side is None else side for side in shape]}; export it again"
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
