"""What the magika package says of a file by itself, and what it makes of the model's answer.

The node turns the bytes of a file into 2,048 numbers, those into 214 scores, and those into the best guess and its
score. Which files are worth asking for, and that a score below the threshold of its type becomes plain `txt` or
`unknown`, is the package's own code here.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import magika
import numpy as np
from magika.types import ContentTypeLabel, MagikaPrediction, ModelFeatures, Seekable
from numpy.typing import NDArray


@dataclass(frozen=True)
class Verdict:
    """What a file is."""

    model_label: str
    """The model's best guess."""
    score: float
    label: str
    """What magika answers: the guess, unless its score is too low."""


class Judge:
    """The magika package."""

    def __init__(self) -> None:
        self._magika = magika.Magika()
        self.model = Path(magika.__file__).parent / "models" / self._magika.get_model_name() / "model.onnx"
        """The ONNX file."""
        config = json.loads(self.model.with_name("config.min.json").read_text())
        self.labels: list[str] = config["target_labels_space"]
        """Names of the model's classes."""

    def features(self, content: bytes) -> NDArray[np.int32] | None:
        """What the model is asked about the file, int32 [2048]; None when magika answers by rule (tiny, blank)."""
        seekable = Seekable(io.BytesIO(content))
        _, found = self._magika._get_result_or_features_from_seekable(seekable)
        return None if found is None else np.array([*found.beg, *found.end], dtype=np.int32)

    def alone(self, content: bytes) -> Verdict:
        """magika's answer to one file by itself."""
        return _of_prediction(self._magika.identify_bytes(content).prediction)

    def together(self, features: Sequence[NDArray[np.int32]]) -> list[Verdict]:
        """magika's answers to many files in one run of the model, as `identify_paths` gives them.

        They are not quite those of `alone`: for one row ONNX Runtime computes in another order than for two or more,
        and this model makes up to 0.002 of score of that.
        """
        half = len(features[0]) // 2
        rows = [(Path(str(n)), _as_features(row[:half], row[half:])) for n, row in enumerate(features)]
        found = self._magika._get_results_from_features(rows)
        return [_of_prediction(found[str(n)].prediction) for n in range(len(features))]

    def of_guess(self, label: str, score: float) -> Verdict:
        """What magika would make of the model's best guess."""
        answer, _ = self._magika._get_output_label_from_dl_label_and_score(ContentTypeLabel(label), score)
        return Verdict(label, score, str(answer))


def _of_prediction(prediction: MagikaPrediction) -> Verdict:
    return Verdict(str(prediction.dl.label), float(prediction.score), str(prediction.output.label))


def _as_features(beginning: NDArray[np.int32], end: NDArray[np.int32]) -> ModelFeatures:
    return ModelFeatures(beginning.tolist(), [], end.tolist(), [], [], [], [])
