"""Boxes of a detector without those that mean the same thing: of boxes that overlap, the best one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from kernels.nms import nms
from services.infer.operators.operation import Results, Setting, Unfit, each, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor

_NOTHING: Tensor = np.empty(0, np.int64)


class NmsParameters(Parameters):
    """Of `nms`."""

    iou_threshold: float = Field(0.5, ge=0, le=1)
    """Boxes that share more than this part of what they cover together mean the same thing."""
    score_threshold: float = Field(0.0, allow_inf_nan=False)
    """Boxes with less are dropped."""
    max_boxes: int = Field(300, ge=1, le=100_000)
    """That are kept, the best ones."""
    max_candidates: int = Field(30_000, ge=1, le=1_000_000)
    """Of one row: the work grows with their square."""


class Nms:
    """FP32 boxes [x0, y0, x1, y1], their scores, and classes that are kept apart, to what is kept, best first."""

    is_batched = True
    only_computes = False
    inputs = (
        spec("boxes", "FP32", -1, 4, ragged=True),
        spec("scores", "FP32", -1, ragged=True),
        spec("classes", "INT32", -1, ragged=True, optional=True),
    )
    outputs = (
        spec("boxes", "FP32", -1, 4, ragged=True),
        spec("scores", "FP32", -1, ragged=True),
        spec("keep", "INT64", -1, ragged=True),
    )

    def __init__(self, parameters: NmsParameters, setting: Setting) -> None:
        self._asked, self._threads, self._place = parameters, setting.threads, setting.place

    def run(self, inputs: Mapping[str, Value]) -> Results:
        boxes, scores = rows(inputs["boxes"]), rows(inputs["scores"])
        classes: list[Tensor | None] = [*rows(inputs["classes"])] if "classes" in inputs else [None] * len(boxes)
        kept, unfit = each(list(zip(boxes, scores, classes, strict=True)), self._kept, self._threads, _NOTHING)
        return Results(
            {
                "boxes": [box[keep] for box, keep in zip(boxes, kept, strict=True)],
                "scores": [score[keep] for score, keep in zip(scores, kept, strict=True)],
                "keep": kept,
            },
            unfit,
        )

    def example(self) -> Mapping[str, Value]:
        boxes, scores = np.array([[0, 0, 2, 2], [0, 0, 2, 2]], np.float32), np.ones(2, np.float32)
        return {"boxes": [boxes], "scores": [scores], "classes": [np.zeros(2, np.int32)]}

    def _kept(self, given: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        boxes, scores, classes = given
        for name, numbers in (("scores", scores), ("classes", classes)):
            if numbers is not None and len(numbers) != len(boxes):
                raise Unfit(f"input '{name}' has {len(numbers)} numbers for {len(boxes)} boxes")
        if len(boxes) > self._asked.max_candidates:
            raise Unfit(f"input 'boxes' has {len(boxes)}, more than max_candidates, {self._asked.max_candidates}")
        put = self._place.put
        with self._place.computing():
            keep = nms(
                put(boxes),
                put(scores),
                self._asked.iou_threshold,
                groups=None if classes is None else put(classes),
                least_score=self._asked.score_threshold,
            )
            kept = self._place.get(keep)
        return kept[kept >= 0][: self._asked.max_boxes]
