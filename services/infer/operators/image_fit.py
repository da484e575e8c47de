"""Geometry of resizing: the target position of an image's pixels, as a pure function of the sizes.

stretch     to `size`, without regard to the aspect ratio
letterbox   into `size` with the aspect ratio kept, the rest padded
crop        the shorter side to `shorter`, then `size` from the centre (torchvision's Resize and CenterCrop)
height      to the height of `size` with the aspect ratio kept; padded to the width of `size`, or to the next
            multiple (text recognisers)
multiple    the longer or shorter side to `limit`, both sides rounded to multiples (text detectors)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from services.infer.operators.parameters import Parameters, Size

_MAX_SIDE = 8192

Pixels = tuple[int, int]
"""Height and width."""


class FitParameters(Parameters):
    """Parameters that determine an image's new size."""

    fit: Literal["stretch", "letterbox", "crop", "height", "multiple"] = "stretch"
    size: Size | None = None
    shorter: int = Field(0, ge=0, le=_MAX_SIDE)
    """For `crop`: the shorter side before the crop; 0: as `size`."""
    align: Literal["center", "start"] = "center"
    """For `letterbox`: position of the image in the padding."""
    limit: int = Field(960, ge=1, le=_MAX_SIDE)
    limit_side: Literal["max", "min"] = "max"
    """For `multiple`: the longer side has `limit` at most, or the shorter side at least."""
    multiple: int = Field(32, ge=1, le=_MAX_SIDE)
    max_side: int = Field(4096, ge=1, le=_MAX_SIDE)
    """For `height` and `multiple`: no side of the result is longer."""

    @model_validator(mode="after")
    def _has_size(self) -> FitParameters:
        if self.fit == "multiple":
            if self.size is not None:
                raise ValueError("parameter 'size' is not for fit 'multiple': give 'limit'")
        elif self.size is None:
            raise ValueError(f"parameter 'size' is missing: fit '{self.fit}' needs it, as 'height, width'")
        elif not all(1 <= side <= _MAX_SIDE for side in self.size):
            raise ValueError(f"parameter 'size' {list(self.size)}: expected 1 to {_MAX_SIDE} pixels")
        if self.fit == "crop" and self.size is not None and 0 < self.shorter < max(self.size):
            raise ValueError(f"parameter 'shorter' {self.shorter}: the crop of {max(self.size)} pixels is larger")
        return self

    @property
    def is_fixed(self) -> bool:
        """True when all images get the same size."""
        return self.fit in ("stretch", "letterbox", "crop")

    @property
    def target(self) -> Pixels:
        assert self.size is not None, "validated: only fit 'multiple' has no size"
        return self.size


@dataclass(frozen=True)
class Fit:
    """Placement of one image in the model's input."""

    inner: Pixels
    """Size of the resized image."""
    outer: Pixels
    """Size of the model's input; the rest is padding."""
    top: int = 0
    left: int = 0
    """Offset of the resized image in the model's input."""
    box: tuple[float, float, float, float] | None = None
    """Region of the source that is used: y0, x0, y1, x1; None: the whole image."""

    def transform(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return sx, sy, dx, dy for an image of this size: its point (x, y) moves to (x * sx + dx, y * sy + dy)."""
        y0, x0, y1, x1 = self.box or (0, 0, height, width)
        sx, sy = self.inner[1] / (x1 - x0), self.inner[0] / (y1 - y0)
        return sx, sy, self.left - x0 * sx, self.top - y0 * sy


def fit(parameters: FitParameters, height: int, width: int) -> Fit:
    """Return the placement of an image of this size, which has at least one pixel."""
    return _FITS[parameters.fit](parameters, height, width)


def _stretch(parameters: FitParameters, height: int, width: int) -> Fit:
    return Fit(parameters.target, parameters.target)


def _letterbox(parameters: FitParameters, height: int, width: int) -> Fit:
    high, wide = parameters.target
    scale = min(high / height, wide / width)
    inner = min(max(round(height * scale), 1), high), min(max(round(width * scale), 1), wide)
    share = 2 if parameters.align == "center" else math.inf
    return Fit(inner, parameters.target, int((high - inner[0]) / share), int((wide - inner[1]) / share))


def _crop(parameters: FitParameters, height: int, width: int) -> Fit:
    high, wide = parameters.target
    shorter = parameters.shorter or max(parameters.target)
    # As in torchvision: the longer side is truncated to a whole number, the crop's offset is rounded.
    resized = (shorter, int(shorter * width / height)) if height <= width else (int(shorter * height / width), shorter)
    top, left = round((resized[0] - high) / 2), round((resized[1] - wide) / 2)
    sy, sx = height / resized[0], width / resized[1]
    bottom, right = min((top + high) * sy, height), min((left + wide) * sx, width)
    return Fit(parameters.target, parameters.target, box=(top * sy, left * sx, bottom, right))


def _height(parameters: FitParameters, height: int, width: int) -> Fit:
    high, least = parameters.target
    inner = min(max(math.ceil(high * width / height), 1), parameters.max_side)
    outer = (
        least
        if inner <= least
        else min(-(-inner // parameters.multiple) * parameters.multiple, max(parameters.max_side, least))
    )
    return Fit((high, inner), (high, max(outer, inner)))


def _multiple(parameters: FitParameters, height: int, width: int) -> Fit:
    scale = 1.0
    if parameters.limit_side == "max" and max(height, width) > parameters.limit:
        scale = parameters.limit / max(height, width)
    elif parameters.limit_side == "min" and min(height, width) < parameters.limit:
        scale = parameters.limit / min(height, width)
    scale = min(scale, parameters.max_side / max(height, width))
    size = _rounded(height * scale, parameters), _rounded(width * scale, parameters)
    return Fit(size, size)


def _rounded(side: float, parameters: FitParameters) -> int:
    return max(round(int(side) / parameters.multiple), 1) * parameters.multiple


_FITS: Mapping[str, Callable[[FitParameters, int, int], Fit]] = {
    "stretch": _stretch,
    "letterbox": _letterbox,
    "crop": _crop,
    "height": _height,
    "multiple": _multiple,
}
