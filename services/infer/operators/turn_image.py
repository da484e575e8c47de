"""Operation `turn_image`: turns images (lines of text, photographs) upright by a classifier's angles."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field, field_validator

from services.infer.operators.operation import OperationContext, Results, spec
from services.infer.operators.parameters import Floats, Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor


class TurnImageParameters(Parameters):
    """Parameters of `turn_image`."""

    degrees: Floats = (0, 180)
    """By class, the clockwise turn of its images."""
    threshold: float = Field(0, ge=0, le=1)
    """An image is turned when the probability of its class is above this."""

    @field_validator("degrees")
    @classmethod
    def _are_quarters(cls, degrees: tuple[float, ...]) -> tuple[float, ...]:
        if not all(turn in (0, 90, 180, 270) for turn in degrees):
            raise ValueError("expected 0, 90, 180 or 270 for each class")
        return degrees


class TurnImage:
    """UINT8 images and FP32 [classes] probabilities to turned images and their degrees, INT32 [1]."""

    is_batched = True
    only_computes = True
    outputs = (spec("image", "UINT8", -1, -1, 3, ragged=True), spec("degrees", "INT32", 1))

    def __init__(self, parameters: TurnImageParameters, context: OperationContext) -> None:
        self._degrees, self._threshold = np.array(parameters.degrees, np.int32), parameters.threshold
        self.inputs = (
            spec("image", "UINT8", -1, -1, 3, ragged=True),
            spec("probabilities", "FP32", len(self._degrees)),
        )

    def run(self, inputs: Mapping[str, Value]) -> Results:
        probabilities = np.asarray(inputs["probabilities"])
        not_numbers = np.flatnonzero(np.isnan(probabilities).any(axis=1))
        unfit = dict.fromkeys(not_numbers.tolist(), "input 'probabilities': expected numbers, got NaN")
        degrees = np.where(probabilities.max(axis=1) > self._threshold, self._degrees[probabilities.argmax(axis=1)], 0)
        images = [_turned(*pair) for pair in zip(rows(inputs["image"]), degrees.tolist(), strict=True)]
        return Results({"image": images, "degrees": degrees.astype(np.int32)[:, np.newaxis]}, unfit)

    def example(self) -> Mapping[str, Value]:
        return {
            "image": [np.zeros((2, 3, 3), np.uint8)],
            "probabilities": np.zeros((1, len(self._degrees)), np.float32),
        }


def _turned(image: Tensor, degrees: int) -> Tensor:
    return np.ascontiguousarray(np.rot90(image, -degrees // 90)) if degrees else image
