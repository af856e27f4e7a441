"""Pictures of detections for a page: pairs of the same image, as JPEG, within a number of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.io import encode_jpeg
from torchvision.transforms.v2.functional import InterpolationMode, resize

from detdistill.visualization.drawing import draw_detections

# Long side in pixels and JPEG quality, from the first to the first that keeps to the bytes.
SIZES = ((640, 82), (560, 74), (480, 64), (400, 55), (320, 45))
SMALLEST = 320  # short side of a drawing: smaller images are enlarged, so that a label can be read


@dataclass(frozen=True, slots=True)
class Drawing:
    """A JPEG and its size in pixels."""

    jpeg: bytes
    width: int
    height: int


Answer = Mapping[str, Tensor]
Pair = tuple[Drawing, Drawing]


def draw_pairs(
    images: Iterable[tuple[Tensor, Answer, Answer]],
    classes: Sequence[str],
    *,
    threshold: float = 0.3,
    most_bytes: int = 4_000_000,
) -> list[Pair]:
    """Draw two models' answers (or the truth and an answer) on each image.

    Args:
        images: (3, H, W) uint8 and what to draw on each copy, as
            :func:`~detdistill.visualization.drawing.draw_detections` takes it. One at a time is in memory at
            its size.
        classes: names by label.
        threshold: least score that is drawn.
        most_bytes: of all JPEGs together: sizes and qualities fall until they keep to it; when the lowest do
            not, the last pairs are left out.
    """
    small = [_within(SIZES[0][0], *one) for one in images]
    pairs: list[Pair] = []
    for longest, quality in SIZES:
        pairs = []
        for one in small:
            image, *sides = _within(longest, *one)
            drawn = [draw_detections(image, side, classes, threshold, shortest=SMALLEST) for side in sides]
            before, after = (_drawing(picture, quality) for picture in drawn)
            pairs.append((before, after))
        if _bytes(pairs) <= most_bytes:
            return pairs
    while _bytes(pairs) > most_bytes:
        pairs.pop()
    return pairs


def shrunk(file: Path, longest: int = 1600, quality: int = 72) -> Drawing:
    """A picture's file as a JPEG of at most so many pixels a side.

    Raises:
        OSError: it cannot be read as a picture.
    """
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((longest, longest))
    written = BytesIO()
    picture.save(written, "JPEG", quality=quality)
    return Drawing(written.getvalue(), *picture.size)


def _within(longest: int, image: Tensor, *sides: Answer) -> tuple[Tensor, Answer, Answer]:
    """The image at most so large, its boxes with it."""
    height, width = image.shape[-2:]
    factor = longest / max(height, width)
    if factor < 1:
        size = [max(1, round(height * factor)), max(1, round(width * factor))]
        image = resize(image, size, antialias=True)
        sides = tuple(_shrunk_answer(side, factor, size) for side in sides)
    before, after = sides
    return image, before, after


def _shrunk_answer(answer: Answer, factor: float, size: list[int]) -> Answer:
    if "semantic" in answer:
        labels_HW = resize(answer["semantic"][None], size, InterpolationMode.NEAREST)[0]
        return {**answer, "semantic": labels_HW}
    shrunk = {**answer, "boxes": answer["boxes"] * factor}
    if "masks" in answer:
        shrunk["masks"] = resize(answer["masks"], size, InterpolationMode.NEAREST)
    return shrunk


def _drawing(picture_3HW: Tensor, quality: int) -> Drawing:
    height, width = picture_3HW.shape[-2:]
    return Drawing(encode_jpeg(picture_3HW.contiguous(), quality).numpy().tobytes(), width, height)


def _bytes(pairs: Sequence[Pair]) -> int:
    return sum(len(drawing.jpeg) for pair in pairs for drawing in pair)
