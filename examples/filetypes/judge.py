"""The magika package's own answer for a file, and its interpretation of the model's answer.

The node converts the bytes of a file to 2,048 numbers, these to 214 scores, and these to the best guess and its score.
The package's own code decides which files need the model. It replaces a guess by `txt` or `unknown` when the score is
below the threshold of the type.
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
    """Type of a file."""

    model_label: str
    """The model's best guess."""
    score: float
    label: str
    """magika's answer: the guess, unless its score is too low."""


class Judge:
    """Interface to the magika package."""

    def __init__(self) -> None:
        self._magika = magika.Magika()
        self.model = Path(magika.__file__).parent / "models" / self._magika.get_model_name() / "model.onnx"
        """The ONNX file."""
        config = json.loads(self.model.with_name("config.min.json").read_text())
        self.labels: list[str] = config["target_labels_space"]
        """Names of the model's classes."""

    def features(self, content: bytes) -> NDArray[np.int32] | None:
        """Return the model's input for a file, int32 [2048], or None if magika answers by rule (tiny, blank)."""
        seekable = Seekable(io.BytesIO(content))
        _, found = self._magika._get_result_or_features_from_seekable(seekable)
        return None if found is None else np.array([*found.beg, *found.end], dtype=np.int32)

    def alone(self, content: bytes) -> Verdict:
        """Return magika's answer for one file, in a run of the model for this file only."""
        return _of_prediction(self._magika.identify_bytes(content).prediction)

    def together(self, features: Sequence[NDArray[np.int32]]) -> list[Verdict]:
        """Return magika's answers for many files in one run of the model, as `identify_paths` does.

        The scores differ from those of `alone` by up to 0.002: for one row, ONNX Runtime computes in another order than
        for two or more rows.
        """
        half = len(features[0]) // 2
        rows = [(Path(str(n)), _as_features(row[:half], row[half:])) for n, row in enumerate(features)]
        found = self._magika._get_results_from_features(rows)
        return [_of_prediction(found[str(n)].prediction) for n in range(len(features))]

    def of_guess(self, label: str, score: float) -> Verdict:
        """Return magika's answer for the model's best guess."""
        answer, _ = self._magika._get_output_label_from_dl_label_and_score(ContentTypeLabel(label), score)
        return Verdict(label, score, str(answer))


def _of_prediction(prediction: MagikaPrediction) -> Verdict:
    return Verdict(str(prediction.dl.label), float(prediction.score), str(prediction.output.label))


def _as_features(beginning: NDArray[np.int32], end: NDArray[np.int32]) -> ModelFeatures:
    return ModelFeatures(beginning.tolist(), [], end.tolist(), [], [], [], [])
