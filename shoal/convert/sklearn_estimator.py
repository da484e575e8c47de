"""scikit-learn: a fitted estimator or pipeline from a joblib, pickle or skops file, by way of skl2onnx.

It is asked as its users ask it, with float64 rows; what is served takes float32 unless float64 is asked for. A pipeline
that scales and then splits may decide otherwise in float32 than in float64, so there is a second plan: float64 inside.

A tree of XGBoost or LightGBM in a pipeline is converted by onnxmltools, where that is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.convert import graph, sklearn_exporters, sklearn_rows
from shoal.convert.extras import needed, versions
from shoal.convert.original import Array, Plan, Port, Tensors
from shoal.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    import onnx

EXTRA = "convert-sklearn"
FLOAT32 = Plan("float32 arithmetic")
FLOAT64 = Plan("float64 arithmetic inside", is_precise=True)


def load(path: Path, *, trusts: bool) -> Any:
    """The object in the file. Only with `trusts` anything that may run code is opened.

    Raises:
        FailedPrecondition: it may run code and `trusts` is False, or a package that it needs is missing.
        InvalidArgument: it is no such file.
    """
    needed("sklearn", EXTRA, f"converting {path.name}")
    if path.suffix == ".skops":
        return _load_skops(path, trusts=trusts)
    joblib = needed("joblib", EXTRA, f"opening {path.name}")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = joblib.load(path)
    except ModuleNotFoundError as err:
        raise FailedPrecondition(f"{path.name} holds objects of the package {err.name}: install it here first") from err
    except Exception as err:  # A pickle raises whatever the code in it raises.
        raise InvalidArgument(f"{path}: cannot be opened as a pickle: {type(err).__name__}: {err}") from err
    _refuse_other_version(path, said)
    return found


def _refuse_other_version(path: Path, said: Sequence[warnings.WarningMessage]) -> None:
    """scikit-learn promises nothing of a model that another version saved: its answers may be others."""
    for warning in said:
        if warning.category.__name__ == "InconsistentVersionWarning":
            raise FailedPrecondition(
                f"{path.name} was saved by scikit-learn {getattr(warning.message, 'original_sklearn_version', '?')}; "
                f"here is {versions('scikit-learn')['scikit-learn']}: convert it where it was made, or save it anew"
            )


def _load_skops(path: Path, *, trusts: bool) -> Any:
    skops = needed("skops.io", EXTRA, f"opening {path.name}")
    try:
        unknown = skops.get_untrusted_types(file=path)
        if unknown and not trusts:
            raise FailedPrecondition(
                f"{path.name} holds types that skops does not know to be harmless ({', '.join(unknown)}): "
                "--trust-pickle, if you know where the file is from"
            )
        return skops.load(path, trusted=unknown)
    except FailedPrecondition:
        raise
    except Exception as err:
        raise InvalidArgument(f"{path}: skops cannot open it: {type(err).__name__}: {err}") from err


class SklearnEstimator:
    """An Original."""

    framework = "scikit-learn"
    is_batched = True
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
        self.classes: Mapping[str, Sequence[str]] = {name: names for name in self.scores}
        self.notes: Sequence[str] = _notes(estimator)

    def _class_names(self) -> set[str]:
        return {"probabilities", "scores"} if hasattr(self._estimator, "classes_") else set()

    def draw(self, rows: int, generator: np.random.Generator) -> Tensors:
        return {"x": sklearn_rows.draw(self._estimator, self._features, rows, generator).astype(self.inputs[0].dtype)}

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
            return {"label": lambda rows: _column(estimator.predict(rows)), "scores": _asks(estimator.decision_function)}
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
