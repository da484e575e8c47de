"""XGBoost models: a booster saved as .json or .ubj, or one in a pickle, exported by onnxmltools.

XGBoost compares float32 values with float32 thresholds, as the converted model does, and handles missing values.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.convert import graph, trees
from shoal.convert.extras import XGBOOST, first_line, needed, versions
from shoal.convert.original import ANY, Array, Plan, Port, Tensors
from shoal.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    import onnx


def load(path: Path) -> Any:
    """Return the XGBClassifier or XGBRegressor of the booster in the file.

    Raises:
        InvalidArgument: the file is not an XGBoost model.
    """
    xgboost = needed("xgboost", XGBOOST, f"converting {path.name}")
    try:
        booster = xgboost.Booster(model_file=str(path))
    except Exception as err:
        # XGBoostError, or an error of its readers.
        raise InvalidArgument(f"{path}: XGBoost cannot read it: {first_line(err)}") from err
    return of_booster(booster)


def of_booster(booster: Any) -> Any:
    """Return the estimator of `booster`: a classifier for a classification objective, else a regressor."""
    xgboost = needed("xgboost", XGBOOST, "converting a booster")
    objective = _objective(booster)
    # The same trees, with the probabilities that the labels come from.
    if objective == "multi:softmax":
        booster.set_param({"objective": "multi:softprob"})
    estimator = xgboost.XGBClassifier() if objective.startswith(("binary:", "multi:")) else xgboost.XGBRegressor()
    estimator.load_model(booster.save_raw("ubj"))
    return estimator


def _objective(booster: Any) -> str:
    return str(json.loads(booster.save_config())["learner"]["objective"]["name"])


class XgboostTrees:
    """XGBoost estimator as an Original."""

    framework = "XGBoost"
    is_batched = True
    max_rows = ANY
    batches: Sequence[int] = (1, 2, 7, 990)
    plans: Sequence[Plan] = (Plan("float32 arithmetic"),)

    def __init__(self, estimator: Any) -> None:
        """`estimator` is an XGBClassifier or XGBRegressor. Raises InvalidArgument when it has no trees."""
        needed("onnxmltools", XGBOOST, "converting an XGBoost model")
        kind = json.loads(estimator.get_booster().save_config())["learner"]["gradient_booster"]["name"]
        if kind != "gbtree":
            raise InvalidArgument(f"a booster of kind {kind}: onnxmltools converts gbtree only")
        self._estimator = estimator
        self._splits = splits(estimator.get_booster())
        self.packages: Mapping[str, str] = versions("xgboost", "xgboost-cpu", "onnxmltools", "onnx")
        self.inputs: Sequence[Port] = [Port("x", np.dtype("f4"), (None, self._splits.features))]
        self._is_classifier = hasattr(estimator, "predict_proba")
        self.scores: frozenset[str] = frozenset({"probabilities"} if self._is_classifier else ())
        names = [str(name) for name in estimator.classes_] if self._is_classifier else []
        self.classes: Mapping[str, Sequence[str]] = dict.fromkeys(self.scores, names)
        self.notes: Sequence[str] = _notes(estimator.get_booster())

    def draw(self, rows: int, generator: np.random.Generator) -> Tensors:
        return {"x": trees.draw(self._splits, rows, generator)}

    def predict(self, inputs: Mapping[str, Array]) -> Tensors:
        rows = np.asarray(inputs["x"])
        if rows.ndim != 2 or rows.shape[1] != self._splits.features:
            raise InvalidArgument(f"the model takes [rows, {self._splits.features}], got {list(rows.shape)}")
        try:
            if not self._is_classifier:
                predicted = self._estimator.predict(rows)
                return {"prediction": predicted.reshape(-1, 1) if predicted.ndim == 1 else predicted}
            return {"label": self._estimator.predict(rows), "probabilities": self._estimator.predict_proba(rows)}
        except Exception as err:
            raise InvalidArgument(f"XGBoost rejects the rows: {first_line(err)}") from err

    def export(self, plan: Plan) -> onnx.ModelProto:
        from onnxmltools import convert_xgboost
        from onnxmltools.convert.common.data_types import FloatTensorType

        outputs = ["label", "probabilities"] if self._is_classifier else ["prediction"]
        try:
            with _numbered(self._estimator.get_booster()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = convert_xgboost(
                    self._estimator,
                    name="model",
                    initial_types=[("x", FloatTensorType([None, self._splits.features]))],
                    target_opset=15,
                )
        except Exception as err:
            raise FailedPrecondition(f"onnxmltools cannot convert it: {first_line(err)}") from err
        return graph.with_batch_dimension(graph.renamed(model, ["x"], outputs))


class _numbered:
    """Remove a booster's feature names, which its exporter cannot handle, and restore them afterwards."""

    def __init__(self, booster: Any) -> None:
        self._booster = booster
        self._names, self._types = booster.feature_names, booster.feature_types

    def __enter__(self) -> None:
        self._booster.feature_names = None

    def __exit__(self, *_: object) -> None:
        self._booster.feature_names, self._booster.feature_types = self._names, self._types


def _notes(booster: Any) -> Sequence[str]:
    names = booster.feature_names
    notes = [] if not names else [f"columns of x, in this order: {', '.join(names)}"]
    best = booster.attr("best_iteration")
    if best is not None and int(best) + 1 < booster.num_boosted_rounds():
        notes.append(f"training stopped early: the first {int(best) + 1} rounds are served, as XGBoost predicts")
    return notes


def splits(booster: Any) -> trees.Splits:
    """Return the splits of a booster's trees. Raises InvalidArgument when it has none."""
    found: dict[int, set[float]] = {}
    categories: dict[int, set[int]] = {}
    with _numbered(booster):
        dumped = booster.get_dump(dump_format="json")
    if not dumped:
        raise InvalidArgument("the booster has no trees: was it trained?")
    stack = [json.loads(tree) for tree in dumped]
    while stack:
        node = stack.pop()
        if "children" in node:
            stack += node["children"]
            feature = int(str(node["split"]).removeprefix("f"))
            if isinstance(node["split_condition"], list):
                categories.setdefault(feature, set()).update(map(int, node["split_condition"]))
            else:
                found.setdefault(feature, set()).add(float(node["split_condition"]))
    return trees.Splits(
        int(booster.num_features()),
        {feature: np.array(sorted(values)) for feature, values in found.items()},
        {feature: np.array(sorted(values)) for feature, values in categories.items()},
        takes_missing=True,
    )
