"""Images of any sizes to what a model takes: resized, cropped or padded, normalised, laid out.

    images ──fit──> groups of one inner size ──one launch each──> inner images ──> in their padding, where there is any

Images that become the same size, whatever theirs was, are one launch of the kernel. Most often that is all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from kernels.resize_norm import pack, resize_norm
from services.infer.operators.image_fit import Fit, FitParameters, Pixels, fit
from services.infer.operators.operation import Results, Setting, spec
from services.infer.operators.parameters import Floats
from services.infer.requests.ragged import Rows, Value, is_even, rows
from services.infer.requests.tensors import Tensor

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "FP32": np.dtype(np.float32),
    "FP16": np.dtype(np.float16),
    "UINT8": np.dtype(np.uint8),
}
_TINY: Tensor = np.zeros((1, 1, 3), np.uint8)


class ResizeNormParameters(FitParameters):
    """Of `resize_norm`."""

    scale: float = Field(1 / 255, gt=0, allow_inf_nan=False)
    """Pixels, 0 to 255, are multiplied by this before anything else."""
    mean: Floats = (0.0,)
    std: Floats = (1.0,)
    """(pixel * scale - mean) / std, one number or one for each channel."""
    datatype: Literal["FP32", "FP16", "UINT8"] = "FP32"
    layout: Literal["chw", "hwc"] = "chw"
    swap: bool = False
    """The channels in reverse: RGB to BGR, or back."""
    antialias: bool = True
    """Each pixel is the mean of those that it stands for, as Pillow has it; else only of its neighbours, as OpenCV."""
    pad: float | None = Field(None, ge=0, le=255)
    """The pixel that fills the padding; not given: what becomes 0."""

    @model_validator(mode="after")
    def _fits_its_datatype(self) -> ResizeNormParameters:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, 3) or not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
                raise ValueError(f"parameter '{name}' {list(values)}: expected one number or three, std above 0")
        if self.datatype == "UINT8" and {"scale", "mean", "std"} & self.model_fields_set:
            raise ValueError("datatype UINT8 is the pixels themselves: it takes no 'scale', 'mean' or 'std'")
        return self


class ResizeNorm:
    """UINT8 [height, width, 3] to numbers [3, h, w] (or [h, w, 3]), and how points of one are found in the other."""

    is_batched = True
    only_computes = False
    inputs = (spec("image", "UINT8", -1, -1, 3, ragged=True),)

    def __init__(self, parameters: ResizeNormParameters, setting: Setting) -> None:
        self._asked, self._setting = parameters, setting
        size = parameters.wanted if parameters.is_fixed else (-1, -1)
        dims = self._laid_out(size)
        self.outputs = (
            spec("image", parameters.datatype, *dims, ragged=not parameters.is_fixed),
            spec("transform", "FP32", 4),
        )
        # The kernel's own form is (pixel / 255 - mean) / std.
        self._affine: dict[str, Any] = {}
        if parameters.datatype != "UINT8":
            to_unit = 1 / (255 * parameters.scale)
            self._affine["mean"] = [value * to_unit for value in _three(parameters.mean)]
            self._affine["std"] = [value * to_unit for value in _three(parameters.std)]
        self._padding = self._padding_of(parameters)

    def run(self, inputs: Mapping[str, Value]) -> Results:
        given = rows(inputs["image"])
        unfit = {
            n: f"input 'image' has no pixels: it is {image.shape[0]} high and {image.shape[1]} wide"
            for n, image in enumerate(given)
            if not image.size
        }
        images = [image if image.size else _TINY for image in given]
        fits = [fit(self._asked, *image.shape[:2]) for image in images]
        transforms = [each.transform(*image.shape[:2]) for each, image in zip(fits, images, strict=True)]
        transform = np.array(transforms, np.float32).reshape(-1, 4)
        return Results({"image": self._resized(images, fits), "transform": transform}, unfit)

    def example(self) -> Mapping[str, Value]:
        return {"image": [np.zeros((4, 6, 3), np.uint8), np.zeros((5, 3, 3), np.uint8)]}

    def _resized(self, images: Rows, fits: Sequence[Fit]) -> Value:
        groups: dict[Pixels, list[int]] = {}
        for n, each in enumerate(fits):
            groups.setdefault(each.inner, []).append(n)
        if not groups:
            return self._none()
        if len(groups) == 1 and all(each.inner == each.outer for each in fits):
            return self._setting.place.give(self._launched(images, fits))
        results: Rows = [_TINY] * len(images)
        for members in groups.values():
            made = self._setting.place.get(self._launched([images[n] for n in members], [fits[n] for n in members]))
            for n, inner in zip(members, made, strict=True):
                results[n] = self._padded(inner, fits[n])
        return np.stack(results) if is_even(results) else results

    def _none(self) -> Value:
        if not self._asked.is_fixed:
            return []
        return np.empty((0, *self._laid_out(self._asked.wanted)), _DTYPES[self._asked.datatype])

    def _launched(self, images: Rows, fits: Sequence[Fit]) -> Any:
        """Images that become one size, in one launch, where the kernel leaves them."""
        asked, setting, size = self._asked, self._setting, fits[0].inner
        boxes = [each.box for each in fits] if fits[0].box is not None else None
        how: dict[str, Any] = {
            "size": size,
            "antialias": asked.antialias,
            "swap": asked.swap,
            "layout": asked.layout.upper(),
            "dtype": _DTYPES[asked.datatype],
            **self._affine,
        }
        place = setting.place
        if not place.gpus:
            return resize_norm(images, boxes=boxes, pool=setting.threads.pool, **how)
        return resize_norm(pack(images, size, boxes).moved(place.put), **how)

    def _padded(self, inner: Tensor, where: Fit) -> Tensor:
        if where.inner == where.outer:
            return inner
        outer = np.empty(self._laid_out(where.outer), inner.dtype)
        outer[...] = self._padding
        rows_, columns = slice(where.top, where.top + where.inner[0]), slice(where.left, where.left + where.inner[1])
        if self._asked.layout == "chw":
            outer[:, rows_, columns] = inner
        else:
            outer[rows_, columns] = inner
        return outer

    def _laid_out(self, size: Pixels) -> tuple[int, int, int]:
        return (3, *size) if self._asked.layout == "chw" else (*size, 3)

    def _padding_of(self, asked: ResizeNormParameters) -> Tensor:
        """What fills the padding, one number for each channel, as it stands in the output."""
        if asked.pad is None:
            values = np.zeros(3)
        elif asked.datatype == "UINT8":
            values = np.full(3, asked.pad)
        else:
            values = (asked.pad * asked.scale - np.array(_three(asked.mean))) / np.array(_three(asked.std))
        if asked.swap:
            values = values[::-1]
        values = np.round(values) if asked.datatype == "UINT8" else values
        filled: Tensor = values.astype(_DTYPES[asked.datatype])
        return filled.reshape(3, 1, 1) if asked.layout == "chw" else filled


def _three(values: tuple[float, ...]) -> tuple[float, ...]:
    return values * 3 if len(values) == 1 else values
