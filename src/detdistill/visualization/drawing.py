"""Detections and label maps drawn on an image: the one drawing of `predict`, galleries and reports."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from detdistill.data.records import UNLABELED
from detdistill.text import printable

CROWD = 30  # boxes from which their labels would hide the image
LONGEST = 4096  # pixels to which a side is enlarged at most
MASK_OPACITY = 0.4
NOTE_COLOR = (34, 37, 43)
PADDING = 2  # pixels around a label's text
LONGEST_NAME = 40  # characters


class Rectangle(NamedTuple):
    """Pixels, both corners included."""

    left: int
    top: int
    right: int
    bottom: int

    def meets(self, other: Rectangle) -> bool:
        """Whether the two have a pixel in common."""
        return (
            self.left <= other.right
            and other.left <= self.right
            and self.top <= other.bottom
            and other.top <= self.bottom
        )


def draw_detections(
    image_3HW: Tensor,
    detections: Mapping[str, Tensor],
    classes: Sequence[str],
    threshold: float = 0.3,
    shortest: int = 0,
) -> Tensor:
    """Draw masks, where there are any, and boxes with class and score, or a label map.

    Stronger detections are drawn over weaker ones, smaller boxes over larger ones of the same score. No label
    covers another: a label moves around its box, and is left out where all places are taken by labels of
    stronger boxes, or where there are :data:`CROWD` boxes or more. A note in the picture counts those left out.
    Boxes that are empty or not finite are left out. A class keeps its color.

    Args:
        image_3HW: uint8.
        detections: ``boxes`` (K, 4) xyxy in pixels, ``labels`` (K,), and ``scores`` (K,) of what was found;
            perhaps ``masks`` (K, H, W) or (K, 1, H, W), bool or probabilities. Or ``semantic`` (H, W) alone.
        classes: names by label.
        threshold: least score that is drawn.
        shortest: images whose short side has fewer pixels are enlarged by a whole factor.

    Returns:
        (3, H', W') uint8 on the CPU.
    """
    image = image_3HW.cpu()
    enlarged = min(-(-shortest // min(image.shape[-2:])), LONGEST // max(image.shape[-2:]))
    factor = max(1, enlarged)
    if factor > 1:
        image = F.interpolate(image[None], scale_factor=factor, mode="nearest")[0]
    if "semantic" in detections:
        return _painted(image, _enlarged(detections["semantic"].cpu(), factor))
    boxes_K4, labels_K = detections["boxes"].cpu().double(), detections["labels"].cpu()
    scores_K = detections["scores"].cpu() if "scores" in detections else None
    strongest_first = _order(boxes_K4, scores_K, threshold)
    if not strongest_first:
        return image
    labels = labels_K[strongest_first].tolist()
    colors = [_color(label) for label in labels]
    if "masks" in detections:
        masks_KHW = _pixels(detections["masks"].cpu()[strongest_first], *image_3HW.shape[-2:])
        image = _with_masks(image, _enlarged(masks_KHW, factor), colors)
    height, width = image.shape[-2:]
    # Far outside the image one place is as good as another, and Pillow counts in 32 bits.
    boxes = (boxes_K4[strongest_first] * factor).clamp(-width - height, width + height).long().tolist()
    names = [" ".join(printable(classes[label]).split()) for label in labels]  # on one line
    scores = [""] * len(labels)
    if scores_K is not None:
        scores = [f" {score:.2f}" for score in scores_K[strongest_first].tolist()]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    _draw_boxes(picture, boxes, colors, names, scores)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def class_color(label: int) -> str:
    """The class's color in pictures, as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*_color(label))


def place_labels(
    boxes: Sequence[Sequence[int]],
    sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    taken: Sequence[Rectangle] = (),
) -> list[Rectangle | None]:
    """Where each box's label goes: at a corner of its box, inside the image, where no other label is.

    Args:
        boxes: xyxy in pixels; the first ones choose first.
        sizes: (width, height) of each label.
        image_size: (width, height).
        taken: rectangles that stay free.

    Returns:
        For each box its label's rectangle; None: there is no free place for it.
    """
    placed: list[Rectangle | None] = []
    for box, size in zip(boxes, sizes, strict=True):
        used = [*taken, *filter(None, placed)]
        places = _places(box, size, image_size)
        placed.append(next((one for one in places if not any(map(one.meets, used))), None))
    return placed


def _places(box: Sequence[int], size: tuple[int, int], image_size: tuple[int, int]) -> list[Rectangle]:
    """Outside and inside the box at its upper, then at its lower edge; at its left, then at its right side."""
    x1, y1, x2, y2 = box
    (width, height), (image_width, image_height) = size, image_size
    if width > image_width or height > image_height:
        return []
    corners = [(x, y) for x in (x1, x2 - width + 1) for y in (y1 - height, y1, y2 + 1, y2 - height + 1)]
    moved_inside = (
        (min(max(x, 0), image_width - width), min(max(y, 0), image_height - height)) for x, y in corners
    )
    return [Rectangle(x, y, x + width - 1, y + height - 1) for x, y in moved_inside]


