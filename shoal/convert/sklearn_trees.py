"""What skl2onnx 1.20 gets wrong about trees, put right as it makes their nodes.

missing values   It sends NaN to the right always; the tree has learned where NaN goes (`missing_go_to_left`).
thresholds       Those of HistGradientBoosting are rounded to the nearest float32: some up, and then a float32 value
                 that lay to their right lies to their left. They are rounded down before it sees them.
float64          It works out thresholds in float64, and writes them as float32. They are written as float64.
infinity         A threshold that only tells missing values from all others is infinite, and its search for the float64
                 beside it never ends.
onnx 1.23        Truth values among integers are refused: they are made integers.

Trees of XGBoost and LightGBM in a pipeline come by here too: those of LightGBM are rounded down likewise, and what
XGBoost rounds to float32 before it compares, a graph of float64 rounds as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto, numpy_helper
from skl2onnx import update_registered_converter
from skl2onnx._supported_operators import sklearn_operator_name_map
from skl2onnx.common import tree_ensemble
from skl2onnx.common._registration import get_converter, get_shape_calculator
from skl2onnx.common.data_types import DoubleTensorType
from sklearn import ensemble, tree

from shoal.convert import lightgbm_trees, trees
from shoal.convert.original import Array

Converter: TypeAlias = Callable[..., None]

_KINDS = (
    tree.DecisionTreeClassifier,
    tree.DecisionTreeRegressor,
    tree.ExtraTreeClassifier,
    tree.ExtraTreeRegressor,
    ensemble.RandomForestClassifier,
    ensemble.RandomForestRegressor,
    ensemble.ExtraTreesClassifier,
    ensemble.ExtraTreesRegressor,
    ensemble.GradientBoostingClassifier,
    ensemble.GradientBoostingRegressor,
    ensemble.HistGradientBoostingClassifier,
    ensemble.HistGradientBoostingRegressor,
)
_WIDE = ("nodes_values", "nodes_hitrates", "base_values", "class_weights", "target_weights")
"""Attributes that may be float64, as tensors, since version 3 of the trees' operators."""


def put_right() -> None:
    """Has skl2onnx convert trees by way of this module; once for the process."""
    if tree_ensemble.sklearn_threshold is not _threshold:
        tree_ensemble.sklearn_threshold = _threshold
    for kind in _KINDS:
        name = sklearn_operator_name_map[kind]
        registered = get_converter(name)
        converter: Converter = registered._fct  # What is registered around it takes no version.
        if converter.__module__ != __name__:
            options = registered.get_allowed_options()
            update_registered_converter(kind, name, get_shape_calculator(name), around(converter), options=options)


_finite_threshold = tree_ensemble.sklearn_threshold


def _threshold(threshold: float, dtype: Any, mode: str) -> Any:
    return threshold if np.isinf(threshold) else _finite_threshold(threshold, dtype, mode)


def around(converter: Converter) -> Converter:
    """`converter`, with what it makes put right."""

    def convert(scope: Any, operator: Any, container: Any) -> None:
        estimator = operator.raw_operator
        is_precise = isinstance(operator.inputs[0].type, DoubleTensorType)
        with contextlib.nullcontext() if is_precise else _rounded_down(estimator):
            # Told of version 3, those of scikit-learn keep float64 as far as here.
            version = {"op_version": 3} if is_precise and type(estimator) in _KINDS else {}
            converter(scope, operator, _Container(container, estimator, is_precise=is_precise), **version)

    return convert


@contextlib.contextmanager
def _rounded_down(estimator: Any) -> Iterator[None]:
    """The estimator with float64 thresholds as float32 that decide alike; afterwards as it was."""
    predictors = [each for several in getattr(estimator, "_predictors", ()) for each in several]
    kept = [predictor.nodes for predictor in predictors]
    for predictor in predictors:
        predictor.nodes = predictor.nodes.copy()
        predictor.nodes["num_threshold"] = trees.rounded_down(predictor.nodes["num_threshold"])
    booster = getattr(estimator, "_Booster", None)
    is_lightgbm = type(estimator).__module__.startswith("lightgbm.")  # XGBoost compares float32 already.
    if is_lightgbm:
        estimator._Booster = lightgbm_trees.with_float32_thresholds(booster)
    try:
        yield
    finally:
        for predictor, nodes in zip(predictors, kept, strict=True):
            predictor.nodes = nodes
        if is_lightgbm:
            estimator._Booster = booster


class _Container:
    """Takes the nodes that a converter makes, and hands them on put right."""

    def __init__(self, container: Any, estimator: Any, *, is_precise: bool) -> None:
        self._container = container
        self._lefts = _missing_go_left(estimator)
        self._is_precise = is_precise
        self._compares_float32 = type(estimator).__module__.startswith("xgboost.")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def add_node(self, op_type: str, inputs: Any, outputs: Any, **given: Any) -> None:
        attributes = {name: _plain(value) for name, value in given.items()}
        if op_type.startswith("TreeEnsemble"):
            attributes = {**attributes, **self._missing(attributes)}
            if self._is_precise and self._compares_float32:
                inputs = self._as_float32(inputs)
            elif self._is_precise:
                attributes = {**_wide(attributes), "op_version": 3}
        self._container.add_node(op_type, inputs, outputs, **attributes)

    def _as_float32(self, inputs: Sequence[str]) -> list[str]:
        narrow = f"{inputs[0]}_float32"
        self._container.add_node("Cast", list(inputs), [narrow], to=TensorProto.FLOAT, name=f"{narrow}_cast")
        return [narrow]

    def _missing(self, attributes: Mapping[str, Any]) -> dict[str, list[int]]:
        if not self._lefts:
            return {}
        where = zip(attributes["nodes_treeids"], attributes["nodes_nodeids"], strict=True)
        return {"nodes_missing_value_tracks_true": [int(self._lefts[place][node]) for place, node in where]}


def _missing_go_left(estimator: Any) -> Sequence[Array]:
    """By tree and node: whether NaN goes left. None of these for estimators whose converter knows."""
    if type(estimator) not in _KINDS:
        return []
    found = (
        [estimator] if hasattr(estimator, "tree_") else np.asarray(getattr(estimator, "estimators_", ())).reshape(-1)
    )
    return [each.tree_.missing_go_to_left for each in found]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [int(each) if isinstance(each, bool | np.integer | np.bool_) else each for each in value]
    return value


def _wide(attributes: Mapping[str, Any]) -> dict[str, Any]:
    wide = {name: value for name, value in attributes.items() if name in _WIDE and len(value)}
    rest = {name: value for name, value in attributes.items() if name not in _WIDE}
    return rest | {
        f"{name}_as_tensor": numpy_helper.from_array(np.asarray(value, dtype=np.float64).reshape(-1), name)
        for name, value in wide.items()
    }
