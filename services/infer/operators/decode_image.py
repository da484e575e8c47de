"""Operation `decode_image`: JPEG, PNG, WebP and BMP files to pixels.

OpenCV decodes. Its pixels equal Pillow's bit for bit (both use libjpeg-turbo), JPEG takes half to a quarter of
Pillow's time, and OpenCV releases the interpreter's lock and rejects truncated files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from services.infer.operators import extras, image_header
from services.infer.operators.operation import OperationContext, Results, Unfit, map_rows, spec
from services.infer.operators.parameters import Names, Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor

_PLACEHOLDER: Tensor = np.zeros((1, 1, 3), np.uint8)

# Scans that an image of `max_pixels` may have; a smaller one may have more. libjpeg writes 10, and 18 for CMYK.
_MAX_SCANS = 32


class DecodeImageParameters(Parameters):
    """Parameters of `decode_image`."""

    color: Literal["rgb", "bgr"] = "rgb"
    orientation: Literal["apply", "ignore"] = "apply"
    """apply: an image is turned according to its EXIF data."""
    max_pixels: int = Field(40_000_000, ge=1, le=1_000_000_000)
    formats: Names = image_header.FORMATS

    @field_validator("formats")
    @classmethod
    def _are_known(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        if not formats or not set(formats) <= set(image_header.FORMATS):
            raise ValueError(f"expected some of {', '.join(image_header.FORMATS)}")
        return formats


class DecodeImage:
    """BYTES to UINT8 [height, width, 3]."""

    is_batched = True
    only_computes = False
    inputs = (spec("image", "BYTES", 1),)
    outputs = (spec("image", "UINT8", -1, -1, 3, ragged=True), spec("size", "INT32", 2))

    def __init__(self, parameters: DecodeImageParameters, context: OperationContext) -> None:
        self._cv2 = cv2 = extras.opencv()
        self._parameters, self._threads = parameters, context.threads
        self._flags = cv2.IMREAD_COLOR_RGB if parameters.color == "rgb" else cv2.IMREAD_COLOR
        if parameters.orientation == "ignore":
            self._flags |= cv2.IMREAD_IGNORE_ORIENTATION

    def run(self, inputs: Mapping[str, Value]) -> Results:
        data = [row.item() for row in rows(inputs["image"])]
        images, unfit = map_rows(data, self._decode, self._threads, _PLACEHOLDER)
        sizes = np.array([image.shape[:2] for image in images], np.int32).reshape(-1, 2)
        return Results({"image": images, "size": sizes}, unfit)

    def example(self) -> Mapping[str, Value]:
        image = self._cv2.imencode(f".{self._parameters.formats[0]}", np.zeros((2, 2, 3), np.uint8))[1]
        return {"image": np.array([[image.tobytes()]], object)}

    def _decode(self, data: bytes) -> Tensor:
        header = self._check_header(data)
        form = header.format.upper().replace("WEBP", "WebP")
        if header.format == "png":
            try:
                data = image_header.png_without_texts(data)
            except ValueError as err:
                raise Unfit("input 'image': this PNG cannot be decoded: it is truncated or damaged") from err
        try:
            image: Any = self._cv2.imdecode(np.frombuffer(data, np.uint8), self._flags)
        except self._cv2.error as err:
            raise Unfit(f"input 'image': this {form} cannot be decoded: {err.err}") from err
        if image is None:
            raise Unfit(f"input 'image': this {form} cannot be decoded: it is truncated or damaged")
        decoded: Tensor = image
        return decoded

    def _check_header(self, data: bytes) -> image_header.Header:
        """Return the header. Raises Unfit when the format is not accepted or the image is too large."""
        formats, limit = self._parameters.formats, self._parameters.max_pixels
        expected = ", ".join(formats)
        if not data:
            raise Unfit(f"input 'image' is empty: expected the bytes of an image ({expected})")
        header = image_header.read(data)
        if header is None or header.format not in formats:
            found = "an unknown format or a damaged header" if header is None else header.format
            raise Unfit(f"input 'image': expected {expected}, got {found} (it begins with {data[:8].hex(' ')})")
        if header.width * header.height > limit:
            raise Unfit(
                f"input 'image' has {header.width} x {header.height} pixels, more than max_pixels, {limit}: "
                "send a smaller one"
            )
        if not header.width or not header.height:
            raise Unfit(f"input 'image' has no pixels: its header says {header.width} x {header.height}")
        if header.width * header.height * header.scans > limit * _MAX_SCANS:
            raise Unfit(
                f"input 'image' has {header.scans} scans of {header.width} x {header.height} pixels, more than "
                f"{_MAX_SCANS} times max_pixels, {limit}: send it with fewer scans, for example as a baseline JPEG"
            )
        return header