def _order(boxes_K4: Tensor, scores_K: Tensor | None, threshold: float) -> list[int]:
    """The detections to draw, strongest first; of equal ones, and of ground truth, smallest first."""
    sides_K2 = boxes_K4[:, 2:] - boxes_K4[:, :2]
    keep_K = boxes_K4.isfinite().all(dim=1) & (sides_K2 > 0).all(dim=1)
    if scores_K is not None:
        keep_K &= scores_K >= threshold
    areas = sides_K2.prod(dim=1).tolist()
    scores = [0.0] * len(areas) if scores_K is None else scores_K.tolist()
    return sorted(keep_K.nonzero().flatten().tolist(), key=lambda k: (-scores[k], areas[k]))


def _draw_boxes(
    picture: Image.Image,
    boxes: Sequence[Sequence[int]],
    colors: Sequence[tuple[int, int, int]],
    names: Sequence[str],
    scores: Sequence[str],
) -> None:
    """Draw on the picture: all boxes, then all labels; each list is strongest first."""
    draw = ImageDraw.Draw(picture)
    size = max(12, min(picture.size) // 40)
    font = _font(size)
    for box, color in reversed(list(zip(boxes, colors, strict=True))):
        draw.rectangle(box, outline=color, width=max(2, size // 7))
    room = picture.width - 2 * PADDING
    labeled = len(boxes) if len(boxes) < CROWD else 0
    texts = [_fitting(name, score, font, room) for name, score in zip(names[:labeled], scores, strict=False)]
    sizes = [_text_size(text, font) for text in texts]
    placed = place_labels(boxes[:labeled], sizes, picture.size)
    if labeled < len(boxes) or None in placed:
        # The note takes a place of its own, and the labels are placed again around it: it may count more then.
        width, height = _text_size(_fitting(_note(len(boxes)), "", font, room), font)
        note = Rectangle(0, picture.height - height, width - 1, picture.height - 1)
        placed = place_labels(boxes[:labeled], sizes, picture.size, [note])
        left_out = len(boxes) - labeled + placed.count(None)
        _draw_label(draw, note, _fitting(_note(left_out), "", font, room), font, NOTE_COLOR)
    for rectangle, text, color in zip(placed, texts, colors, strict=False):
        if rectangle is not None:
            _draw_label(draw, rectangle, text, font, color)


def _note(count: int) -> str:
    return f"{count} label{'s' * (count != 1)} left out"


def _draw_label(
    draw: ImageDraw.ImageDraw,
    rectangle: Rectangle,
    text: str,
    font: ImageFont.FreeTypeFont,
    color: tuple[int, int, int],
) -> None:
    draw.rectangle(rectangle, fill=color)
    draw.text((rectangle.left + PADDING, rectangle.top + PADDING), text, fill="white", font=font)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _text_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """(width, height) of a label; all texts of a font are as high."""
    return round(font.getlength(text)) + 2 * PADDING + 1, sum(font.getmetrics()) + 2 * PADDING


def _fitting(name: str, score: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Name and score in at most so many pixels, where the name can be cut to that."""
    text, kept = name + score, name[:LONGEST_NAME]
    while kept and (len(text) > LONGEST_NAME + len(score) or font.getlength(text) + 1 > width):
        kept = kept[:-1]
        text = f"{kept}…{score}"
    return text


def _with_masks(image_3HW: Tensor, masks_KHW: Tensor, colors: Sequence[tuple[int, int, int]]) -> Tensor:
    """Each mask's pixels mixed with its color; where masks overlap, with that of the first of them."""
    paint_3HW = image_3HW.clone()
    for mask_HW, color in reversed(list(zip(masks_KHW, colors, strict=True))):
        paint_3HW[:, mask_HW] = torch.tensor(color, dtype=torch.uint8)[:, None]
    return (image_3HW * (1 - MASK_OPACITY) + paint_3HW * MASK_OPACITY).round().to(torch.uint8)


def _painted(image_3HW: Tensor, labels_HW: Tensor) -> Tensor:
    """The image with each pixel half in the color of its class; ignored ones as they are."""
    palette_L3 = torch.tensor([_color(label) for label in range(UNLABELED + 1)])
    labels_HW = labels_HW.long()
    mixed_3HW = (image_3HW.int() + palette_L3[labels_HW].permute(2, 0, 1)) // 2
    return torch.where(labels_HW == UNLABELED, image_3HW, mixed_3HW.to(torch.uint8))


def _enlarged(maps: Tensor, factor: int) -> Tensor:
    """The last two dimensions, each pixel as a square of so many."""
    return maps.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def _pixels(masks: Tensor, height: int, width: int) -> Tensor:
    """(K, H, W) bool."""
    masks_KHW = masks.reshape(-1, height, width)
    return masks_KHW > 0.5 if masks_KHW.is_floating_point() else masks_KHW.bool()


def _color(label: int) -> tuple[int, int, int]:
    """A color of the class's own, dark enough for white text: hues apart by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb((0.6 + label * 0.61803) % 1, 0.9, 0.7)
    return round(255 * red), round(255 * green), round(255 * blue)
