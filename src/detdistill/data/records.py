"""The common record: what every annotation format becomes, and what is said about bad annotations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from detdistill.data.packed import Packed

UNLABELED = 255  # in label maps: a pixel without a class


@dataclass(frozen=True, slots=True)
class LabelCode:
    """What the numbers in label maps mean.

    Attributes:
        classes_256: uint8; by number, the label, or 255 where it is none.
        declared_256: bool; the numbers that may occur. Others are refused.
    """

    classes_256: NDArray[np.uint8]
    declared_256: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LabelMap:
    """The class of each pixel, in an image of one channel; of a palette its numbers count, not its colors.

    Attributes:
        path: the file.
        code: what its numbers mean; shared by a split's maps.
    """

    path: Path
    code: LabelCode


@dataclass(frozen=True, slots=True)
class Record:
    """One labeled image; K objects, none where there is a label map instead.

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
        source: the file that says so, where it is not ``Split.source`` but one of the image's own.
    """

    image_id: int | str
    path: Path
    height: int
    width: int
    boxes_K4: NDArray[np.float32]
    labels_K: NDArray[np.int64]
    ignore_K: NDArray[np.bool_]
    areas_K: NDArray[np.float32]
    masks: Sequence[Any] | None = None
    label_map: LabelMap | None = None
    source: Path | None = None


class Masks(Sequence[Any]):
    """The segmentations of objects, kept as JSON and decoded when asked for; None for an object without."""

    __slots__ = ("packed",)

    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    @classmethod
    def pack(cls, segmentations: Sequence[Any]) -> Masks:
        """COCO segmentations, None for an object without."""
        return cls(Packed.pack([b"" if mask is None else encode_segmentation(mask) for mask in segmentations]))

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, place: int) -> Any:  # type: ignore[override]
        return self._decoded(self.packed[place])

    def __iter__(self) -> Iterator[Any]:
        return map(self._decoded, self.packed)

    def take(self, places_M: NDArray[np.int64] | NDArray[np.bool_]) -> Masks:
        """The masks at these places."""
        return Masks(self.packed.take(places_M))

    def view(self, start: int, end: int) -> Masks:
        """Those from ``start`` to before ``end``, with nothing copied."""
        packed = self.packed
        return Masks(Packed(packed.blob, packed.starts_N[start:end], packed.ends_N[start:end]))

    @property
    def missing_N(self) -> NDArray[np.bool_]:
        """Which objects have none."""
        return self.packed.lengths_N == 0

    @staticmethod
    def _decoded(text: bytes) -> Any:
        return msgspec.json.decode(text) if text else None


def encode_id(image_id: int | str) -> bytes:
    """An image id as JSON."""
    return b"%d" % image_id if type(image_id) is int else json.dumps(image_id).encode()


def encode_segmentation(segmentation: Any) -> bytes:
    """A COCO segmentation as JSON."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
        segmentation = {**segmentation, "counts": segmentation["counts"].decode("ascii")}
    return msgspec.json.encode(segmentation)


