"""Images as they are stored (JPEG, PNG, WebP, BMP) to pixels.

OpenCV decodes: it gives Pillow's pixels bit for bit (both stand on libjpeg-turbo), takes half to a quarter of the time
for JPEG, lets go of the interpreter's lock, and refuses what is truncated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from services.infer.operators import extras, image_header
from services.infer.operators.operation import Results, Setting, Unfit, each, spec
from services.infer.operators.parameters import Names, Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor

_NOTHING: Tensor = np.zeros((1, 1, 3), np.uint8)


class DecodeImageParameters(Parameters):
    """Of `decode_image`."""

    color: Literal["rgb", "bgr"] = "rgb"
    orientation: Literal["apply", "ignore"] = "apply"
    """Whether an image is turned as its EXIF data say."""
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

    def __init__(self, parameters: DecodeImageParameters, setting: Setting) -> None:
        self._cv2 = cv2 = extras.opencv()
        self._parameters, self._threads = parameters, setting.threads
        self._flags = cv2.IMREAD_COLOR_RGB if parameters.color == "rgb" else cv2.IMREAD_COLOR
        if parameters.orientation == "ignore":
            self._flags |= cv2.IMREAD_IGNORE_ORIENTATION

    def run(self, inputs: Mapping[str, Value]) -> Results:
        data = [row.item() for row in rows(inputs["image"])]
        images, unfit = each(data, self._decoded, self._threads, _NOTHING)
        sizes = np.array([image.shape[:2] for image in images], np.int32).reshape(-1, 2)
        return Results({"image": images, "size": sizes}, unfit)

    def example(self) -> Mapping[str, Value]:
        image = self._cv2.imencode(f".{self._parameters.formats[0]}", np.zeros((2, 2, 3), np.uint8))[1]
        return {"image": np.array([[image.tobytes()]], object)}

    def _decoded(self, data: bytes) -> Tensor:
        form = self._checked(data)
        try:
            image: Any = self._cv2.imdecode(np.frombuffer(data, np.uint8), self._flags)
        except self._cv2.error as err:
            raise Unfit(f"input 'image': this {form} cannot be decoded: {err.err}") from err
        if image is None:
            raise Unfit(f"input 'image': this {form} cannot be decoded: it is truncated or damaged")
        decoded: Tensor = image
        return decoded

    def _checked(self, data: bytes) -> str:
        """The format. Raises Unfit when it is none that is decoded, or the image is too large."""
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
        return header.format.upper().replace("WEBP", "WebP")
