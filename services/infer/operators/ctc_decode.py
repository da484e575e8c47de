"""Operation `ctc_decode`: greedy CTC decoding. The likeliest class of each step, without repeats and blanks.

A. Graves et al., Connectionist Temporal Classification, ICML 2006, section 3.2. The score is the mean probability of
the kept steps, as in PaddleOCR's recognisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from services.infer.operators.operation import OperationContext, Results, Unfit, map_rows, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor
from shoal.errors import FailedPrecondition


class CtcDecodeParameters(Parameters):
    """Parameters of `ctc_decode`."""

    characters: str
    """File with one character (or more) on each line, in the order of the classes."""
    blank: Literal["first", "last"] = "first"
    """Position of the blank class, which has no line in the file."""
    space: bool = True
    """Adds a space after the last line: PaddleOCR's files leave the space out."""
    activation: Literal["none", "softmax"] = "none"
    """Function that turns the input into probabilities; none: the input is probabilities."""


class CtcDecode:
    """FP32 [steps, classes] to a text and a score."""

    is_batched = True
    only_computes = False
    inputs = (spec("probabilities", "FP32", -1, -1, ragged=True),)
    outputs = (spec("text", "BYTES", 1), spec("score", "FP32", 1))

    def __init__(self, parameters: CtcDecodeParameters, context: OperationContext) -> None:
        characters = context.assets.lines(parameters.characters) + ([" "] if parameters.space else [])
        if not characters:
            raise FailedPrecondition(f"operation ctc_decode: {parameters.characters} has no characters")
        is_first = parameters.blank == "first"
        self._characters = ["", *characters] if is_first else [*characters, ""]
        self._blank = 0 if is_first else len(characters)
        self._is_softmax = parameters.activation == "softmax"
        self._threads = context.threads

    def run(self, inputs: Mapping[str, Value]) -> Results:
        results, unfit = map_rows(rows(inputs["probabilities"]), self._decode, self._threads, ("", 0.0))
        texts = np.empty((len(results), 1), object)
        texts[:, 0] = [text.encode() for text, _ in results]
        scores = np.array([[score] for _, score in results], np.float32).reshape(-1, 1)
        return Results({"text": texts, "score": scores}, unfit)

    def example(self) -> Mapping[str, Value]:
        return {"probabilities": [np.zeros((2, len(self._characters)), np.float32)]}

    def _decode(self, steps: Tensor) -> tuple[str, float]:
        if steps.shape[1] != len(self._characters):
            raise Unfit(
                f"input 'probabilities' has {steps.shape[1]} classes, the characters and the blank are "
                f"{len(self._characters)}: the file is not this model's"
            )
        classes = steps.argmax(axis=1)
        kept = classes != self._blank
        kept[1:] &= classes[1:] != classes[:-1]
        best = steps.max(axis=1)[kept]
        if not best.size:
            return "", 0.0
        if self._is_softmax:
            best = 1 / np.exp(steps[kept] - best[:, np.newaxis]).sum(axis=1)
        return "".join(self._characters[number] for number in classes[kept]), float(best.mean())
