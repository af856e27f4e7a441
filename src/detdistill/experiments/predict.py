"""Detect objects in images, or segment them: what is found, as arrays, as pictures and as a file."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from detdistill.config import UserError
from detdistill.data.images import find_images, read_image
from detdistill.data.masks import encode_masks
from detdistill.experiments.evaluate import as_model, choose_device
from detdistill.models.base import Detections, Model
from detdistill.report.drawing import draw_detections
from detdistill.report.gallery import CELL
from detdistill.training.run_folder import write_atomically

PREDICTIONS_FILE = "predictions.json"


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
            COCO's results have them: ``bbox`` is (x, y, width, height), ``category_id`` is the label plus 1,
            ``image_id`` is the file's stem, as a number where it is one, and ``segmentation``, where the model
            gives masks, their run lengths; and the names of both. Of a segmenter the list says of each image
            what share of it each class has, and beside its picture is ``NAME.labels.png``, with a class index
            in each pixel.
        threshold: detections of a lower score are left out.
        batch_size: images that a model sees at once.
        teacher: draw what this model finds beside what the model finds.
        device: ``auto`` (an accelerator where there is one), ``cpu``, ``cuda:1``, …
        progress: called after each image with (images done, images in all).

    Raises:
        UserError: no such model, image or device, or the pictures would overwrite the images.
    """
    root, paths = _find_images(Path(images), Path(out) if out is not None else None)
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
                picture = _picture(Path(out), path, root)
                _save_picture(image, each, models, threshold, picture)
                _save_label_map(prediction, picture)
                rows += _rows(prediction, root)
            done += 1
            if progress is not None:
                progress(done, len(paths))
            yield prediction
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(out) / PREDICTIONS_FILE, json.dumps(rows, indent=1) + "\n")


def _find_images(images: Path, out: Path | None) -> tuple[Path, list[Path]]:
    """The folder that the pictures' names are relative to, and the image files."""
    root = images if images.is_dir() else images.parent
    paths = find_images(images)
    if out is not None and root == images and out.resolve() != images.resolve():
        # What an earlier call wrote is not to be read by this one, unless it is what was asked for.
        paths = [path for path in paths if out.resolve() not in path.resolve().parents]
        if not paths:
            raise UserError(f"{images}: no images here but those in {out}; give a folder of images")
    for path in paths if out is not None else ():
        assert out is not None
        target = _picture(out, path, root)
        if target.exists() and target.samefile(path):
            raise UserError(f"{out}: the picture would overwrite {path}; choose another folder for --out")
    return root, paths


def _picture(out: Path, path: Path, root: Path) -> Path:
    """Where the picture of an image goes; formats other than JPEG and PNG get ``.png`` after their own."""
    name = path.relative_to(root)
    if name.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        name = name.with_name(f"{name.name}.png")
    return out / name


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


def _save_label_map(prediction: Prediction, picture: Path) -> None:
    if prediction.semantic_HW is not None:
        labels = Image.fromarray(prediction.semantic_HW.to(torch.uint8).numpy())
        labels.save(picture.with_name(f"{picture.stem}.labels.png"))


def _rows(prediction: Prediction, root: Path) -> list[dict[str, Any]]:
    stem = prediction.path.stem
    image = {
        "image_id": int(stem) if stem.isdecimal() else stem,
        "file_name": prediction.path.relative_to(root).as_posix(),
    }
    if prediction.semantic_HW is not None:
        return [{**image, "shares": {name: round(share, 5) for name, share in prediction.shares.items()}}]
    masks_KHW = prediction.masks_KHW
    masks = [] if masks_KHW is None else encode_masks(masks_KHW.numpy())
    boxes_K4 = box_convert(prediction.boxes_K4, "xyxy", "xywh").tolist()
    values = (boxes_K4, prediction.labels_K.tolist(), prediction.scores_K.tolist())
    return [
        {
            **image,
            "category_id": label + 1,
            "category": prediction.classes[label],
            "bbox": [round(value, 2) for value in box],
            "score": round(score, 5),
            **({"segmentation": masks[i]} if masks else {}),
        }
        for i, (box, label, score) in enumerate(zip(*values, strict=True))
    ]
