"""Corrections of skl2onnx 1.20 for trees, applied while it makes their nodes.

missing values   skl2onnx always sends NaN to the right; the tree has learned the side (`missing_go_to_left`).
thresholds       skl2onnx rounds those of HistGradientBoosting to the nearest float32. One that is rounded up sends a
                 float32 value to the left that belongs to the right. Thresholds are rounded down before the export.
float64          skl2onnx computes thresholds in float64, but writes float32. Thresholds are written as float64.
infinity         A threshold that only separates missing values is infinite, and skl2onnx's search for the float64
                 next to it never ends. An infinite threshold is not changed.
onnx 1.23        onnx rejects booleans among integers. Booleans are converted to integers.

Trees of XGBoost and LightGBM in a pipeline are corrected too. Thresholds of LightGBM are rounded down likewise. A
float64 graph rounds the inputs of XGBoost's trees to float32, as XGBoost does.
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
"""Attributes that can be float64, as tensors, since version 3 of the tree operators."""


def install_corrections() -> None:
    """Register the corrected converters in skl2onnx, once for the process."""
    if tree_ensemble.sklearn_threshold is not _threshold:
        tree_ensemble.sklearn_threshold = _threshold
    for kind in _KINDS:
        name = sklearn_operator_name_map[kind]
        registered = get_converter(name)
        # The registered wrapper does not take a version, the inner function does.
        converter: Converter = registered._fct
        if converter.__module__ != __name__:
            options = registered.get_allowed_options()
            update_registered_converter(kind, name, get_shape_calculator(name), corrected(converter), options=options)


_finite_threshold = tree_ensemble.sklearn_threshold


def _threshold(threshold: float, dtype: Any, mode: str) -> Any:
    return threshold if np.isinf(threshold) else _finite_threshold(threshold, dtype, mode)


def corrected(converter: Converter) -> Converter:
    """Return `converter` with its nodes corrected."""

    def convert(scope: Any, operator: Any, container: Any) -> None:
        estimator = operator.raw_operator
        is_precise = isinstance(operator.inputs[0].type, DoubleTensorType)
        with contextlib.nullcontext() if is_precise else _rounded_down(estimator):
            # With version 3, scikit-learn's converters keep float64 up to this point.
            version = {"op_version": 3} if is_precise and type(estimator) in _KINDS else {}
            converter(scope, operator, _Container(container, estimator, is_precise=is_precise), **version)

    return convert


@contextlib.contextmanager
def _rounded_down(estimator: Any) -> Iterator[None]:
    """Give the estimator float32 thresholds that decide alike; restore the float64 ones afterwards."""
    predictors = [each for several in getattr(estimator, "_predictors", ()) for each in several]
    kept = [predictor.nodes for predictor in predictors]
    for predictor in predictors:
        predictor.nodes = predictor.nodes.copy()
        predictor.nodes["num_threshold"] = trees.rounded_down(predictor.nodes["num_threshold"])
    booster = getattr(estimator, "_Booster", None)
    # XGBoost compares in float32 already.
    is_lightgbm = type(estimator).__module__.startswith("lightgbm.")
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
    """Container that corrects the nodes which a converter adds."""

    def __init__(self, container: Any, estimator: Any, *, is_precise: bool) -> None:
        self._container = container
        self._lefts = _missing_go_left(estimator)
        self._is_precise = is_precise
        self._compares_float32 = type(estimator).__module__.startswith("xgboost.")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def add_node(self, op_type: str, inputs: Any, outputs: Any, **attributes: Any) -> None:
        attributes = {name: _plain(value) for name, value in attributes.items()}
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
        return {"nodes_missing_value_tracks_true": [int(self._lefts[tree_id][node]) for tree_id, node in where]}


def _missing_go_left(estimator: Any) -> Sequence[Array]:
    """Return, by tree and node, whether NaN goes left; empty for estimators whose converter handles NaN."""
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
