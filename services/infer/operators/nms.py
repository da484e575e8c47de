"""Operation `nms`: non-maximum suppression. Of overlapping boxes of a detector, the one with the best score."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from kernels import arrays
from kernels.nms import MAX_BOXES_ON_GPU, nms
from services.infer.operators.operation import OperationContext, Results, Unfit, map_rows, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor
from shoal.errors import FailedPrecondition

_EMPTY: Tensor = np.empty(0, np.int64)


class NmsParameters(Parameters):
    """Parameters of `nms`."""

    iou_threshold: float = Field(0.5, ge=0, le=1)
    """Of two boxes with a larger intersection over union, the one with the lower score is dropped."""
    score_threshold: float = Field(0.0, allow_inf_nan=False)
    """Boxes with a lower score are dropped."""
    max_boxes: int = Field(300, ge=1, le=100_000)
    """Largest number of boxes that are kept, the best first."""
    max_candidates: int = Field(30_000, ge=1, le=1_000_000)
    """Largest number of boxes in a row: on a GPU, work and memory grow with its square."""


class Nms:
    """FP32 boxes [x0, y0, x1, y1] with scores and classes to the kept boxes, best first. Classes are independent."""

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

    def __init__(self, parameters: NmsParameters, context: OperationContext) -> None:
        self._parameters, self._threads, self._device = parameters, context.threads, context.device
        if context.device.gpus and parameters.max_candidates > MAX_BOXES_ON_GPU:
            raise FailedPrecondition(
                f"operation nms: parameter 'max_candidates' {parameters.max_candidates}: a GPU takes at most "
                f"{MAX_BOXES_ON_GPU}"
            )

    def run(self, inputs: Mapping[str, Value]) -> Results:
        boxes, scores = rows(inputs["boxes"]), rows(inputs["scores"])
        classes: list[Tensor | None] = [*rows(inputs["classes"])] if "classes" in inputs else [None] * len(boxes)
        kept, unfit = map_rows(list(zip(boxes, scores, classes, strict=True)), self._kept, self._threads, _EMPTY)
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

    def _kept(self, row: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        """Return the indices of the kept boxes of one row."""
        boxes, scores, classes = row
        for name, numbers in (("scores", scores), ("classes", classes)):
            if numbers is not None and len(numbers) != len(boxes):
                raise Unfit(f"input '{name}' has {len(numbers)} numbers for {len(boxes)} boxes")
        if len(boxes) > self._parameters.max_candidates:
            raise Unfit(f"input 'boxes' has {len(boxes)}, more than max_candidates, {self._parameters.max_candidates}")
        to_device = self._device.to_device
        with self._device.computing():
            on_device = to_device(boxes)
            # The work ends with the last box that is kept. Without a bound it grows with the square of the boxes.
            best = arrays.empty(on_device, (min(len(boxes), self._parameters.max_boxes),), arrays.INT64)
            keep = nms(
                on_device,
                to_device(scores),
                self._parameters.iou_threshold,
                groups=None if classes is None else to_device(classes),
                least_score=self._parameters.score_threshold,
                out=best,
            )
            kept = self._device.to_host(keep)
        return kept[kept >= 0]