@dataclass(frozen=True, slots=True, eq=False)
class Records(Sequence[Record]):
    """The records of a split as a few large arrays; ``records[i]`` makes the :class:`Record` of an image.

    N images with M objects, those of one image side by side. No Python object stays for an image or an
    object, so that loader workers share the pages with the process that forked them. Read only.

    Attributes:
        ids: image ids as JSON.
        paths: image files.
        heights_N, widths_N: int64 pixels.
        firsts: int64 (N + 1,): image i has the objects from ``firsts[i]`` to before ``firsts[i + 1]``.
        boxes_M4, labels_M, ignore_M, areas_M: as in :class:`Record`.
        masks: of all objects, or None where the split has none.
        label_maps, codes, codes_N: files, what their numbers mean, and which of ``codes`` is each file's.
        sources: the annotation file of each image; empty where it is the split's.
    """

    ids: Packed
    paths: Packed
    heights_N: NDArray[np.int64]
    widths_N: NDArray[np.int64]
    firsts: NDArray[np.int64]
    boxes_M4: NDArray[np.float32]
    labels_M: NDArray[np.int64]
    ignore_M: NDArray[np.bool_]
    areas_M: NDArray[np.float32]
    masks: Masks | None = None
    label_maps: Packed | None = None
    codes: tuple[LabelCode, ...] = ()
    codes_N: NDArray[np.int64] | None = None
    sources: Packed | None = None

    @classmethod
    def pack(cls, records: Sequence[Record]) -> Records:
        """Records of single images in one; those with masks stay so only where all have them."""
        if isinstance(records, Records):
            return records
        counts_N = np.array([len(record.labels_K) for record in records], np.int64)
        masks = None
        if records and all(record.masks is not None for record in records):
            masks = Masks.pack([mask for record in records for mask in record.masks or ()])
        maps = [record.label_map for record in records if record.label_map is not None]
        codes = {id(label_map.code): label_map.code for label_map in maps}
        places = {key: place for place, key in enumerate(codes)}
        has_maps = bool(maps) and len(maps) == len(records)
        sources = ["" if record.source is None else str(record.source) for record in records]
        return cls(
            ids=Packed.pack([encode_id(record.image_id) for record in records]),
            paths=Packed.pack_texts(str(record.path) for record in records),
            heights_N=np.array([record.height for record in records], np.int64),
            widths_N=np.array([record.width for record in records], np.int64),
            firsts=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_N)]),
            boxes_M4=np.concatenate([np.zeros((0, 4), np.float32), *(r.boxes_K4 for r in records)]),
            labels_M=np.concatenate([np.zeros(0, np.int64), *(r.labels_K for r in records)]),
            ignore_M=np.concatenate([np.zeros(0, np.bool_), *(r.ignore_K for r in records)]),
            areas_M=np.concatenate([np.zeros(0, np.float32), *(r.areas_K for r in records)]),
            masks=masks,
            label_maps=Packed.pack_texts(str(label_map.path) for label_map in maps) if has_maps else None,
            codes=tuple(codes.values()) if has_maps else (),
            codes_N=np.array([places[id(m.code)] for m in maps], np.int64) if has_maps else None,
            sources=Packed.pack_texts(sources) if any(sources) else None,
        )

    def __len__(self) -> int:
        return len(self.heights_N)

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> Records: ...

    def __getitem__(self, place: int | slice) -> Record | Records:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        if not -len(self) <= place < len(self):
            raise IndexError(f"record {place} of {len(self)}")
        i = place % len(self)
        start, end = int(self.firsts[i]), int(self.firsts[i + 1])
        label_map = None
        if self.label_maps is not None and self.codes_N is not None:
            label_map = LabelMap(Path(self.label_maps.text(i)), self.codes[self.codes_N[i]])
        source = "" if self.sources is None else self.sources.text(i)
        return Record(
            image_id=self.image_id(i),
            path=self.path(i),
            height=int(self.heights_N[i]),
            width=int(self.widths_N[i]),
            boxes_K4=self.boxes_M4[start:end],
            labels_K=self.labels_M[start:end],
            ignore_K=self.ignore_M[start:end],
            areas_K=self.areas_M[start:end],
            masks=None if self.masks is None else self.masks.view(start, end),
            label_map=label_map,
            source=Path(source) if source else None,
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def image_id(self, place: int) -> int | str:
        """The id of one image."""
        image_id: int | str = json.loads(self.ids[place])
        return image_id

    def path(self, place: int) -> Path:
        """The file of one image."""
        return Path(self.paths.text(place))

    @property
    def counts_N(self) -> NDArray[np.int64]:
        """Objects of each image."""
        return np.diff(self.firsts)

    @property
    def images_M(self) -> NDArray[np.int64]:
        """The image of each object, by its place."""
        return np.repeat(np.arange(len(self)), self.counts_N)

    def take(self, images: NDArray[np.int64] | Sequence[int]) -> Records:
        """The images at these places, in this order."""
        places = np.asarray(images, np.int64)
        counts = self.counts_N[places]
        firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        # Each image's objects, counted on from its first one.
        objects_M = np.arange(firsts[-1]) + np.repeat(self.firsts[:-1][places] - firsts[:-1], counts)
        return replace(
            self._with_objects(objects_M, firsts),
            ids=self.ids.take(places),
            paths=self.paths.take(places),
            heights_N=self.heights_N[places],
            widths_N=self.widths_N[places],
            label_maps=None if self.label_maps is None else self.label_maps.take(places),
            codes_N=None if self.codes_N is None else self.codes_N[places],
            sources=None if self.sources is None else self.sources.take(places),
        )

    def keep(self, kept_M: NDArray[np.bool_]) -> Records:
        """All images, with only those of their objects that are marked."""
        if kept_M.all():
            return self
        counts_N = np.bincount(self.images_M[kept_M], minlength=len(self))
        return self._with_objects(kept_M, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_N)]))

    def _with_objects(
        self, objects: NDArray[np.int64] | NDArray[np.bool_], firsts: NDArray[np.int64]
    ) -> Records:
        return replace(
            self,
            firsts=firsts,
            boxes_M4=self.boxes_M4[objects],
            labels_M=self.labels_M[objects],
            ignore_M=self.ignore_M[objects],
            areas_M=self.areas_M[objects],
            masks=None if self.masks is None else self.masks.take(objects),
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with the data: one line, with the file and how to fix it.

    ``error`` stops a run before it starts; ``warning`` means that the annotation was dropped or clipped.
    """

    severity: Literal["error", "warning"]
    kind: str  # short and countable: "zero-size box", "missing image", …
    file: Path
    message: str
    fix: str

    def __str__(self) -> str:
        line = f"{self.severity}: {self.file}: {self.message}; {self.fix}"
        return line.encode("utf-8", "backslashreplace").decode()  # names in JSON may be no Unicode


@dataclass(frozen=True, slots=True)
class Split:
    """The usable records of one part (train, val, test) of a dataset, and what was wrong with the rest.

    A list of :class:`Record` given for ``records`` is packed.
    """

    name: str
    records: Records
    classes: tuple[str, ...]
    category_ids: tuple[int | str, ...] | None  # the source's, in the order of ``classes``; None: it has none
    source: Path  # the annotation file or folder
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "records", Records.pack(self.records))

    def __len__(self) -> int:
        return len(self.records)

    def evenly(self, count: int) -> Split:
        """The split with so many of its images, evenly spread over it; all where it has no more."""
        total = len(self)
        if count >= total:
            return self
        return replace(self, records=self.records.take(np.arange(count) * total // count))

    @property
    def numeric_ids(self) -> tuple[int, ...] | None:
        """The category ids as numbers, also those that the source writes as text."""
        ids = self.category_ids
        return None if ids is None else tuple(i if isinstance(i, int) else int(float(i)) for i in ids)

    @property
    def has_masks(self) -> bool:
        """Whether every record has masks."""
        return self.records.masks is not None

    @property
    def has_label_maps(self) -> bool:
        """Whether it is for semantic segmentation."""
        return self.records.label_maps is not None

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    def warning_counts(self) -> Counter[str]:
        """How often each kind of warning was found."""
        return Counter(finding.kind for finding in self.findings if finding.severity == "warning")
