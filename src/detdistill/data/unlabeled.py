"""Images without labels, ``data.unlabeled``: what a teacher sees in them teaches, too."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detdistill.data.cleaning import FileIndex
from detdistill.data.formats.coco import image_files
from detdistill.data.formats.digits import digits_root
from detdistill.data.formats.layout import ListedImages, is_file
from detdistill.data.images import find_images, read_image
from detdistill.data.loading import Sample
from detdistill.data.records import UNLABELED
from detdistill.data.text import read_lines
from detdistill.data.transforms import augment_seeded, build_augment
from detdistill.errors import UserError
from detdistill.recipe import AugmentConfig, DataConfig
from detdistill.seeding import mix_seed


def find_unlabeled(config: DataConfig) -> list[Path]:
    """The images of ``data.unlabeled``, sorted and each once.

    A folder is searched with its subfolders; a .txt file lists images, one to a line, from its own folder or
    from ``data.root``; of a COCO .json the images are taken and the annotations, if there are any, left alone.
    What is given is a path from ``data.root``, or any path.

    Raises:
        UserError: there is no such folder or file, it lists an image that is missing, or it holds none.
    """
    assert config.unlabeled is not None
    root = digits_root(config) if config.format == "digits" else config.root
    assert root is not None, "DataConfig refuses data without a root"
    source = Path(config.unlabeled).expanduser()
    source = root / source if os.path.exists(root / source) else source  # noqa: PTH110 - does not raise
    if not os.path.exists(source):  # noqa: PTH110
        raise UserError(f"data.unlabeled: no such folder or file {config.unlabeled!r}, nor in {root}")
    if source.suffix == ".json":
        files = image_files(source, config.images, root)
    elif source.suffix == ".txt":
        listed = ListedImages(root if root.is_dir() else root.parent, FileIndex())
        entries = read_lines(source)
        files = [listed.find(entry, source.parent) or source.parent / entry for entry in entries]
    else:
        files = find_images(source)
    files = sorted(set(files))
    missing = [file for file in files if not is_file(file)]
    if missing or not files:
        what = f"lists {missing[0]}, which is missing ({len(missing)} are)" if missing else "lists no image"
        raise UserError(f"data.unlabeled: {source} {what}; correct it")
    return files


class UnlabeledImages(Dataset[Sample]):
    """Images as :class:`~detdistill.data.loading.DetectionDataset` gives them, with nothing in their targets.

    Args:
        files: the images.
        augment: as for the labeled ones.
        seed: of the augmentation.
        label_maps: the augmentation is one for label maps.

    Raises:
        UserError: on indexing, an image cannot be decoded.
    """

    def __init__(self, files: list[Path], augment: AugmentConfig, seed: int, *, label_maps: bool) -> None:
        self.files, self.seed, self.label_maps = files, seed, label_maps
        self._augment = build_augment(augment, label_maps=label_maps)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        """The name of an image in its data set."""
        return str(self.files[index])

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        image = read_image(self.files[index])
        draw = mix_seed(self.seed, epoch, index)
        image, _ = augment_seeded(self._augment, image, self._nothing(image), draw)
        return image, {"index": torch.tensor(index), "view": torch.tensor(draw)}

    def _nothing(self, image: Tensor) -> dict[str, Tensor]:
        """The target of an image in which nothing is known, as augmentation wants it."""
        if self.label_maps:
            return {"semantic": torch.full(image.shape[1:], UNLABELED, dtype=torch.uint8)}
        return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
