"""Detectors that this project did not write: any module whose feature maps can be tapped, in five steps.

A tap names a submodule, and the stride of the map that it gives. It is read by a forward hook that lives for
one forward: nothing stays on the model, so that it can be copied, moved, saved and sent to other processes.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import clip_boxes_to_image

from detdistill.config import UserError
from detdistill.models.base import (
    Batch,
    Detections,
    Detector,
    ForeignRaw,
    Kind,
    Preprocess,
    Pyramid,
    Raw,
    TappedPyramid,
    eval_mode,
)
from detdistill.models.torchvision_objects import wrap_torchvision

Call = Callable[[nn.Module, Tensor, Batch], Any]
Losses = Callable[[nn.Module, Any, Batch], Mapping[str, Tensor]]
Decode = Callable[[nn.Module, Any, Batch], Sequence[Detections]]

PROBE = 64  # pixels: least height of the image on which the taps are tried; it is twice as wide
WITHOUT_TAPS = (detection.RetinaNet, detection.FCOS, detection.FasterRCNN)  # a MaskRCNN is a FasterRCNN


def wrap(
    model: nn.Module,
    taps: Mapping[int, str] | None = None,
    preprocess: Preprocess | None = None,
    classes: Sequence[str] = (),
    *,
    call: Call | None = None,
    losses: Losses | None = None,
    decode: Decode | None = None,
    kind: Kind | None = None,
) -> Detector:
    """Make a detector of any module, to be a teacher or, with ``losses``, a student.

    torchvision's own RetinaNet, FCOS, Faster R-CNN and Mask R-CNN objects need neither taps nor functions.

    Args:
        model: any module; it is not copied, and nothing is added to it.
        taps: ``{stride: name}`` of the submodules whose outputs are the pyramid, as ``{8: "neck.p3"}``. Of an
            output that is a tuple, list or dict, ``"neck:0"`` is the first item, ``"backbone:p3"`` item ``p3``.
        preprocess: what the model was trained to see. Of torchvision's objects: their own, when not given.
        classes: names, without a background; label i means ``classes[i]``. A teacher of features needs none.
        call: ``call(model, images_N3HW, batch)`` runs it; ``model(images_N3HW)`` when not given. It is first
            tried on an image of zeros with ``batch.targets`` None. These functions are given the model because
            it may be a copy: an average over training, or that of another process.
        losses: ``losses(model, output, batch)``: of what ``call`` returned in training mode, scalars by name.
            The objects, in pixels of the network input, are in ``batch.targets``.
        decode: ``decode(model, output, batch)``: of what ``call`` returned in evaluation mode, for each image
            ``boxes`` (K, 4) xyxy in pixels of the network input, ``labels`` (K,) in 0…Q-1, ``scores`` (K,).
        kind: what it answers from, as methods have settings for anchors, cells and proposals.

    Raises:
        UserError: a tap that is not there, does not run, or does not give what it should; something is missing.

    Example:
        >>> plain = Preprocess(mean=(0, 0, 0), std=(1, 1, 1))
        >>> teacher = wrap(yolo, {8: "model.15", 16: "model.18", 32: "model.21"}, plain)
    """
    if taps is None:
        given = {"call": call, "losses": losses, "decode": decode, "kind": kind}
        for name in (name for name, value in given.items() if value is not None):
            raise UserError(f"wrap: {name} goes with taps: give taps={{stride: module name}}")
        if not isinstance(model, WITHOUT_TAPS):
            raise UserError(
                f"wrap: a {type(model).__name__} has steps of its own: give taps={{stride: module name}}, as "
                f"{{8: {_example(model)!r}}} (`print(model)` shows the names)"
            )
        return wrap_torchvision(model, classes, preprocess)
    if preprocess is None:
        raise UserError(
            "wrap: preprocess is missing: give the normalisation that the model was trained with, as "
            "preprocess=Preprocess(mean=(0, 0, 0), std=(1, 1, 1)) for RGB in [0, 1]"
        )
    if (losses or decode) and not classes:
        raise UserError("wrap: classes is missing: name them in the order of the model's labels")
    return Wrapped(model, taps, preprocess, classes, call or _call, losses, decode, kind)


def _call(model: nn.Module, images_N3HW: Tensor, batch: Batch) -> Any:
    return model(images_N3HW)


class _Filled(BaseException):
    """All taps are filled; no ``except Exception`` of the model's may catch this."""


