"""scikit-learn: a fitted estimator or pipeline, by way of skl2onnx.

It is asked as its users ask it, with float64 rows; what is served takes float32 unless float64 is asked for. A pipeline
that scales and then splits may decide otherwise in float32 than in float64, so there is a second plan: float64 inside.

A tree of XGBoost or LightGBM in a pipeline is converted by onnxmltools, where that is installed.
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
    """An Original."""

    framework = "scikit-learn"
    is_batched = True
    most_rows = ANY
    batches: Sequence[int] = (1, 2, 7, 990)

    def __init__(self, estimator: Any, *, float64: bool = False) -> None:
        """Raises InvalidArgument when it is no fitted estimator that takes rows of numbers."""
        self._estimator = estimator
        self._float64 = float64
        features = getattr(estimator, "n_features_in_", None)
        if not (hasattr(estimator, "predict") or hasattr(estimator, "transform")) or features is None:
            kind = type(estimator).__name__
            raise InvalidArgument(f"a {kind} is no fitted scikit-learn estimator: expected predict or transform")
        self._features = int(features)
        self._asked = _questions(estimator)
        self.packages: Mapping[str, str] = versions(
            "scikit-learn", "skl2onnx", *sklearn_exporters.others(estimator), "onnx"
        )
        self.inputs: Sequence[Port] = [Port("x", np.dtype("f8" if float64 else "f4"), (None, self._features))]
        self.plans: Sequence[Plan] = [FLOAT64] if float64 else [FLOAT32, FLOAT64]
        self.scores: frozenset[str] = frozenset({"probabilities", "scores"} & self._asked.keys() & self._class_names())
        names = [str(name) for name in getattr(estimator, "classes_", ())]
        self.classes: Mapping[str, Sequence[str]] = dict.fromkeys(self.scores, names)
        self.notes: Sequence[str] = _notes(estimator)

    def _class_names(self) -> set[str]:
        return {"probabilities", "scores"} if hasattr(self._estimator, "classes_") else set()

    def draw(self, rows: int, generator: np.random.Generator) -> Tensors:
        return {"x": sklearn_rows.draw(self._estimator, self._features, rows, generator, self.inputs[0].dtype)}

    def answer(self, inputs: Mapping[str, Array]) -> Tensors:
        rows = np.asarray(inputs["x"], dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self._features:
            raise InvalidArgument(f"the model takes [rows, {self._features}], got {list(rows.shape)}")
        if not len(rows):
            raise InvalidArgument("no rows: scikit-learn takes one or more")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of feature names, which a served model has not.
            try:
                return {name: ask(rows) for name, ask in self._asked.items()}
            except ValueError as err:
                raise InvalidArgument(f"scikit-learn does not take the rows: {err}") from err

    def export(self, plan: Plan) -> onnx.ModelProto:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = sklearn_exporters.export(self._estimator, self._features, is_precise=plan.is_precise)
        model = graph.batched(graph.named(graph.true_types(model), ["x"], list(self._asked)))
        if self._float64:
            return model
        return graph.narrowed(graph.widened(model, ["x"]))


def _questions(estimator: Any) -> dict[str, Callable[[Array], Array]]:
    """What the estimator is asked, by the names of the outputs, in the exporter's order."""
    if not hasattr(estimator, "predict"):
        return {"transformed": lambda rows: _dense(estimator.transform(rows))}
    if not hasattr(estimator, "classes_"):
        if _is_kind(estimator, "outlier_detector"):
            return {
                "label": lambda rows: _column(estimator.predict(rows)),
                "scores": _asks(estimator.decision_function),
            }
        if _is_kind(estimator, "clusterer"):
            return {"label": estimator.predict, "scores": lambda rows: estimator.transform(rows)}
        return {"prediction": _asks(estimator.predict)}
    if isinstance(estimator.classes_, list):
        raise InvalidArgument("the estimator answers several questions at once (multi-output): convert one of each")
    if hasattr(estimator, "predict_proba"):
        return {"label": estimator.predict, "probabilities": estimator.predict_proba}
    return {"label": estimator.predict, "scores": lambda rows: _both(estimator.decision_function(rows))}


def _is_kind(estimator: Any, kind: str) -> bool:
    from sklearn.utils import get_tags

    return bool(get_tags(estimator).estimator_type == kind)


def _asks(ask: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda rows: _column(ask(rows))


def _column(answer: Array) -> Array:
    return answer.reshape(-1, 1) if answer.ndim == 1 else answer


def _both(decision: Array) -> Array:
    """A binary decision as the exporter gives it: one score for each of the two classes."""
    return np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision


def _dense(answer: Any) -> Array:
    return np.asarray(answer.toarray() if hasattr(answer, "toarray") else answer)


def _notes(estimator: Any) -> Sequence[str]:
    names = getattr(estimator, "feature_names_in_", None)
    return [] if names is None else [f"columns of x, in this order: {', '.join(map(str, names))}"]
