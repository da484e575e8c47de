"""Operation `resize_norm`: images of any sizes to a model's input. Resizes, crops or pads, normalises, transposes.

    images ──fit──> groups of one inner size ──one launch each──> resized images ──> padded, where needed

All images that get the same new size share one launch of the kernel. Usually that is the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from kernels.resize_norm import pack, resize_norm
from services.infer.operators.image_fit import Fit, FitParameters, Pixels, fit
from services.infer.operators.operation import OperationContext, Results, spec
from services.infer.operators.parameters import Floats
from services.infer.requests.ragged import Rows, Value, is_even, rows
from services.infer.requests.tensors import Tensor

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "FP32": np.dtype(np.float32),
    "FP16": np.dtype(np.float16),
    "UINT8": np.dtype(np.uint8),
}
# The filter of an image takes 40 bytes for each pixel of its longer side. JPEG and WebP have shorter sides.
_MAX_SOURCE_SIDE = 65_536

_PLACEHOLDER: Tensor = np.zeros((1, 1, 3), np.uint8)


class ResizeNormParameters(FitParameters):
    """Parameters of `resize_norm`."""

    scale: float = Field(1 / 255, gt=0, allow_inf_nan=False)
    """Factor for the pixels, 0 to 255, applied first."""
    mean: Floats = (0.0,)
    std: Floats = (1.0,)
    """(pixel * scale - mean) / std, one number or one for each channel."""
    datatype: Literal["FP32", "FP16", "UINT8"] = "FP32"
    layout: Literal["chw", "hwc"] = "chw"
    swap: bool = False
    """Reverse the channels: RGB to BGR, or back."""
    antialias: bool = True
    """True: all source pixels of a target pixel count, as in Pillow. False: its neighbours only, as in OpenCV."""
    pad: float | None = Field(None, ge=0, le=255)
    """Pixel value of the padding; None: the value that is 0 after normalisation."""

    @model_validator(mode="after")
    def _fits_its_datatype(self) -> ResizeNormParameters:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, 3) or not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
                raise ValueError(f"parameter '{name}' {list(values)}: expected one number or three, std above 0")
        if self.datatype == "UINT8" and {"scale", "mean", "std"} & self.model_fields_set:
            raise ValueError("datatype UINT8 is the pixels themselves: it takes no 'scale', 'mean' or 'std'")
        return self


class ResizeNorm:
    """UINT8 [height, width, 3] to numbers [3, h, w] (or [h, w, 3]), and the transform from source to target points."""

    is_batched = True
    only_computes = False
    inputs = (spec("image", "UINT8", -1, -1, 3, ragged=True),)

    def __init__(self, parameters: ResizeNormParameters, context: OperationContext) -> None:
        self._parameters, self._context = parameters, context
        size = parameters.target if parameters.is_fixed else (-1, -1)
        dims = self._laid_out(size)
        self.outputs = (
            spec("image", parameters.datatype, *dims, ragged=not parameters.is_fixed),
            spec("transform", "FP32", 4),
        )
        # The kernel computes (pixel / 255 - mean) / std.
        self._affine: dict[str, Any] = {}
        if parameters.datatype != "UINT8":
            to_unit = 1 / (255 * parameters.scale)
            self._affine["mean"] = [value * to_unit for value in _three(parameters.mean)]
            self._affine["std"] = [value * to_unit for value in _three(parameters.std)]
        self._padding = self._padding_of(parameters)

    def run(self, inputs: Mapping[str, Value]) -> Results:
        sources = rows(inputs["image"])
        unfit = {n: why for n, image in enumerate(sources) if (why := _unfit(image)) is not None}
        images = [_PLACEHOLDER if n in unfit else image for n, image in enumerate(sources)]
        fits = [fit(self._parameters, *image.shape[:2]) for image in images]
        transforms = [placed.transform(*image.shape[:2]) for placed, image in zip(fits, images, strict=True)]
        transform = np.array(transforms, np.float32).reshape(-1, 4)
        return Results({"image": self._resized(images, fits), "transform": transform}, unfit)

    def example(self) -> Mapping[str, Value]:
        return {"image": [np.zeros((4, 6, 3), np.uint8), np.zeros((5, 3, 3), np.uint8)]}

    def _resized(self, images: Rows, fits: Sequence[Fit]) -> Value:
        groups: dict[Pixels, list[int]] = {}
        for n, placed in enumerate(fits):
            groups.setdefault(placed.inner, []).append(n)
        if not groups:
            return self._no_images()
        device = self._context.device
        if len(groups) == 1 and all(placed.inner == placed.outer for placed in fits):
            return device.to_value(self._launch(images, fits))
        results: Rows = [_PLACEHOLDER] * len(images)
        for members in groups.values():
            resized = device.to_host(self._launch([images[n] for n in members], [fits[n] for n in members]))
            for n, inner in zip(members, resized, strict=True):
                results[n] = self._padded(inner, fits[n])
        return np.stack(results) if is_even(results) else results

    def _no_images(self) -> Value:
        if not self._parameters.is_fixed:
            return []
        return np.empty((0, *self._laid_out(self._parameters.target)), _DTYPES[self._parameters.datatype])

    def _launch(self, images: Rows, fits: Sequence[Fit]) -> Any:
        """Resize images of one new size in one launch; return the result on the device."""
        parameters, context, size = self._parameters, self._context, fits[0].inner
        boxes = [placed.box for placed in fits] if fits[0].box is not None else None
        options: dict[str, Any] = {
            "size": size,
            "antialias": parameters.antialias,
            "swap": parameters.swap,
            "layout": parameters.layout.upper(),
            "dtype": _DTYPES[parameters.datatype],
            **self._affine,
        }
        device = context.device
        if not device.gpus:
            return resize_norm(images, boxes=boxes, pool=context.threads.pool, **options)
        return resize_norm(pack(images, size, boxes).moved(device.to_device), **options)

    def _padded(self, inner: Tensor, placed: Fit) -> Tensor:
        if placed.inner == placed.outer:
            return inner
        outer = np.empty(self._laid_out(placed.outer), inner.dtype)
        outer[...] = self._padding
        rows_ = slice(placed.top, placed.top + placed.inner[0])
        columns = slice(placed.left, placed.left + placed.inner[1])
        if self._parameters.layout == "chw":
            outer[:, rows_, columns] = inner
        else:
            outer[rows_, columns] = inner
        return outer

    def _laid_out(self, size: Pixels) -> tuple[int, int, int]:
        return (3, *size) if self._parameters.layout == "chw" else (*size, 3)

    def _padding_of(self, parameters: ResizeNormParameters) -> Tensor:
        """Return the padding's value for each channel, after normalisation."""
        if parameters.pad is None:
            values = np.zeros(3)
        elif parameters.datatype == "UINT8":
            values = np.full(3, parameters.pad)
        else:
            values = (parameters.pad * parameters.scale - np.array(_three(parameters.mean))) / np.array(
                _three(parameters.std)
            )
        if parameters.swap:
            values = values[::-1]
        values = np.round(values) if parameters.datatype == "UINT8" else values
        filled: Tensor = values.astype(_DTYPES[parameters.datatype])
        return filled.reshape(3, 1, 1) if parameters.layout == "chw" else filled


def _unfit(image: Tensor) -> str | None:
    """Return why an image cannot be resized; None: it can be."""
    height, width = image.shape[:2]
    if not image.size:
        return f"input 'image' has no pixels: it is {height} high and {width} wide"
    if max(height, width) > _MAX_SOURCE_SIDE:
        return f"input 'image' is {height} high and {width} wide: expected at most {_MAX_SOURCE_SIDE} pixels in a side"
    return None


def _three(values: tuple[float, ...]) -> tuple[float, ...]:
    return values * 3 if len(values) == 1 else values