class Wrapped(Detector):
    """The five steps of a foreign module; build it with :func:`wrap`."""

    opaque = True

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[int, str],
        preprocess: Preprocess,
        classes: Sequence[str],
        call: Call,
        losses: Losses | None,
        decode: Decode | None,
        kind: Kind | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessor = preprocess
        self.classes = tuple(classes)
        self.kind = kind
        self.can_learn = losses is not None
        self._call, self._losses, self._decode = call, losses, decode
        known = {name for name, _ in model.named_modules(remove_duplicate=False)}
        self._taps: dict[int, tuple[str, tuple[str, ...]]] = {}
        for stride, tap in sorted(taps.items()):
            name, *keys = tap.split(":")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known - {""})[:3]
                raise UserError(f"tap {stride}: the model has no module {name!r}; near are {', '.join(near)}")
            self._taps[stride] = name, tuple(keys)
        if not self._taps:
            raise UserError("wrap: taps is empty: give at least one, as {8: 'neck.p3'}")
        self.pyramid_channels = self._try_out()

    @property
    def exported(self) -> nn.Module:
        return self.model

    def pyramid(self, batch: Batch) -> TappedPyramid:
        return self._run(batch)

    def pyramid_alone(self, batch: Batch) -> Pyramid:
        return self._run(batch, stop=True)

    def predict(self, pyramid: Pyramid, batch: Batch) -> ForeignRaw:
        """What the model answered in the forward that gave this very pyramid; nothing runs twice."""
        if not isinstance(pyramid, TappedPyramid):
            raise ValueError(
                "a wrapped detector predicts from the pyramid that its own `pyramid` returned alone"
            )
        return ForeignRaw(pyramid.output)

    def losses(self, raw: Raw, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(raw, ForeignRaw)
        if self._losses is None:
            raise UserError("this wrapped model cannot learn: give wrap(..., losses=...)")
        losses = self._losses(self.model, raw.output, batch)
        if not isinstance(losses, Mapping) or any(
            not isinstance(value, Tensor) or value.ndim for value in losses.values()
        ):
            raise UserError(
                f"losses(model, output, batch) gave {_seen(losses)}: return a dict of scalar tensors by name"
            )
        return dict(losses)

    def decode(self, raw: Raw, batch: Batch) -> list[Detections]:
        assert isinstance(raw, ForeignRaw)
        if self._decode is None:
            raise UserError("this wrapped model gives no detections: give wrap(..., decode=...)")
        detections = []
        found = self._decode(self.model, raw.output, batch)
        for one, size, original in zip(found, batch.sizes, batch.original_sizes, strict=True):
            order = one["scores"].argsort(descending=True, stable=True)
            one = {name: value[order] for name, value in one.items()}
            ratio_y, ratio_x = original[0] / size[0], original[1] / size[1]
            boxes_K4 = clip_boxes_to_image(one["boxes"], size)
            boxes_K4 = boxes_K4 * boxes_K4.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])
            detections.append({**one, "boxes": boxes_K4})
        return detections

    # --- taps ------------------------------------------------------------------------------------------

    def _run(self, batch: Batch, *, stop: bool = False, watch: bool = False) -> TappedPyramid:
        """One forward.

        Args:
            batch: the input.
            stop: break off when the last tap is filled; the pyramid's output is then None.
            watch: refuse maps that a later layer overwrites.
        """
        answers: dict[str, Any] = {}
        names = {name for name, _ in self._taps.values()}
        pyramid, versions = TappedPyramid(), {}

        def keep(name: str, answer: Any) -> None:
            if name in answers:
                raise UserError(f"tap {name!r} runs more than once in a forward: tap a module that runs once")
            answers[name] = answer
            if watch:
                versions.update({stride: x._version for stride, x in self._maps(answers).items()})
            if stop and len(answers) == len(names):
                raise _Filled

        with ExitStack() as hooks:
            for name in names:
                module = self.model.get_submodule(name)
                hooks.enter_context(
                    module.register_forward_hook(lambda _, __, answer, name=name: keep(name, answer))
                )
            try:
                pyramid.output = self._call(self.model, batch.images_N3HW, batch)
            except _Filled:
                pyramid.output = None
        pyramid.update(self._maps(answers))
        for stride, (name, _) in self._taps.items():
            if name not in answers:
                raise UserError(
                    f"tap {stride}: {name!r} did not run when the model was called: tap a module on the way of "
                    "the images, or give a `call` that runs it"
                )
            if watch and pyramid[stride]._version != versions[stride]:
                raise UserError(
                    f"tap {stride}: a later layer overwrites the map of {name!r} in place: tap that later layer"
                )
        return pyramid

    def _maps(self, answers: Mapping[str, Any]) -> Pyramid:
        """The maps in what the tapped modules that have run gave.

        Raises:
            UserError: an item that is not there, or no (N, C, H, W).
        """
        maps = {}
        for stride, (name, keys) in self._taps.items():
            if name not in answers:
                continue
            value, path = answers[name], name
            for key in keys:
                value, path = _item(value, key, stride, path), f"{path}:{key}"
            if not isinstance(value, Tensor) or value.ndim != 4:
                wanted = f"choose one, as '{path}:0'" if isinstance(value, Sequence | Mapping) else "tap a map"
                raise UserError(f"tap {stride}: {path!r} gives {_seen(value)}, not (N, C, H, W): {wanted}")
            maps[stride] = value
        return maps

    def _try_out(self) -> dict[int, int]:
        """One forward on zeros: ``{stride: channels}`` of taps that give what they should."""
        multiple = math.lcm(self.preprocessor.divisor, *self._taps)
        height = -(-PROBE // multiple) * multiple
        size = height, 2 * height  # not square: a map that lies on its side is seen
        device = next(self.model.parameters(), torch.empty(0)).device
        batch = Batch(torch.zeros(1, 3, *size, device=device), [size], [size], None)
        try:
            with eval_mode(self.model), torch.no_grad():
                pyramid = self._run(batch, watch=True)
        except UserError:
            raise
        except Exception as error:  # whatever the model's own code raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"wrap: the model cannot be called with images of shape {tuple(batch.images_N3HW.shape)} "
                f"({reason}): give call=lambda model, images, batch: …"
            ) from error
        for stride, x_1CHW in pyramid.items():
            cells = tuple(x_1CHW.shape[-2:])
            if cells != (size[0] // stride, size[1] // stride):
                seen = dict.fromkeys(f"{pixels / side:g}" for pixels, side in zip(size, cells, strict=True))
                raise UserError(
                    f"tap {stride}: {self._taps[stride][0]!r} gives {cells[0]}×{cells[1]} cells of an input of "
                    f"{size[0]}×{size[1]} pixels, which is a stride of {' and '.join(seen)}, not {stride}"
                )
        return {stride: x_1CHW.shape[1] for stride, x_1CHW in pyramid.items()}


def _item(value: Any, key: str, stride: int, path: str) -> Any:
    try:
        return value[key] if isinstance(value, Mapping) and key in value else value[int(key)]
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(f"tap {stride}: {path!r} gives {_seen(value)}, which has no item {key!r}") from None


def _seen(value: Any, inside: bool = True) -> str:
    """What a module gave, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if not isinstance(value, Mapping | list | tuple):
        return f"a {type(value).__name__}"
    what = f"a {type(value).__name__} of {len(value)}"
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    shown = ", ".join(f"{key!r}: {_seen(item, inside=False)}" for key, item in itertools.islice(items, 5))
    return f"{what} ({shown})" if inside else what


def _example(model: nn.Module) -> str:
    """The last module but the head, or whatever there is."""
    names = [name for name, _ in model.named_children()]
    return (names[-2:] or ["neck"])[0]
