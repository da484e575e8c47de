"""Operation `crop_boxes`: boxes cut out of images, as a list of crops with a size of their own.

A quadrilateral is warped to a rectangle: as wide as its longer horizontal side, as high as its longer vertical side.
A crop that is much higher than wide is turned, because it is vertical text. An axis-aligned box is cut. Warping is
OpenCV's (cubic, edges repeated), as in the package `rapidocr-onnxruntime`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from services.infer.operators import extras
from services.infer.operators.operation import OperationContext, Results, Unfit, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor

# OpenCV warps in blocks of 32 x 32 pixels: a crop one pixel high takes as long as one of 32.
_WARPED_SIDE = 32


class CropBoxesParameters(Parameters):
    """Parameters of `crop_boxes`."""

    corners: bool = True
    """Boxes are four corners [4, 2], clockwise from the top left; else [x0, y0, x1, y1]."""
    turn_from: float = Field(1.5, ge=0)
    """Crops at least this many times as high as wide are turned by 90 degrees to the left; 0: no crop is turned."""
    max_boxes: int = Field(1000, ge=1, le=100_000)
    """Limit for all images of a request together."""
    max_pixels: int = Field(40_000_000, ge=1, le=1_000_000_000)
    """Limit for all crops of a request together. Each side of a warped crop counts as 32 at least."""


class CropBoxes:
    """UINT8 images and FP32 boxes, a list for each image, to the crops and the image's index for each crop."""

    is_batched = False
    only_computes = False
    outputs = (spec("crops", "UINT8", -1, -1, 3, ragged=True), spec("row", "INT32"))

    def __init__(self, parameters: CropBoxesParameters, context: OperationContext) -> None:
        self._cv2 = extras.opencv()
        self._parameters, self._threads = parameters, context.threads
        dims = (4, 2) if parameters.corners else (4,)
        self.inputs = (
            spec("image", "UINT8", -1, -1, 3, ragged=True),
            spec("boxes", "FP32", -1, *dims, ragged=True),
        )

    def run(self, inputs: Mapping[str, Value]) -> Results:
        images, boxes = rows(inputs["image"]), rows(inputs["boxes"])
        try:
            crops = self._crops(images, boxes)
        except Unfit as err:
            return Results({"crops": [], "row": np.empty(0, np.int32)}, {0: str(err)})
        row = np.repeat(np.arange(len(images), dtype=np.int32), [len(of_image) for of_image in boxes])
        return Results({"crops": crops, "row": row})

    def example(self) -> Mapping[str, Value]:
        corners = np.array([[[0, 0], [4, 0], [4, 2], [0, 2]]], np.float32)
        boxes = corners if self._parameters.corners else corners[:, ::2].reshape(1, 4)
        return {"image": [np.zeros((4, 6, 3), np.uint8)], "boxes": [boxes]}

    def _crops(self, images: list[Tensor], boxes: list[Tensor]) -> list[Tensor]:
        self._check(images, boxes)
        pairs = [(image, box) for image, of_image in zip(images, boxes, strict=True) for box in of_image]
        sizes = [self._size(image, box) for image, box in pairs]
        least = _WARPED_SIDE if self._parameters.corners else 1
        pixels = sum(max(height, least) * max(width, least) for height, width in sizes)
        if pixels > self._parameters.max_pixels:
            counted = f" (a side counts as {least} at least)" if self._parameters.corners else ""
            raise Unfit(
                f"input 'boxes': crops of {pixels} pixels{counted}, more than max_pixels, {self._parameters.max_pixels}"
            )
        cut = self._warped if self._parameters.corners else self._cut
        return self._threads.map(lambda work: cut(*work[0], work[1]), list(zip(pairs, sizes, strict=True)))

    def _check(self, images: list[Tensor], boxes: list[Tensor]) -> None:
        if len(images) != len(boxes):
            raise Unfit(
                f"input 'boxes' has {len(boxes)} rows, input 'image' {len(images)}: expected one for each image"
            )
        count = sum(map(len, boxes))
        if count > self._parameters.max_boxes:
            raise Unfit(f"input 'boxes': {count} boxes, more than max_boxes, {self._parameters.max_boxes}")
        if not all(np.isfinite(of_image).all() for of_image in boxes):
            raise Unfit("input 'boxes': expected numbers, got NaN or infinite ones")
        if any(not image.size for image in images):
            raise Unfit("input 'image' has no pixels")

    def _size(self, image: Tensor, box: Tensor) -> tuple[int, int]:
        """Return the height and width of a crop. Raises Unfit when the crop has no area."""
        if self._parameters.corners:
            # Callers send any numbers, and squares of large ones overflow FP32.
            box = box.astype(np.float64)
            width = int(max(np.linalg.norm(box[0] - box[1]), np.linalg.norm(box[2] - box[3])))
            height = int(max(np.linalg.norm(box[0] - box[3]), np.linalg.norm(box[1] - box[2])))
        else:
            left, top, right, bottom = _within(box, image)
            width, height = right - left, bottom - top
        if width < 1 or height < 1:
            raise Unfit(
                f"input 'boxes': {np.round(box, 1).tolist()} has no area in its image of {list(image.shape[:2])}"
            )
        return height, width

    def _warped(self, image: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
        cv2, (height, width) = self._cv2, size
        to = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
        matrix = cv2.getPerspectiveTransform(np.ascontiguousarray(box, np.float32), to)
        crop: Tensor = cv2.warpPerspective(
            image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE, flags=cv2.INTER_CUBIC
        )
        return self._turned(crop)

    def _cut(self, image: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
        left, top, right, bottom = _within(box, image)
        return self._turned(image[top:bottom, left:right].copy())

    def _turned(self, crop: Tensor) -> Tensor:
        is_turned = self._parameters.turn_from and crop.shape[0] / crop.shape[1] >= self._parameters.turn_from
        return np.rot90(crop) if is_turned else crop


def _within(box: Tensor, image: Tensor) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the whole pixels in the image that the box touches."""
    height, width = image.shape[:2]
    left, top = (max(int(np.floor(min(max(value, -1), 1 << 30))), 0) for value in box[:2])
    right, bottom = (int(np.ceil(min(max(value, -1), 1 << 30))) for value in box[2:])
    return left, top, min(right, width), min(bottom, height)
