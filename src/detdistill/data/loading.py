"""From a recipe's ``data`` to splits, samples and batches."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from detdistill.data.cleaning import relabel, report_fractions, report_ignored
from detdistill.data.formats.coco import find_coco, open_coco
from detdistill.data.formats.digits import digits_root
from detdistill.data.formats.label_maps import (
    count_pixels,
    find_cityscapes,
    find_label_folders,
    open_cityscapes,
    open_label_folders,
    open_voc_segmentation,
    read_labels,
)
from detdistill.data.formats.voc import find_voc, find_voc_folders, open_voc
from detdistill.data.formats.yolo import open_yolo
from detdistill.data.formats.yolo_layout import find_yolo
from detdistill.data.holdout import hold_out, share_of
from detdistill.data.images import read_image
from detdistill.data.masks import decode_mask
from detdistill.data.records import Finding, Record, Split
from detdistill.data.transforms import augment_seeded, build_augment
from detdistill.errors import UserError, nearest
from detdistill.recipe import AugmentConfig, DataConfig
from detdistill.seeding import mix_seed

_EXPECTED = (
    "Expected: COCO (annotations/instances_train*.json, or train.json and val.json), "
    "VOC (Annotations, ImageSets/Main, JPEGImages; or XML files with the images), YOLO (a .yaml with names and "
    "train; obj.data; images and labels; or label files with the images); for segmentation images/train and "
    "labels/train with label maps, or Cityscapes (leftImg8bit, gtFine); or set data.format, data.train and "
    "data.val"
)

Sample = tuple[Tensor, dict[str, Tensor]]
"""(3, H, W) uint8 image and its target: ``boxes`` (K, 4) float32 xyxy pixels, ``labels`` (K,) int64, ``index``
() int64, the place in ``split.records``, and ``masks`` (K, H, W) bool where they were asked for. Of a split
with label maps the target is ``semantic`` (H, W) uint8, 255 where a pixel has no class, and ``index``."""

Format = Literal["coco", "voc", "yolo", "label_maps", "cityscapes", "voc_segmentation"]


def open_data(config: DataConfig, with_masks: bool = True) -> dict[str, Split]:
    """Read a dataset: ``{"train": …, "val": …}``, either absent only where the folder lacks it.

    The format is told by looking at the folder, unless ``data.format`` says it. A dataset without a val part
    is evaluated on its test part; ``data.val: 20%`` takes val out of train. Both splits have the same classes
    in the same order.

    Args:
        with_masks: keep segmentations, where there are any (full COCO takes gigabytes with them).

    Raises:
        UserError: nothing is recognized, several things could be meant, or a file cannot be read. Bad single
            annotations raise nothing: they are in the splits' ``findings``.
    """
    share = share_of(config.val)
    splits = _open(config if share is None else config.model_copy(update={"val": None}), with_masks)
    if share is not None and "train" in splits:
        splits = hold_out(splits["train"], share)
    if not splits:
        raise UserError(f"{config.root}: no train or val part was found; set data.train and data.val")
    if "train" in splits and "val" in splits:
        splits["val"] = _agree(splits["train"], splits["val"], chosen=config.classes is not None)
    if "train" in splits and config.limit is not None:
        splits["train"] = splits["train"].evenly(config.limit)
    for split in splits.values():
        report_ignored(split, split.findings)
        report_fractions(split, split.findings)
    return splits


def usable_splits(config: DataConfig, names: Sequence[str], with_masks: bool = False) -> dict[str, Split]:
    """The named splits, free of errors: what training and evaluation start from.

    Args:
        with_masks: keep segmentations, where there are any.

    Raises:
        UserError: as :func:`open_data`; or a split is missing, or its annotations have errors.
    """
    splits = open_data(config, with_masks)
    for name in names:
        if name not in splits:
            hints = {"train": "set data.train", "val": "set data.val, perhaps to 20% of train"}
            hint = hints.get(name) or nearest(name, splits)
            raise UserError(f"{config.root or config.format}: no split {name!r}; {hint}")
    errors = [finding for name in names for finding in splits[name].errors]
    for name in names:
        if splits[name].has_label_maps:
            errors += count_pixels(splits[name], sample=64).findings
    if errors:
        more = f" (and {len(errors) - 1} more errors: run `detdistill check`)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")
    return {name: splits[name] for name in names}


def _open(config: DataConfig, with_masks: bool) -> dict[str, Split]:
    if config.format == "digits":
        root = digits_root(config)
        return open_coco(DataConfig(format="coco", root=root, classes=config.classes), with_masks)
    kind = config.format if config.format != "auto" else tell_format(config)
    if kind == "coco":
        return open_coco(config, with_masks)
    if kind == "yolo":
        return open_yolo(config, with_masks)
    others = {
        "voc": open_voc,
        "label_maps": open_label_folders,
        "cityscapes": open_cityscapes,
        "voc_segmentation": open_voc_segmentation,
    }
    return others[kind](config)


def tell_format(config: DataConfig) -> Format:
    """Look at ``data.root`` and say what it holds; of VOC with boxes and label maps, the boxes.

    Raises:
        UserError: nothing or more than one thing is recognized; the message lists what was seen.
    """
    root = config.root
    assert root is not None, "DataConfig refuses data without a root"
    if not root.exists():
        raise UserError(f"{root}: no such folder; correct data.root")
    if root.suffix == ".json":
        raise UserError(
            f"{root}: give the dataset's folder as data.root and this file as data.train or data.val"
        )
    if root.is_file():
        return "yolo"
    found: list[Format] = []
    if find_coco(root) or str(config.train or config.val).endswith(".json"):
        found.append("coco")
    if find_voc(root):
        found.append("voc")
    elif find_voc(root, "Segmentation"):
        found.append("voc_segmentation")
    elif find_voc_folders(root):
        found.append("voc")
    if find_label_folders(root):
        found.append("label_maps")
    if find_cityscapes(root):
        found.append("cityscapes")
    if find_yolo(root):
        found.append("yolo")
    if len(found) > 1:
        raise UserError(f"{root}: could be {' or '.join(found)}; set data.format to the one you mean")
    if not found:
        names = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
        seen = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise UserError(
            f"{root}: no dataset is recognized here. Seen: {seen or 'nothing'}.{_guess(root)} {_EXPECTED}"
        )
    return found[0]


def _guess(root: Path) -> str:
    """What to do with a file that may be COCO's, of no part by its name (``instances_default.json``)."""
    files = sorted(path.relative_to(root).as_posix() for path in [*root.glob("*.json"), *root.glob("*/*.json")])
    if not 0 < len(files) <= 4:
        return ""
    return f" If {files[0]} is COCO, set data.train to it, and data.val to another file or to a share as 20%."


