"""Detect objects in images, or segment them: what is found, as arrays, as pictures and as a file."""

from __future__ import annotations

import itertools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from detdistill.data.images import find_images, read_image
from detdistill.data.masks import encode_masks
from detdistill.errors import UserError, require_count
from detdistill.evaluation.coco import result_rows
from detdistill.evaluation.evaluate import as_model, choose_device
from detdistill.models.base import Detections, Model
from detdistill.output import make_folder, output_path
from detdistill.training.run_folder import write_atomically
from detdistill.visualization.drawing import draw_detections
from detdistill.visualization.gallery import CELL

PREDICTIONS_FILE = "predictions.json"
_WRITTEN_AS_THEY_ARE = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Prediction:
    """What was found in one image.

    Attributes:
        path: the image file.
        boxes_K4: float32 xyxy in pixels of the image.
        labels_K: int64 indices into ``classes``.
        scores_K: float32 in [0, 1], falling.
        classes: the model's class names.
        masks_KHW: bool, each object's pixels; None of a model without masks.
        semantic_HW: of a segmenter, int64: the class of each pixel; it finds no boxes.
    """

    path: Path
    boxes_K4: Tensor
    labels_K: Tensor
    scores_K: Tensor
    classes: tuple[str, ...]
    masks_KHW: Tensor | None = None
    semantic_HW: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.classes[label] for label in self.labels_K.tolist()]

    @property
    def shares(self) -> dict[str, float]:
        """Of a segmenter: what share of the pixels each class has, of those that have any, largest first."""
        if self.semantic_HW is None:
            return {}
        counts = self.semantic_HW.flatten().bincount(minlength=len(self.classes)) / self.semantic_HW.numel()
        shares = dict(zip(self.classes, counts.tolist(), strict=True))
        return {name: shares[name] for name in sorted(shares, key=lambda n: -shares[n]) if shares[name]}


