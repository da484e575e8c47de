"""Images turned upright, as a classifier of their orientation says: each class stands for some quarter turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, Field, field_validator

from services.infer.calls.ragged import Value, rows
from services.infer.calls.tensors import Tensor
from services.infer.operations.operation import Results, Setting, spec
from services.infer.operations.parameters import Parameters, split


class TurnImageParameters(Parameters):
    """Of `turn_image`."""

    turns: Annotated[tuple[int, ...], BeforeValidator(split)] = (0, 2)
    """For each class, quarter turns against the clock that make such an image upright."""
    threshold: float = Field(0.9, ge=0)
    """An image is turned only when the score of its class is above that."""

    @field_validator("turns")
    @classmethod
    def _in_range(cls, turns: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 <= turn <= 3 for turn in turns):
            raise ValueError("expected quarter turns, 0 to 3, one for each class")
        return turns


class TurnImage:
    """UINT8 images and FP32 [classes] to the images, turned."""

    is_batched = True
    only_computes = True
    outputs = (spec("image", "UINT8", -1, -1, 3, ragged=True),)

    def __init__(self, parameters: TurnImageParameters, setting: Setting) -> None:
        self._turns, self._threshold = np.array(parameters.turns), parameters.threshold
        self.inputs = (
            spec("image", "UINT8", -1, -1, 3, ragged=True),
            spec("scores", "FP32", len(parameters.turns)),
        )

    def run(self, inputs: Mapping[str, Value]) -> Results:
        scores = np.asarray(inputs["scores"])
        # A NaN is above nothing: such an image stays as it is.
        turns = np.where(scores.max(axis=1) > self._threshold, self._turns[scores.argmax(axis=1)], 0)
        images = [_turned(image, int(turn)) for image, turn in zip(rows(inputs["image"]), turns, strict=True)]
        return Results({"image": images})

    def example(self) -> Mapping[str, Value]:
        scores = np.eye(1, len(self._turns), dtype=np.float32)
        return {"image": [np.zeros((2, 3, 3), np.uint8)], "scores": scores}


def _turned(image: Tensor, turn: int) -> Tensor:
    return np.ascontiguousarray(np.rot90(image, turn)) if turn else image