def _agree(train: Split, val: Split, chosen: bool) -> Split:
    """Val with train's list of classes; a class that only val has is an error, unless classes were chosen."""
    if val.classes == train.classes:
        return val
    findings = list(val.findings)
    counts = np.bincount(val.records.labels_M, minlength=len(val.classes)).tolist()
    known = frozenset(train.classes)
    for name, count in zip(val.classes, counts, strict=True):
        if name not in known and count and not chosen:
            message = f"class {name!r} has {count} objects in {val.name} and is unknown to {train.name}"
            fix = f"{nearest(name, train.classes)}; add it to {train.source} or set data.classes"
            findings.append(Finding("error", "unknown class", val.source, message, fix))
    ids = _category_ids(train, val)
    return replace(relabel(val, train.classes, lambda name: ids[name]), findings=findings)


def _category_ids(train: Split, val: Split) -> dict[str, int | str]:
    """Val's own by train's classes; of a class that val lacks train's, where val has no other use for it."""
    own = dict(zip(val.classes, val.category_ids or (), strict=False))
    others = dict(zip(train.classes, train.category_ids or (), strict=False))
    taken = set(val.numeric_ids or ())
    numbers = dict(zip(train.classes, train.numeric_ids or (), strict=False))
    unused = itertools.count(max([*taken, *numbers.values()], default=0) + 1)
    return {
        name: own[name] if name in own else next(unused) if numbers[name] in taken else others[name]
        for name in others
    }


