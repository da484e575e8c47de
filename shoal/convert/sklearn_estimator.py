"""scikit-learn models: a fitted estimator or pipeline, exported by skl2onnx.

The original is run with float64 rows, as its users run it; the served model takes float32, unless float64 is requested.
A pipeline that scales before a split may decide differently in float32, so a second plan computes in float64 inside.

Trees of XGBoost or LightGBM in a pipeline are exported by onnxmltools.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.convert import graph, sklearn_exporters, sklearn_rows
from shoal.convert.extras import versions
from shoal.convert.original import ANY, Array, Plan, Port, Tensors
from shoal.errors import InvalidArgument

if TYPE_CHECKING:
    import onnx

FLOAT32 = Plan("float32 arithmetic")
FLOAT64 = Plan("float64 arithmetic inside", is_precise=True)


class SklearnEstimator:
    """Fitted scikit-learn estimator as an Original."""

    framework = "scikit-learn"
    is_batched = True
    max_rows = ANY
    batches: Sequence[int] = (1, 2, 7, 990)

    def __init__(self, estimator: Any, *, float64: bool = False) -> None:
        """Raises InvalidArgument when `estimator` is not a fitted estimator that takes rows of numbers."""
        self._estimator = estimator
        self._float64 = float64
        features = getattr(estimator, "n_features_in_", None)
        if not (hasattr(estimator, "predict") or hasattr(estimator, "transform")) or features is None:
            kind = type(estimator).__name__
            raise InvalidArgument(f"a {kind} is not a fitted scikit-learn estimator: expected predict or transform")
        self._features = int(features)
        self._methods = _output_methods(estimator)
        self.packages: Mapping[str, str] = versions(
            "scikit-learn", "skl2onnx", *sklearn_exporters.other_packages(estimator), "onnx"
        )
        self.inputs: Sequence[Port] = [Port("x", np.dtype("f8" if float64 else "f4"), (None, self._features))]
        self.plans: Sequence[Plan] = [FLOAT64] if float64 else [FLOAT32, FLOAT64]
        self.scores: frozenset[str] = frozenset(
            {"probabilities", "scores"} & self._methods.keys() & self._class_names()
        )
        names = [str(name) for name in getattr(estimator, "classes_", ())]
        self.classes: Mapping[str, Sequence[str]] = dict.fromkeys(self.scores, names)
        self.notes: Sequence[str] = _notes(estimator)

    def _class_names(self) -> set[str]:
        return {"probabilities", "scores"} if hasattr(self._estimator, "classes_") else set()

    def draw(self, rows: int, generator: np.random.Generator) -> Tensors:
        return {"x": sklearn_rows.draw(self._estimator, self._features, rows, generator, self.inputs[0].dtype)}

    def predict(self, inputs: Mapping[str, Array]) -> Tensors:
        rows = np.asarray(inputs["x"], dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self._features:
            raise InvalidArgument(f"the model takes [rows, {self._features}], got {list(rows.shape)}")
        if not len(rows):
            raise InvalidArgument("no rows: scikit-learn needs at least one")
        with warnings.catch_warnings():
            # A warning about missing feature names, which a served model does not have.
            warnings.simplefilter("ignore")
            try:
                return {name: method(rows) for name, method in self._methods.items()}
            except ValueError as err:
                raise InvalidArgument(f"scikit-learn rejects the rows: {err}") from err

    def export(self, plan: Plan) -> onnx.ModelProto:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = sklearn_exporters.export(self._estimator, self._features, is_precise=plan.is_precise)
        model = graph.with_batch_dimension(graph.renamed(graph.with_inferred_types(model), ["x"], list(self._methods)))
        if self._float64:
            return model
        return graph.with_float32_outputs(graph.with_float32_inputs(model, ["x"]))


def _output_methods(estimator: Any) -> dict[str, Callable[[Array], Array]]:
    """Return the estimator's method for each output, in the exporter's order of outputs."""
    if not hasattr(estimator, "predict"):
        return {"transformed": lambda rows: _dense(estimator.transform(rows))}
    if not hasattr(estimator, "classes_"):
        if _is_kind(estimator, "outlier_detector"):
            return {
                "label": lambda rows: _column(estimator.predict(rows)),
                "scores": _as_column(estimator.decision_function),
            }
        if _is_kind(estimator, "clusterer"):
            return {"label": estimator.predict, "scores": lambda rows: estimator.transform(rows)}
        return {"prediction": _as_column(estimator.predict)}
    if isinstance(estimator.classes_, list):
        raise InvalidArgument("the estimator has several targets (multi-output): convert one estimator for each")
    if hasattr(estimator, "predict_proba"):
        return {"label": estimator.predict, "probabilities": estimator.predict_proba}
    return {"label": estimator.predict, "scores": lambda rows: _two_scores(estimator.decision_function(rows))}


def _is_kind(estimator: Any, kind: str) -> bool:
    from sklearn.utils import get_tags

    return bool(get_tags(estimator).estimator_type == kind)


def _as_column(method: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda rows: _column(method(rows))


def _column(predicted: Array) -> Array:
    return predicted.reshape(-1, 1) if predicted.ndim == 1 else predicted


def _two_scores(decision: Array) -> Array:
    """Return a binary decision in the exporter's form: one score for each of the two classes."""
    return np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision


def _dense(predicted: Any) -> Array:
    return np.asarray(predicted.toarray() if hasattr(predicted, "toarray") else predicted)


def _notes(estimator: Any) -> Sequence[str]:
    names = getattr(estimator, "feature_names_in_", None)
    return [] if names is None else [f"columns of x, in this order: {', '.join(map(str, names))}"]
