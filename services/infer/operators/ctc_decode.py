"""The text that a recogniser saw: the likeliest class of each step, repeats and blanks left out (greedy CTC decoding).

A. Graves et al., Connectionist Temporal Classification, ICML 2006, section 3.2. The score is the mean probability of
the steps that are kept, as PaddleOCR's recognisers have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from services.infer.operators.operation import Results, Setting, Unfit, each, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor
from shoal.errors import FailedPrecondition


class CtcDecodeParameters(Parameters):
    """Of `ctc_decode`."""

    characters: str
    """A file with one character (or more) on each line, in the order of the classes."""
    blank: Literal["first", "last"] = "first"
    """Which class means nothing; it has no line in the file."""
    space: bool = True
    """A space comes behind the last line, as PaddleOCR's files leave it out."""
    activation: Literal["none", "softmax"] = "none"
    """Whether the classes are probabilities already."""


class CtcDecode:
    """FP32 [steps, classes] to a text and a score."""

    is_batched = True
    only_computes = False
    inputs = (spec("probabilities", "FP32", -1, -1, ragged=True),)
    outputs = (spec("text", "BYTES", 1), spec("score", "FP32", 1))

    def __init__(self, parameters: CtcDecodeParameters, setting: Setting) -> None:
        characters = setting.assets.lines(parameters.characters) + ([" "] if parameters.space else [])
        if not characters:
            raise FailedPrecondition(f"operation ctc_decode: {parameters.characters} has no characters")
        is_first = parameters.blank == "first"
        self._characters = ["", *characters] if is_first else [*characters, ""]
        self._blank = 0 if is_first else len(characters)
        self._is_softmax = parameters.activation == "softmax"
        self._threads = setting.threads

    def run(self, inputs: Mapping[str, Value]) -> Results:
        results, unfit = each(rows(inputs["probabilities"]), self._decoded, self._threads, ("", 0.0))
        texts = np.empty((len(results), 1), object)
        texts[:, 0] = [text.encode() for text, _ in results]
        scores = np.array([[score] for _, score in results], np.float32).reshape(-1, 1)
        return Results({"text": texts, "score": scores}, unfit)

    def example(self) -> Mapping[str, Value]:
        return {"probabilities": [np.zeros((2, len(self._characters)), np.float32)]}

    def _decoded(self, steps: Tensor) -> tuple[str, float]:
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
