"""How an image of any size becomes one that a model takes: where its pixels go, as a plain function of the sizes.

stretch     to `size`, whatever the ratio
letterbox   into `size` with its ratio kept, the rest padded
crop        its shorter side to `shorter`, then `size` from the middle (torchvision's Resize and CenterCrop)
height      to the height of `size`, as wide as its ratio makes it; padded to the width of `size`, or to the next
            multiple (recognisers of text)
multiple    the longer or shorter side to `limit`, both sides rounded to multiples (detectors of text)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from services.infer.operators.parameters import Parameters, Size

_LARGEST = 8192

Pixels = tuple[int, int]
"""Height and width."""


class FitParameters(Parameters):
    """What says how images become a model's size."""

    fit: Literal["stretch", "letterbox", "crop", "height", "multiple"] = "stretch"
    size: Size | None = None
    shorter: int = Field(0, ge=0, le=_LARGEST)
    """For `crop`; 0: as `size`."""
    align: Literal["center", "start"] = "center"
    """For `letterbox`: where the image is in its padding."""
    limit: int = Field(960, ge=1, le=_LARGEST)
    limit_side: Literal["max", "min"] = "max"
    """For `multiple`: the longer side has `limit` at most, or the shorter side at least."""
    multiple: int = Field(32, ge=1, le=_LARGEST)
    max_side: int = Field(4096, ge=1, le=_LARGEST)
    """For `height` and `multiple`: no side of the result is longer."""

    @model_validator(mode="after")
    def _has_size(self) -> FitParameters:
        if self.fit == "multiple":
            if self.size is not None:
                raise ValueError("parameter 'size' is not for fit 'multiple': give 'limit'")
        elif self.size is None:
            raise ValueError(f"parameter 'size' is missing: fit '{self.fit}' needs it, as 'height, width'")
        elif not all(1 <= side <= _LARGEST for side in self.size):
            raise ValueError(f"parameter 'size' {list(self.size)}: expected 1 to {_LARGEST} pixels")
        if self.fit == "crop" and self.size is not None and 0 < self.shorter < max(self.size):
            raise ValueError(f"parameter 'shorter' {self.shorter}: the crop of {max(self.size)} pixels is larger")
        return self

    @property
    def is_fixed(self) -> bool:
        """Whether all images become one size."""
        return self.fit in ("stretch", "letterbox", "crop")

    @property
    def wanted(self) -> Pixels:
        assert self.size is not None, "was checked: only fit 'multiple' has none"
        return self.size


@dataclass(frozen=True)
class Fit:
    """Where one image goes."""

    inner: Pixels
    """What is resized."""
    outer: Pixels
    """What the model gets: the rest is padded."""
    top: int = 0
    left: int = 0
    """Where the inner one begins in it."""
    box: tuple[float, float, float, float] | None = None
    """The part of the source that is taken: y0, x0, y1, x1; None: all of it."""

    def transform(self, height: int, width: int) -> tuple[float, float, float, float]:
        """sx, sy, dx, dy of an image of this size: a point (x, y) of it is at (x * sx + dx, y * sy + dy)."""
        y0, x0, y1, x1 = self.box or (0, 0, height, width)
        sx, sy = self.inner[1] / (x1 - x0), self.inner[0] / (y1 - y0)
        return sx, sy, self.left - x0 * sx, self.top - y0 * sy


def fit(asked: FitParameters, height: int, width: int) -> Fit:
    """How an image of this size, of a pixel or more, is fitted."""
    return _FITS[asked.fit](asked, height, width)


def _stretch(asked: FitParameters, height: int, width: int) -> Fit:
    return Fit(asked.wanted, asked.wanted)


def _letterbox(asked: FitParameters, height: int, width: int) -> Fit:
    high, wide = asked.wanted
    scale = min(high / height, wide / width)
    inner = min(max(round(height * scale), 1), high), min(max(round(width * scale), 1), wide)
    share = 2 if asked.align == "center" else math.inf
    return Fit(inner, asked.wanted, int((high - inner[0]) / share), int((wide - inner[1]) / share))


def _crop(asked: FitParameters, height: int, width: int) -> Fit:
    high, wide = asked.wanted
    shorter = asked.shorter or max(asked.wanted)
    # As torchvision does it: the longer side is cut to a whole number, the crop begins at a rounded one.
    resized = (shorter, int(shorter * width / height)) if height <= width else (int(shorter * height / width), shorter)
    top, left = round((resized[0] - high) / 2), round((resized[1] - wide) / 2)
    sy, sx = height / resized[0], width / resized[1]
    bottom, right = min((top + high) * sy, height), min((left + wide) * sx, width)
    return Fit(asked.wanted, asked.wanted, box=(top * sy, left * sx, bottom, right))


def _height(asked: FitParameters, height: int, width: int) -> Fit:
    high, least = asked.wanted
    inner = min(max(math.ceil(high * width / height), 1), asked.max_side)
    outer = least if inner <= least else min(-(-inner // asked.multiple) * asked.multiple, max(asked.max_side, least))
    return Fit((high, inner), (high, max(outer, inner)))


def _multiple(asked: FitParameters, height: int, width: int) -> Fit:
    scale = 1.0
    if asked.limit_side == "max" and max(height, width) > asked.limit:
        scale = asked.limit / max(height, width)
    elif asked.limit_side == "min" and min(height, width) < asked.limit:
        scale = asked.limit / min(height, width)
    scale = min(scale, asked.max_side / max(height, width))
    size = _rounded(height * scale, asked), _rounded(width * scale, asked)
    return Fit(size, size)


def _rounded(side: float, asked: FitParameters) -> int:
    return max(round(int(side) / asked.multiple), 1) * asked.multiple


_FITS: Mapping[str, Callable[[FitParameters, int, int], Fit]] = {
    "stretch": _stretch,
    "letterbox": _letterbox,
    "crop": _crop,
    "height": _height,
    "multiple": _multiple,
}
