"""LightGBM models: a booster saved as .txt, or one in a pickle, exported by onnxmltools.

LightGBM compares float64 values with float64 thresholds. The exporter rounds each threshold to the nearest float32; one
that is rounded up sends some values to the other side. So the exporter gets a copy with thresholds rounded down to
float32, for which every float32 value takes its original path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.convert import graph, trees
from shoal.convert.extras import LIGHTGBM, needed, versions
from shoal.convert.original import ANY, Array, Plan, Port, Tensors
from shoal.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    import onnx

_CATEGORICAL = 1
"""Bit of a split's `decision_type` in the model's text."""
_AS_ZERO = 1e-35
"""LightGBM reads numbers up to this size as 0, and its thresholds next to 0 are plus and minus this value."""


def load(path: Path) -> Any:
    """Return the booster in the file.

    Raises:
        InvalidArgument: the file is not a LightGBM model.
    """
    lightgbm = needed("lightgbm", LIGHTGBM, f"converting {path.name}")
    try:
        text = path.read_text()
        if not text.startswith("tree"):
            raise InvalidArgument(f"{path}: not a LightGBM model: the first line must be `tree`")
        return lightgbm.Booster(model_str=text)
    except InvalidArgument:
        raise
    except Exception as err:
        raise InvalidArgument(f"{path}: LightGBM cannot read it: {err}") from err


class LightgbmTrees:
    """LightGBM booster as an Original."""

    framework = "LightGBM"
    is_batched = True
    max_rows = ANY
    batches: Sequence[int] = (1, 2, 7, 990)
    plans: Sequence[Plan] = (Plan("float32 arithmetic"),)

    def __init__(self, booster: Any) -> None:
        needed("onnxmltools", LIGHTGBM, "converting a LightGBM model")
        self._booster = booster
        self._text = booster.model_to_string()
        self._splits = splits(self._text, booster.num_feature())
        self.packages: Mapping[str, str] = versions("lightgbm", "onnxmltools", "onnx")
        self.inputs: Sequence[Port] = [Port("x", np.dtype("f4"), (None, self._splits.features))]
        self._objective = _objective(self._text)
        self._is_classifier = self._objective in ("binary", "multiclass", "multiclassova")
        self.scores: frozenset[str] = frozenset({"probabilities"} if self._is_classifier else ())
        count = max(2, booster.num_model_per_iteration())
        self.classes: Mapping[str, Sequence[str]] = {
            name: [str(number) for number in range(count)] for name in self.scores
        }
        names = booster.feature_name()
        own = [f"Column_{n}" for n in range(len(names))]
        self.notes: Sequence[str] = [] if names == own else [f"columns of x, in this order: {', '.join(names)}"]

    def draw(self, rows: int, generator: np.random.Generator) -> Tensors:
        return {"x": trees.draw(self._splits, rows, generator)}

    def predict(self, inputs: Mapping[str, Array]) -> Tensors:
        rows = np.asarray(inputs["x"], dtype=np.float64)
        try:
            predicted = np.asarray(self._booster.predict(rows))
        except Exception as err:
            # LightGBMError, TypeError or ValueError.
            raise InvalidArgument(f"LightGBM rejects the rows: {err}") from err
        if not self._is_classifier:
            return {"prediction": predicted.reshape(-1, 1) if predicted.ndim == 1 else predicted}
        probabilities = np.stack([1 - predicted, predicted], axis=1) if predicted.ndim == 1 else predicted
        return {"label": probabilities.argmax(axis=1).astype(np.int64), "probabilities": probabilities}

    def export(self, plan: Plan) -> onnx.ModelProto:
        from onnxmltools import convert_lightgbm
        from onnxmltools.convert.common.data_types import FloatTensorType

        outputs = ["label", "probabilities"] if self._is_classifier else ["prediction"]
        try:
            model = convert_lightgbm(
                with_float32_thresholds(self._booster),
                name="model",
                initial_types=[("x", FloatTensorType([None, self._splits.features]))],
                target_opset=15,
                zipmap=False,
            )
        except Exception as err:
            raise FailedPrecondition(f"onnxmltools cannot convert it: {type(err).__name__}: {err}") from err
        return graph.with_batch_dimension(graph.renamed(model, ["x"], outputs))


def with_float32_thresholds(booster: Any) -> Any:
    """Return a copy of a booster whose numeric thresholds are rounded down to float32."""

    def rounded(line: re.Match[str]) -> str:
        values = np.array([float(value) for value in line[2].split()])
        return line[1] + " ".join(repr(float(value)) for value in trees.rounded_down(values))

    # The threshold of a categorical split is an index, which float32 represents exactly.
    text = re.sub(r"(?m)^(threshold=)(.+)$", rounded, booster.model_to_string())
    # `tree_sizes` has the trees' lengths in bytes, which have changed; the field is optional.
    return type(booster)(model_str=re.sub(r"(?m)^tree_sizes=.*\n", "", text))


def _objective(text: str) -> str:
    found = re.search(r"(?m)^objective=(\S+)", text)
    return found[1] if found else ""


def splits(text: str, features: int) -> trees.Splits:
    """Return the splits of the trees in a model's text."""
    found: dict[int, set[float]] = {}
    categories: dict[int, set[int]] = {}
    for block in text.split("\nTree=")[1:]:
        lines = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if not lines.get("split_feature"):
            continue
        of = [lines[name].split() for name in ("split_feature", "threshold", "decision_type")]
        for feature, threshold, kind in zip(*of, strict=True):
            if int(kind) & _CATEGORICAL:
                categories.setdefault(int(feature), set()).update(_set(lines, int(float(threshold))))
            else:
                found.setdefault(int(feature), set()).add(float(threshold))
    return trees.Splits(
        features,
        {feature: np.array(sorted(values)) for feature, values in found.items()},
        {feature: np.array(sorted(values)) for feature, values in categories.items()},
        takes_missing=True,
        as_zero=_AS_ZERO,
    )


def _set(lines: Mapping[str, str], index: int) -> set[int]:
    """Return the categories of a split, which the text stores as a bit set."""
    bounds = [int(value) for value in lines["cat_boundaries"].split()]
    words = [int(value) for value in lines["cat_threshold"].split()[bounds[index] : bounds[index + 1]]]
    return {32 * n + bit for n, word in enumerate(words) for bit in range(32) if word >> bit & 1}