class DetectionDataset(Dataset[Sample]):
    """The images of a split, decoded, augmented and with their targets; see :data:`Sample`.

    Indexed by ``i`` or ``(epoch, i)``. What augmentation draws depends on (seed, epoch, i) alone: not on the
    worker, not on what was read before. Ignored objects (crowd, difficult) are not in the target.

    Args:
        split: the records.
        augment: None for evaluation.
        seed: of the augmentation.
        with_masks: add the masks to the target; the split must have them.

    Raises:
        UserError: on construction, masks are asked for and the split has none; on indexing, an image cannot
            be decoded or has not the declared size.
    """

    def __init__(
        self, split: Split, augment: AugmentConfig | None, seed: int = 0, with_masks: bool = False
    ) -> None:
        if with_masks and not split.has_masks:
            raise UserError(f"{split.source}: has no masks; train without them")
        self.split = split
        self.seed = seed
        self.with_masks = with_masks
        self._augment = None if augment is None else build_augment(augment, label_maps=split.has_label_maps)

    def __len__(self) -> int:
        return len(self.split.records)

    def key(self, index: int) -> str:
        """The name of an image in its data set."""
        return str(self.split.records[index].image_id)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        record = self.split.records[index]
        image = read_image(record.path, (record.height, record.width))
        if tuple(image.shape[1:]) != (record.height, record.width):
            source = record.source or self.split.source
            raise UserError(
                f"{record.path}: is {image.shape[2]}×{image.shape[1]}, but {source} says "
                f"{record.width}×{record.height}; correct the size there or restore the image"
            )
        target = self._target(record)
        if self._augment is not None:
            draw = mix_seed(self.seed, epoch, index)
            image, target = augment_seeded(self._augment, image, target, draw)
            target["view"] = torch.tensor(draw)
        target["index"] = torch.tensor(index)
        return image, target

    def _target(self, record: Record) -> dict[str, Tensor]:
        if record.label_map is not None:
            labels_HW = read_labels(record.label_map)
            if labels_HW.shape != (record.height, record.width):
                raise UserError(f"{record.label_map.path}: has changed since its header was read; restore it")
            return {"semantic": torch.from_numpy(labels_HW)}
        kept_K = ~record.ignore_K
        target = {
            "boxes": torch.from_numpy(record.boxes_K4[kept_K]),
            "labels": torch.from_numpy(record.labels_K[kept_K]),
        }
        if self.with_masks:
            size = (record.height, record.width)
            masks_KHW = np.zeros((int(kept_K.sum()), *size), np.bool_)
            kept = compress(record.masks or (), kept_K)
            for mask_HW, segmentation in zip(masks_KHW, kept, strict=True):
                mask_HW[:] = decode_mask(segmentation, *size)
            target["masks"] = torch.from_numpy(masks_KHW)
        return target


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Lists of images and targets: images differ in size, and the model pads them."""
    return [image for image, _ in samples], [target for _, target in samples]


class _Loader(DataLoader[Any]):
    """A DataLoader whose workers' user errors arrive as the one line that they are."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            line = str(error).strip().splitlines()[-1]
            raise UserError(line.split("UserError: ", 1)[-1]) from None


def make_loader(
    dataset: Dataset[Sample], batches: int | Sampler[Any] | Sequence[Any], workers: int = 0
) -> DataLoader[Any]:
    """Batches of a dataset, as :func:`collate` makes them.

    Args:
        batches: a batch size (every image once, in order), or a batch sampler that yields lists of indices or
            of ``(epoch, index)``.
        workers: processes that decode and augment; 0 does it in this one.
    """
    sequential = isinstance(batches, int)
    workers = workers if _can_start_processes() else 0
    return _Loader(
        dataset,
        batch_size=cast(int, batches) if sequential else 1,
        batch_sampler=None if sequential else cast(Any, batches),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_one_thread,
    )


def _can_start_processes() -> bool:
    """Whether worker processes would not run the user's script anew.

    With the start methods spawn and forkserver they import it, and without a guard they end up here again.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    # The first of all is the default; asking for the method itself would fix it for the user's program.
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if script is None or method == "fork":
        return True
    try:
        guarded = "__name__" in Path(script).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    if not guarded:
        warnings.warn(
            f'{script} has no `if __name__ == "__main__":`, which worker processes need: images are loaded in '
            "this process",
            stacklevel=3,
        )
    return guarded


def _one_thread(worker: int) -> None:
    # As many workers as cores, each with as many threads, would stand in their own way.
    torch.set_num_threads(1)
