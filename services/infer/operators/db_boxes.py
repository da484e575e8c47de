"""Operation `db_boxes`: text boxes from a detector's probability map (differentiable binarization, DB).

    map ──threshold, dilate──> blobs ──contours──> rectangles ──mean probability inside──> kept ──grown──> boxes

M. Liao et al., Real-time Scene Text Detection with Differentiable Binarization, AAAI 2020, section 3.4. A rectangle is
grown by area * unclip_ratio / perimeter, because text is shrunk in the map. Order of corners, rounding and filters are
as in the package `rapidocr-onnxruntime`; a test compares the boxes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from services.infer.operators import extras
from services.infer.operators.offset_polygon import offset_polygon
from services.infer.operators.operation import OperationContext, Results, Unfit, map_rows, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor

# In pixels of the map: smaller rectangles are noise. A grown rectangle must have two more.
_MIN_SIDE = 3
# In pixels of the image: boxes whose first corners differ by less in height are on one line of text.
_SAME_LINE = 10
_MAX_SIDE = 1 << 15
# OpenCV keeps 300 bytes for each contour before the first is looked at. A map with more of them is noise, not text.
_CONTOURS_PER_CANDIDATE = 100
# Blobs' bounds may cover the map so often: longer their means do not take. 50 lines of diagonal text cover it 20 times.
_MAX_COVER = 64

_EMPTY: tuple[Tensor, Tensor] = (np.empty((0, 4, 2), np.float32), np.empty(0, np.float32))


class DbBoxesParameters(Parameters):
    """Parameters of `db_boxes`."""

    threshold: float = Field(0.3, gt=0, lt=1)
    """Pixels of the map with a higher probability are text."""
    box_threshold: float = Field(0.5, ge=0, le=1)
    """Least mean probability of a box."""
    unclip_ratio: float = Field(1.6, gt=0, le=10)
    max_candidates: int = Field(1000, ge=1, le=100_000)
    dilate: bool = True
    score: Literal["fast", "slow"] = "fast"
    """fast: the mean inside the rectangle; slow: the mean inside the contour."""
    order: Literal["reading", "found"] = "reading"


class DbBoxes:
    """FP32 [1, height, width] probability map, and the size of its image, to corners in the image and scores."""

    is_batched = True
    only_computes = False
    inputs = (
        spec("probability", "FP32", 1, -1, -1, ragged=True),
        spec("size", "INT32", 2, optional=True),
    )
    outputs = (spec("boxes", "FP32", -1, 4, 2, ragged=True), spec("scores", "FP32", -1, ragged=True))

    def __init__(self, parameters: DbBoxesParameters, context: OperationContext) -> None:
        self._cv2 = extras.opencv()
        self._parameters, self._threads = parameters, context.threads
        self._kernel = np.ones((2, 2), np.uint8)

    def run(self, inputs: Mapping[str, Value]) -> Results:
        maps = [row[0] for row in rows(inputs["probability"])]
        sizes = [tuple(size.tolist()) for size in rows(inputs["size"])] if "size" in inputs else [m.shape for m in maps]
        found, unfit = map_rows(list(zip(maps, sizes, strict=True)), self._boxes, self._threads, _EMPTY)
        return Results({"boxes": [boxes for boxes, _ in found], "scores": [scores for _, scores in found]}, unfit)

    def example(self) -> Mapping[str, Value]:
        probability = np.zeros((1, 32, 32), np.float32)
        probability[0, 8:20, 4:28] = 0.9
        return {"probability": [probability]}

    def _boxes(self, map_and_size: tuple[Tensor, tuple[int, int]]) -> tuple[Tensor, Tensor]:
        probability, (height, width) = map_and_size
        if not probability.size or max(probability.shape) > _MAX_SIDE:
            raise Unfit(
                f"input 'probability' is {list(probability.shape)}: expected 1 to {_MAX_SIDE} in height and width"
            )
        if height < 1 or width < 1:
            raise Unfit(f"input 'size' is [{height},{width}]: expected the image's height and width")
        cv2, parameters = self._cv2, self._parameters
        mask = (probability > parameters.threshold).astype(np.uint8)
        if parameters.dilate:
            mask = cv2.dilate(mask, self._kernel)
        limit = _CONTOURS_PER_CANDIDATE * parameters.max_candidates
        if (count := contours_at_most(mask)) > limit:
            raise Unfit(
                f"input 'probability' has about {count} blobs and holes, more than {limit}, "
                f"{_CONTOURS_PER_CANDIDATE} times max_candidates: it is noise"
            )
        contours = cv2.findContours(mask * np.uint8(255), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[-2]
        boxes: list[tuple[Tensor, float]] = []
        covered = 0
        for contour in contours[: parameters.max_candidates]:
            covered += math.prod(cv2.boundingRect(contour)[2:])
            if covered > _MAX_COVER * probability.size:
                raise Unfit(f"input 'probability' has blobs that cover it {_MAX_COVER} times over: it is no text")
            found = self._box(contour, probability, height, width)
            if found is not None:
                boxes.append(found)
        if parameters.order == "reading":
            boxes = _in_reading_order(boxes)
        if not boxes:
            return _EMPTY
        return np.stack([box for box, _ in boxes]), np.array([score for _, score in boxes], np.float32)

    def _box(self, contour: Tensor, probability: Tensor, height: int, width: int) -> tuple[Tensor, float] | None:
        """Return one box in the image, and its score; None for a box that is too small or improbable."""
        corners, side = self._rectangle(contour)
        if side < _MIN_SIDE:
            return None
        inside = corners if self._parameters.score == "fast" else contour.reshape(-1, 2).astype(np.float32)
        score = self._mean(probability, inside)
        if score < self._parameters.box_threshold:
            return None
        grown = offset_polygon(corners, _distance(corners, self._parameters.unclip_ratio))
        if not len(grown):
            return None
        corners, side = self._rectangle(grown.reshape(-1, 1, 2))
        if side < _MIN_SIDE + 2:
            return None
        rows, columns = probability.shape
        corners[:, 0] = np.clip(np.round(corners[:, 0] / columns * width), 0, width)
        corners[:, 1] = np.clip(np.round(corners[:, 1] / rows * height), 0, height)
        box = _clockwise(corners)
        box[:, 0] = box[:, 0].clip(0, width - 1)
        box[:, 1] = box[:, 1].clip(0, height - 1)
        sides = int(np.linalg.norm(box[0] - box[1])), int(np.linalg.norm(box[0] - box[3]))
        return (box, score) if min(sides) > _MIN_SIDE else None

    def _rectangle(self, points: Tensor) -> tuple[Tensor, float]:
        """Return the smallest rectangle around points: corners, clockwise from the top left, and the shorter side."""
        around: Any = self._cv2.minAreaRect(points)
        corners = sorted(self._cv2.boxPoints(around), key=lambda corner: corner[0])
        top_left, bottom_left = corners[:2] if corners[1][1] > corners[0][1] else corners[1::-1]
        top_right, bottom_right = corners[2:] if corners[3][1] > corners[2][1] else corners[:1:-1]
        return np.array([top_left, top_right, bottom_right, bottom_left]), min(around[1])

    def _mean(self, probability: Tensor, corners: Tensor) -> float:
        """Return the mean probability in a polygon."""
        rows, columns = probability.shape
        left, right = (int(np.clip(x, 0, columns - 1)) for x in _bounds(corners[:, 0]))
        top, bottom = (int(np.clip(y, 0, rows - 1)) for y in _bounds(corners[:, 1]))
        mask = np.zeros((bottom - top + 1, right - left + 1), np.uint8)
        inside = (corners - np.array([left, top], np.float32)).astype(np.int32)
        self._cv2.fillPoly(mask, inside[np.newaxis], 1)
        mean: float = self._cv2.mean(probability[top : bottom + 1, left : right + 1], mask)[0]
        return mean


def contours_at_most(mask: Tensor) -> int:
    """Return a number that is not below the number of contours of a mask of 0 and 1, UINT8 [height, width].

    A contour is a blob's or a hole's. Each blob has a pixel with none above it and none to its left. The blobs less the
    holes are a sum over all squares of four pixels (S. Gray, Local properties of binary images in two dimensions, IEEE
    Transactions on Computers C-20, 1971).
    """
    around = np.pad(mask, 1)
    here, above, left = around[1:-1, 1:-1], around[:-2, 1:-1], around[1:-1, :-2]
    tops = np.count_nonzero(here > (above | left | around[:-2, :-2] | around[:-2, 2:]))
    first, last = around[:-1, :-1], around[1:, 1:]
    squares = first + last + around[:-1, 1:] + around[1:, :-1]
    one, three = np.count_nonzero(squares == 1), np.count_nonzero(squares == 3)
    diagonal = np.count_nonzero((squares == 2) & (first == last))
    return int(2 * tops - (one - three - 2 * diagonal) // 4)


def _bounds(values: Tensor) -> tuple[float, float]:
    return float(np.floor(values.min())), float(np.ceil(values.max()))


def _distance(corners: Tensor, ratio: float) -> float:
    """Return the distance by which a polygon is grown: area * ratio / perimeter."""
    points = corners.astype(np.float64)
    following = np.roll(points, -1, axis=0)
    area = abs(float(np.sum(points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]))) / 2
    return area * ratio / float(np.linalg.norm(following - points, axis=1).sum())


def _clockwise(corners: Tensor) -> Tensor:
    """Return top left, top right, bottom right, bottom left; top left is the upper of the two leftmost corners."""
    by_x = corners[np.argsort(corners[:, 0])]
    left, right = by_x[:2], by_x[2:]
    top_left, bottom_left = left[np.argsort(left[:, 1])]
    top_right, bottom_right = right[np.argsort(right[:, 1])]
    return np.array([top_left, top_right, bottom_right, bottom_left], np.float32)


def _in_reading_order(boxes: list[tuple[Tensor, float]]) -> list[tuple[Tensor, float]]:
    """Return the boxes from top to bottom; boxes of one line from left to right."""
    ordered = sorted(boxes, key=lambda scored: (scored[0][0][1], scored[0][0][0]))
    for n in range(1, len(ordered)):
        at = n
        while at and _is_before(ordered[at][0][0], ordered[at - 1][0][0]):
            ordered[at - 1], ordered[at] = ordered[at], ordered[at - 1]
            at -= 1
    return ordered


def _is_before(corner: Tensor, other: Tensor) -> bool:
    return bool(abs(corner[1] - other[1]) < _SAME_LINE and corner[0] < other[0])
