"""Weights: reading files, and loading them into a detector with a report.

No pickle is ever executed: files that are not safetensors are read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from detdistill.errors import UserError
from detdistill.models.base import Model
from detdistill.models.checkpoints import transformers as transformers_weights
from detdistill.models.checkpoints.spec import Spec, parse_spec, require_spec
from detdistill.models.layers.backbones import Backbone

STUDENT_FILE = "student.safetensors"
PARTS = ("backbone", "neck", "head")

State = dict[str, Tensor]


@dataclass
class LoadReport:
    """What became of a file's entries; ``str()`` is a short table.

    Attributes:
        source: the file, or what the weights are called.
        matched, missing, unexpected: entry names in the model's naming.
        wrong_shape: ``name: file (shape), model (shape)``, or their types where these do not fit.
        absent_classes: classes of the model that the file does not know; their rows stay as initialized.
    """

    source: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    absent_classes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the model is now exactly what the file describes."""
        return not (self.missing or self.unexpected or self.wrong_shape or self.absent_classes)

    def faults(self, require: Sequence[str] = PARTS) -> list[str]:
        """Entries of the required parts that did not load or that the model has no place for."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("wrong shape", self.wrong_shape))
        return [f"{kind} {name}" for kind, names in kinds for name in names if part_of(name) in require]

    def check(self, require: Sequence[str] = PARTS) -> None:
        """Refuse weights that would leave a required part untrained.

        Raises:
            UserError: one line with the first faults.
        """
        if not self.matched:
            raise UserError(
                f"{self.source}: no entry fits the model (the file has {some(self.unexpected)}): "
                f"is it of another family, backbone or layout?"
            )
        faults = self.faults(require)
        if faults:
            raise UserError(
                f"{self.source}: {len(faults)} entries do not fit the model: {some(faults)}; "
                f"give the family, backbone and sizes that the file was trained with"
            )

    def __str__(self) -> str:
        rows = [
            ("matched", len(self.matched), []),
            ("missing", len(self.missing), self.missing),
            ("unexpected", len(self.unexpected), self.unexpected),
            ("wrong shape", len(self.wrong_shape), self.wrong_shape),
            ("classes without rows", len(self.absent_classes), self.absent_classes),
        ]
        lines = [
            f"{name:<20} {count:>5}  {some(names) if names else ''}".rstrip() for name, count, names in rows
        ]
        return "\n".join([f"weights from {self.source}", *lines])


def part_of(name: str) -> str:
    """``backbone``, ``neck`` or ``head`` (the region proposal network, RoI heads and mask heads are heads)."""
    first = name.partition(".")[0]
    return "head" if first in ("rpn", "roi_head", "later_heads", "mask_branch") else first


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


# --- loading ---------------------------------------------------------------------------------------------


def load_weights(
    model: Model,
    state: Mapping[str, Tensor],
    *,
    require: Sequence[str] = PARTS,
    classes: Sequence[str] | None = None,
    source: str = "weights",
) -> LoadReport:
    """Load what fits, in this project's naming.

    BatchNorm and frozen BatchNorm interchange; step counters of BatchNorm may be absent.

    Args:
        model: is changed only if nothing is refused.
        state: tensors by name.
        require: of backbone, neck and head, the parts that must load whole; ``()`` allows anything but nothing.
        classes: the class names behind the state's class rows; rows are then chosen by name, and a class that
            has none keeps its initial row. Not given: rows are taken as they are.
        source: how messages call the weights.

    Raises:
        UserError: a required part did not load whole, nothing fits, or a weight is not finite; with ``head``
            required also where a class has no row.
    """
    own = model.state_dict()
    state = dict(state)
    absent = _select_class_rows(state, own, classes, model.classes) if classes is not None else []
    report = _compare(own, state, source)
    report.absent_classes = absent
    report.check(require)
    if absent and "head" in require:
        raise UserError(
            f"{source}: has no class {some(absent)}; "
            f"leave these classes out, or train a teacher that knows them"
        )
    require_finite({name: state[name] for name in report.matched}, source)
    model.load_state_dict({name: state[name] for name in report.matched}, strict=False)
    return report


def require_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are infinite or no numbers.

    Raises:
        UserError: with the first of their names.
    """
    bad = [n for n, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise UserError(
            f"{source}: {len(bad)} entries have infinite values or NaN: {some(bad)}; "
            "the file is damaged or its training diverged: give another one"
        )


def require_usable_weights(model: Model, what: str, *, learns: bool = False) -> None:
    """Refuse a model object whose weights are not finite, or of a type that its input does not have.

    Args:
        model: a wrapped one may be of any type that its own ``call`` converts images to, unless it ``learns``.
        what: how messages call it.

    Raises:
        UserError: with the first of the weights' names.
    """
    bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    # A buffer may hold infinity on purpose, as masks of attention do.
    bad += [name for name, buffer in model.named_buffers() if torch.isnan(buffer).any()]
    if bad:
        raise UserError(
            f"the weights of {what} contain NaN or infinite values: {some(bad)}; load others: its training "
            "diverged, or its file is damaged"
        )
    kinds = {w.dtype for w in model.parameters() if w.is_floating_point()} - {torch.float32}
    if kinds and (learns or model.exported is model):
        kind = str(kinds.pop()).removeprefix("torch.")
        raise UserError(
            f"the weights of {what} are {kind}: call its float(); a run computes in what "
            "training.precision says"
        )


def load_backbone(
    backbone: Backbone, state: Mapping[str, Tensor], source: str = "backbone weights"
) -> LoadReport:
    """Load weights in the layout of timm's classification model of the same name.

    The classifier, and stages beyond the last tap, are expected in the file and left out of the report.

    Raises:
        UserError: the backbone did not load whole, the file's stages are longer than the model's, or a weight
            is not finite.
    """
    own = backbone.body.state_dict()
    renamed: State = {}
    # timm's feature extractor writes the module stages.0 as stages_0.
    tops = {name.replace("_", "."): name for name, _ in backbone.body.named_children()}
    for name, tensor in state.items():
        top = next(
            (flat for dotted, flat in tops.items() if f"{name}.".startswith((f"{dotted}.", f"{flat}."))), ""
        )
        if top:
            renamed[f"backbone.body.{top}{name[len(top) :]}"] = tensor
    report = _compare({f"backbone.body.{name}": tensor for name, tensor in own.items()}, renamed, source)
    if not report.matched:
        report.unexpected = list(state)
    report.check(("backbone",))
    prefix = "backbone.body."
    require_finite({name: renamed[name] for name in report.matched}, source)
    backbone.body.load_state_dict({n.removeprefix(prefix): renamed[n] for n in report.matched}, strict=False)
    return report


def _compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> LoadReport:
    report = LoadReport(source)
    for name, tensor in own.items():
        if name not in state:
            report.missing += [] if name.endswith("num_batches_tracked") else [name]
        elif state[name].shape != tensor.shape:
            shapes = f"file {tuple(state[name].shape)}, model {tuple(tensor.shape)}"
            report.wrong_shape.append(f"{name}: {shapes}")
        elif not _same_kind(state[name], tensor):
            kinds = f"file {state[name].dtype} {state[name].layout}, model {tensor.dtype} {tensor.layout}"
            report.wrong_shape.append(f"{name}: {kinds}")
        else:
            report.matched.append(name)
    report.unexpected = [n for n in state if n not in own and not n.endswith("num_batches_tracked")]
    return report


def _same_kind(theirs: Tensor, ours: Tensor) -> bool:
    """Whether values can be copied as they are: quantized or complex numbers would lose their meaning."""
    of_one_kind = theirs.is_floating_point() == ours.is_floating_point() and not theirs.is_complex()
    return of_one_kind and theirs.layout == ours.layout and not theirs.is_meta


def _select_class_rows(
    state: State, own: Mapping[str, Tensor], given: Sequence[str], wanted: Sequence[str]
) -> list[str]:
    """Replace the class rows in ``state`` by those of the wanted classes; returns the wanted without a row."""
    row_of = {name: row for row, name in reversed(list(enumerate(given)))}
    # Repeats, rows before and after those of the classes, rows of a class: dense heads repeat all classes for
    # each anchor, RoI heads begin with the background, a DETR's noised objects end with none.
    layouts = {
        "head.cls": (-1, 0, 0, 1),
        "head.aux_cls": (-1, 0, 0, 1),
        "roi_head.cls": (1, 1, 0, 1),
        "roi_head.box": (1, 1, 0, 4),
        "head.enc_score_head": (1, 0, 0, 1),
        "head.denoising_class_embed": (1, 0, 1, 1),
    }
    decoder = "head.decoder.class_embed."
    layouts |= {name.removesuffix(".bias"): (1, 0, 0, 1) for name in own if name.startswith(decoder)}
    for stage in range(3):  # of a cascade; its boxes are for all classes
        layouts |= dict.fromkeys((f"later_heads.{stage}.cls", f"mask_branch.heads.{stage}.mask"), (1, 1, 0, 1))
    for layer, (anchors, before, after, width) in layouts.items():
        rows = before + len(given) + after
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name not in state or name not in own or state[name].shape[0] % (rows * width):
                continue
            if state[name].shape[1:] != own[name].shape[1:]:
                continue
            theirs = state[name].unflatten(0, (anchors, rows, width))
            result = own[name].detach().cpu().clone().unflatten(0, (-1, before + len(wanted) + after, width))
            if theirs.shape[0] != result.shape[0]:
                continue
            result[:, :before] = theirs[:, :before]
            result[:, before + len(wanted) :] = theirs[:, before + len(given) :]
            for at, label in enumerate(wanted):
                if label in row_of:
                    result[:, before + at] = theirs[:, before + row_of[label]]
            state[name] = result.flatten(0, 2)
    return [label for label in wanted if label not in row_of]


# --- files -----------------------------------------------------------------------------------------------


def find_weights(path: str | Path) -> Path:
    """The weights file that a path means: itself, the student of a run folder, or a transformers checkpoint's.

    Raises:
        UserError: there is none.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise UserError(f"{path!r} is no model: give a run folder or a weights file")
    path = Path(path)
    if path.is_dir() and not (path / STUDENT_FILE).is_file() and (path / "config.json").is_file():
        path = path / transformers_weights.WEIGHTS
        if not path.is_file():
            raise UserError(f"{path}: not here; of a transformers checkpoint only safetensors are read")
    if path.is_dir():
        path = path / STUDENT_FILE
        if not path.is_file():
            raise UserError(
                f"{path.parent}: no {STUDENT_FILE} here; give a finished run's folder or a weights file"
            )
    if not path.is_file():
        raise UserError(f"{path}: no such weights file or run folder")
    return path


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            state.update(part)
    return state.hexdigest()


def read_spec(path: Path) -> Spec | None:
    """The spec that a file saved by :func:`save_model` holds, or a transformers checkpoint's; else None.

    Raises:
        UserError: the file is damaged, or what it says of its model is no
            :class:`~detdistill.models.checkpoints.spec.Spec`.
    """
    if path.suffix != ".safetensors":
        return None
    if transformers_weights.is_checkpoint(path):
        return require_spec(transformers_weights.read_spec(path), str(path.parent))
    spec = read_metadata(path).get("spec")
    return parse_spec(spec, str(path)) if spec is not None else None


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says in addition to the tensors; nothing for other files."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); was it cut short?") from error


def read_state_dict(path: str | Path) -> State:
    """Tensors by name from a safetensors or PyTorch file.

    Common wrappings are undone: what :data:`WRAPPINGS` names, and the prefixes that DistributedDataParallel
    (``module.``), torch.compile (``_orig_mod.``) and Lightning (``model.``) put before each name.

    Raises:
        UserError: no such file, not readable, or it holds more than tensors (it is never unpickled).
    """
    path = find_weights(path)
    if transformers_weights.is_checkpoint(path):
        return transformers_weights.read_state(path)
    return state_of(read_content(path), path)


TENSORS_ONLY = "give a safetensors file, or a .pt file of tensors only"
EXPORTED = (".onnx", ".pt2", ".engine", ".torchscript")


def read_content(path: Path, instead: str | None = None) -> Any:
    """What a safetensors or PyTorch file holds, never unpickled.

    Raises:
        UserError: not readable, or it holds more than tensors and plain values; it ends in ``instead``, or in
            what suits the case.
    """
    if path.suffix in EXPORTED:
        raise UserError(f"{path}: an exported program, not weights; give the weights that it was made of")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if found := re.search(r"GLOBAL (\S+)", str(error)):  # torch's advice beside it is to unpickle all
            reason, instead = f"it holds a {found[1]}, and objects are not unpickled", instead or _anew(path)
        elif path.suffix != ".safetensors":  # torch's own words are about its internals
            reason = "it is no file of tensors, or is damaged"
        raise UserError(f"{path}: cannot be read as weights ({reason}); {instead or TENSORS_ONLY}") from error


def _anew(path: Path) -> str:
    return (
        "if you trust it, write its tensors anew where it was made: "
        f"python -c \"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
        "m = c.get('model', c.get('state_dict', c)) if isinstance(c, dict) else c; "
        f"torch.save(m if isinstance(m, dict) else m.state_dict(), '{path.stem}.plain.pt')\""
    )


WRAPPINGS = (
    "state_dict_ema", "model_ema", "ema", "model", "state_dict", "model_state_dict", "ema_state_dict", "module",
)  # fmt: skip
"""Keys below which weights lie; of several in one file the first is taken. Averages come first, as timm takes
them; but mmengine calls the average ``state_dict``, and what it was made of ``ema_state_dict``."""


def state_of(content: Any, path: Path) -> State:
    """Tensors by name, out of the wrappings that :func:`read_state_dict` undoes."""
    opened: list[int] = []
    while isinstance(content, Mapping):
        if id(content) in opened:
            raise UserError(f"{path}: holds itself, not tensors by name; {TENSORS_ONLY}")
        opened.append(id(content))
        inner = [content[key] for key in WRAPPINGS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    state = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    state.pop("n_averaged", None)  # AveragedModel's counter
    for prefix in ("module.", "_orig_mod.", "module.", "model."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if not state:
        raise UserError(
            f"{path}: holds no tensors by name (it has {some([*map(str, content)]) or 'nothing'}); "
            "give a file of a model's state_dict()"
        )
    return state