def predict(
    model: Model | str | Path,
    images: str | Path,
    *,
    out: str | Path | None = None,
    threshold: float = 0.3,
    batch_size: int = 1,
    teacher: Model | str | Path | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """As :func:`iter_predictions`, all at once: of many large images masks and label maps may not fit."""
    return list(
        iter_predictions(
            model, images, out=out, threshold=threshold, batch_size=batch_size, teacher=teacher, device=device,
            progress=progress,
        )
    )  # fmt: skip


def iter_predictions(
    model: Model | str | Path,
    images: str | Path,
    *,
    out: str | Path | None = None,
    threshold: float = 0.3,
    batch_size: int = 1,
    teacher: Model | str | Path | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Prediction]:
    """Detect objects in an image, or in all images of a folder and its subfolders; a segmenter segments them.

    One batch is in memory at a time. What is written is whole when the last prediction has been taken.

    Args:
        model: a detector or segmenter, a run folder, or a file that detdistill saved.
        images: the image file or folder. Images of a folder that cannot be read are left out, with a warning.
        out: a folder for the pictures with their boxes and for ``predictions.json``, a list of detections as
            :func:`~detdistill.evaluation.coco.result_rows` makes them, with the category ids of the data that
            the model was trained on, and ``file_name``. ``image_id`` is the file's stem, as a number where it
            is one; images that would share one have their path in the folder instead. Of a segmenter the list
            says of each image what share of it each class has, and next to its picture is
            ``NAME.labels.png``, with a class index in each pixel.
        threshold: detections of a lower score are left out.
        batch_size: images that a model sees at once.
        teacher: draw what this model finds beside what the model finds.
        device: ``auto`` (an accelerator where there is one), ``cpu``, ``cuda:1``, …
        progress: called after each image with (images done, images in all).

    Raises:
        UserError: no such model, image or device, or the pictures would overwrite the images.
    """
    require_count("batch_size", batch_size, 1)
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold is {threshold!r}: give a score from 0 to 1")
    out = output_path(out) if out is not None else None
    root, paths = _find_images(Path(images), out)
    files = _name_files(paths, root)
    if out is not None:
        _refuse_to_overwrite(files, out)
    chosen = choose_device(device)
    models = [as_model(each).to(chosen).eval() for each in (model, teacher) if each is not None]
    rows: list[dict[str, Any]] = []
    readable = _read(paths)
    done = 0
    while batch := list(itertools.islice(readable, batch_size)):
        on_device = [image.to(chosen) for _, image in batch]
        with torch.inference_mode():
            found = [_detect(each, on_device, threshold) for each in models]
        for (path, image), *each in zip(batch, *found, strict=True):
            student = each[0]
            arrays = (student["boxes"], student["labels"], student["scores"], models[0].classes)
            prediction = Prediction(path, *arrays, student.get("masks"), student.get("semantic"))
            if out is not None:
                names = files[path]
                _save_picture(image, each, models, threshold, out / names.picture)
                _save_label_map(prediction, out / names.label_map)
                rows += _rows(prediction, names, models[0].category_ids)
            done += 1
            if progress is not None:
                progress(done, len(paths))
            yield prediction
    if out is not None:
        make_folder(out)
        write_atomically(out / PREDICTIONS_FILE, json.dumps(rows, indent=1) + "\n")


def _find_images(images: Path, out: Path | None) -> tuple[Path, list[Path]]:
    """The folder that the pictures' names are relative to, and the image files."""
    root = images if images.is_dir() else images.parent
    paths = find_images(images)
    if out is not None and root == images and out.resolve() != images.resolve():
        # What an earlier call wrote is not to be read by this one, unless it is what was asked for.
        paths = [path for path in paths if out.resolve() not in path.resolve().parents]
        if not paths:
            raise UserError(f"{images}: no images here but those in {out}; give a folder of images")
    return root, paths


class _Files(NamedTuple):
    """What an image is called in the output: no two images share any of these."""

    image_id: int | str
    file_name: str  # the image's, from the folder
    picture: str
    label_map: str


def _name_files(paths: Sequence[Path], root: Path) -> dict[Path, _Files]:
    names = [path.relative_to(root) for path in paths]
    given = [name.as_posix() for name in names]
    stems: list[int | str] = [int(name.stem) if name.stem.isdecimal() else name.stem for name in names]
    ids = _distinct(stems, given)
    # Formats other than JPEG and PNG get .png after their own.
    pictures = [name if name.lower().endswith(_WRITTEN_AS_THEY_ARE) else f"{name}.png" for name in given]
    label_maps = [Path(picture).with_suffix(".labels.png").as_posix() for picture in pictures]
    anyway = [f"{name}.png" for name in given] + [f"{name}.labels.png" for name in given]
    written = _distinct(pictures + label_maps, anyway)
    rows = zip(ids, given, written[: len(given)], written[len(given) :], strict=True)
    return dict(zip(paths, itertools.starmap(_Files, rows), strict=True))


T = TypeVar("T")


def _distinct(wanted: Sequence[T], distinct: Sequence[T]) -> list[T]:
    """The wanted names; for those that are not unique the distinct ones, for all where that is not enough."""
    times = Counter(wanted)
    names = [other if times[name] > 1 else name for name, other in zip(wanted, distinct, strict=True)]
    return names if len(set(names)) == len(names) else list(distinct)


def _refuse_to_overwrite(files: Mapping[Path, _Files], out: Path) -> None:
    images = {_identity(path) for path in files} - {None}
    for path, names in files.items():
        for target in (out / names.picture, out / names.label_map):
            if _identity(target) in images:
                raise UserError(f"{out}: the picture of {path} would overwrite {target}; choose another --out")


def _identity(path: Path) -> tuple[int, int] | None:
    """By which a file is known whatever its name; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read(paths: list[Path]) -> Iterator[tuple[Path, Tensor]]:
    for path in paths:
        try:
            image = read_image(path)
        except UserError as error:
            if len(paths) == 1:
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        yield path, image


def _detect(model: Model, images: list[Tensor], threshold: float) -> list[Detections]:
    return [_kept(detections, threshold) for detections in model(images)]


def _kept(detections: Detections, threshold: float) -> Detections:
    if "semantic" in detections:
        no_boxes = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        return {**no_boxes, "scores": torch.zeros(0), "semantic": detections["semantic"].cpu()}
    keep = detections["scores"] >= threshold
    found = {name: value[keep].cpu() for name, value in detections.items()}
    if "masks" in found:
        found["masks"] = found["masks"].squeeze(1) > 0.5
    return found


def _save_picture(
    image_3HW: Tensor, found: list[Detections], models: list[Model], threshold: float, path: Path
) -> None:
    drawn = [
        draw_detections(image_3HW, detections, model.classes, threshold, shortest=CELL)
        for detections, model in zip(found, models, strict=True)
    ]
    side_by_side = torch.cat(drawn, dim=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(side_by_side.permute(1, 2, 0).numpy()).save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def _save_label_map(prediction: Prediction, path: Path) -> None:
    if prediction.semantic_HW is not None:
        Image.fromarray(prediction.semantic_HW.to(torch.uint8).numpy()).save(path)


def _rows(prediction: Prediction, names: _Files, category_ids: Sequence[int] | None) -> list[dict[str, Any]]:
    image = {"image_id": names.image_id, "file_name": names.file_name}
    if prediction.semantic_HW is not None:
        return [{**image, "shares": {name: round(share, 5) for name, share in prediction.shares.items()}}]
    masks_KHW = prediction.masks_KHW
    masks = None if masks_KHW is None else encode_masks(masks_KHW.numpy())
    found = {"boxes": prediction.boxes_K4, "labels": prediction.labels_K, "scores": prediction.scores_K}
    rows = result_rows(names.image_id, found, prediction.classes, category_ids, masks)
    return [{**image, **row} for row in rows]
