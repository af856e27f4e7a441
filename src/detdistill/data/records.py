"""The common record: what every annotation format becomes, and what is said about bad annotations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

UNLABELLED = 255  # in label maps: a pixel without a class


@dataclass(frozen=True, slots=True)
class LabelCode:
    """What the numbers in label maps mean.

    Attributes:
        classes_256: uint8; by number, the label, or 255 where it is none.
        declared_256: bool; the numbers that may occur. Others are read as 255, and the doctor reports them.
    """

    classes_256: NDArray[np.uint8]
    declared_256: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LabelMap:
    """The class of each pixel, in an image of one channel; of a palette its numbers count, not its colours.

    Attributes:
        path: the file.
        code: what its numbers mean; shared by a split's maps.
    """

    path: Path
    code: LabelCode


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled image; K objects, none where there is a label map instead.

    Attributes:
        image_id: the id the annotation file gave it (COCO integer, VOC or YOLO file stem).
        path: the image file.
        height, width: pixels, as the annotation declares them (or as the file header says).
        boxes_K4: float32 xyxy in pixels of the original image; inside the image, never empty.
        labels_K: int64 index into ``Split.classes`` (0-based, no background).
        ignore_K: bool; COCO ``iscrowd`` or VOC ``difficult``: neither hit nor miss in evaluation, no
            target in training.
        areas_K: float32 area in pixels² (COCO's own ``area``, else that of the box).
        masks: per object a COCO segmentation (list of polygons, or RLE dict), or None if the source has none.
        label_map: of semantic segmentation, the class of each pixel.
    """

    image_id: int | str
    path: Path
    height: int
    width: int
    boxes_K4: NDArray[np.float32]
    labels_K: NDArray[np.int64]
    ignore_K: NDArray[np.bool_]
    areas_K: NDArray[np.float32]
    masks: tuple[Any, ...] | None = None
    label_map: LabelMap | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with the data: one line, with the file and the way to mend it.

    ``error`` stops a run before it starts; ``warning`` means that the annotation was dropped or clipped.
    """

    severity: Literal["error", "warning"]
    kind: str  # short and countable: "zero-size box", "missing image", …
    file: Path
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.file}: {self.message}; {self.fix}"


@dataclass(frozen=True, slots=True)
class Split:
    """The usable records of one part (train, val, test) of a dataset, and what was wrong with the rest."""

    name: str
    records: list[Record]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...] | None  # the source's own, in the order of ``classes``; None: it has none
    source: Path  # the annotation file or folder
    findings: list[Finding] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def evenly(self, count: int) -> Split:
        """The split with so many of its images, evenly spread over it; all where it has no more."""
        total = len(self)
        if count >= total:
            return self
        return replace(self, records=[self.records[i * total // count] for i in range(count)])

    @property
    def has_masks(self) -> bool:
        """Whether every record has masks."""
        return all(record.masks is not None for record in self.records)

    @property
    def has_label_maps(self) -> bool:
        """Whether it is for semantic segmentation."""
        return any(record.label_map is not None for record in self.records)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    def warning_counts(self) -> Counter[str]:
        """How often each kind of warning was found."""
        return Counter(finding.kind for finding in self.findings if finding.severity == "warning")
