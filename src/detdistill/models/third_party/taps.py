"""Feature maps of a module that this project did not write, by the names of its submodules.

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

from detdistill.errors import UserError
from detdistill.models.base import Batch, Pyramid, TappedPyramid, eval_mode

Call = Callable[[nn.Module, Tensor, Batch], Any]

PROBE = 64  # pixels: least height of the image on which the taps are tried; it is twice as wide


class _Filled(BaseException):
    """All taps are filled; no ``except Exception`` of the model's may catch this."""


class Taps:
    """Runs a model and reads its maps. The model is given each time: it may be a copy, such as an average.

    Args:
        model: any module; it is run once, on an image of zeros.
        taps: ``{stride: name}``; ``"neck:0"`` is the first item of what ``neck`` gives.
        divisor: of the sides of the model's input.
        call: ``call(model, images_N3HW, batch)`` runs it.

    Attributes:
        channels: ``{stride: channels}`` of the maps.

    Raises:
        UserError: a tap that is not there, does not run, or does not give what it should.
    """

    def __init__(self, model: nn.Module, taps: Mapping[int, str], divisor: int, call: Call) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise UserError(
                "wrap: a scripted or traced module runs as one piece, and its maps cannot be read: give the "
                "module that it was made of"
            )
        self._call = call
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
        self.channels: dict[int, int] = {}
        self.channels = self._try_out(model, divisor)

    def run(self, model: nn.Module, batch: Batch, *, stop: bool = False, watch: bool = False) -> TappedPyramid:
        """One forward.

        Args:
            model: the one that was tried, or a copy.
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
                module = model.get_submodule(name)
                hooks.enter_context(
                    module.register_forward_hook(lambda _, __, answer, name=name: keep(name, answer))
                )
            try:
                pyramid.output = self._call(model, batch.images_N3HW, batch)
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
        self._check_sizes(pyramid, batch.padded_size)
        return pyramid

    def _check_sizes(self, pyramid: Pyramid, size: tuple[int, int]) -> None:
        """Refuse a map that does not follow the input, of a size of its own, or of other channels than once.

        Sides that the stride does not divide may be rounded either way.
        """
        for stride, channels in self.channels.items():
            found = tuple(pyramid[stride].shape[1:])
            if found[0] != channels or any(
                abs(cells - pixels / stride) > 1 for cells, pixels in zip(found[1:], size, strict=True)
            ):
                raise UserError(
                    f"tap {stride}: {self._taps[stride][0]!r} gives (channels, rows, columns) {found} of an "
                    f"input of {size[0]}×{size[1]} pixels, not {channels} channels and a cell for each "
                    f"{stride} pixels: it must do so for every input size"
                )

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
                raise UserError(f"tap {stride}: {path!r} gives {seen(value)}, not (N, C, H, W): {wanted}")
            maps[stride] = value
        return maps

    def _try_out(self, model: nn.Module, divisor: int) -> dict[int, int]:
        """One forward on zeros: ``{stride: channels}`` of taps that give what they should."""
        multiple = math.lcm(divisor, *self._taps)
        height = -(-PROBE // multiple) * multiple
        size = height, 2 * height  # not square: a map that lies on its side is seen
        device = next(model.parameters(), torch.empty(0)).device
        batch = Batch(torch.zeros(1, 3, *size, device=device), [size], [size], None)
        try:
            with eval_mode(model), torch.no_grad():
                pyramid = self.run(model, batch, watch=True)
        except UserError:
            raise
        except Exception as error:  # whatever the model's own code raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} - {"float32"}
            fix = (
                f"its weights are {' and '.join(sorted(kinds))}: give model.float()"
                if kinds
                else "give call=lambda model, images, batch: …"
            )
            raise UserError(
                f"wrap: the model cannot be called with images of shape {tuple(batch.images_N3HW.shape)} "
                f"({reason}): {fix}"
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
        raise UserError(f"tap {stride}: {path!r} gives {seen(value)}, which has no item {key!r}") from None


def seen(value: Any, inside: bool = True) -> str:
    """What a module gave, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if not isinstance(value, Mapping | list | tuple):
        return f"a {type(value).__name__}"
    what = f"a {type(value).__name__} of {len(value)}"
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    shown = ", ".join(f"{key!r}: {seen(item, inside=False)}" for key, item in itertools.islice(items, 5))
    return f"{what} ({shown})" if inside else what
