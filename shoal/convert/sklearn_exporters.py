"""Export by skl2onnx, with the exporters for other packages' estimators and corrections of skl2onnx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import defs
from skl2onnx import to_onnx, update_registered_converter
from skl2onnx._supported_operators import sklearn_operator_name_map
from skl2onnx.common._registration import get_converter
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType
from skl2onnx.common.shape_calculator import (
    calculate_linear_classifier_output_shapes,
    calculate_linear_regressor_output_shapes,
)

from shoal.convert import sklearn_trees
from shoal.convert.extras import LIGHTGBM, XGBOOST, needed
from shoal.errors import FailedPrecondition

if TYPE_CHECKING:
    import onnx

OPSETS = {"": min(21, defs.onnx_opset_version()), "ai.onnx.ml": 3}
"""Opsets that present runtimes support; newer ones have no advantage for these models."""

_OTHERS = {
    "xgboost": (XGBOOST, "onnxmltools.convert.xgboost.operator_converters.XGBoost", "convert_xgboost"),
    "lightgbm": (LIGHTGBM, "onnxmltools.convert.lightgbm.operator_converters.LightGbm", "convert_lightgbm"),
}


def components(estimator: Any) -> Iterator[Any]:
    """Yield the estimator, and every estimator that it contains."""
    yield estimator
    inner = [step for _, step in getattr(estimator, "steps", ())]
    inner += [step for _, step, *_ in getattr(estimator, "transformers_", ())]
    inner += [step for _, step in getattr(estimator, "transformer_list", ())]
    for name in ("best_estimator_", "estimator_", "final_estimator_"):
        inner += [getattr(estimator, name)] if hasattr(estimator, name) else []
    if "calibrated_classifiers_" in vars(estimator):
        inner += [each.estimator for each in estimator.calibrated_classifiers_]
    found = getattr(estimator, "estimators_", ())
    inner += list(np.asarray(found, dtype=object).reshape(-1)) if len(found) else []
    for each in inner:
        if hasattr(each, "get_params"):
            yield from components(each)


def other_packages(estimator: Any) -> list[str]:
    """Return the packages besides scikit-learn that the estimator's parts come from, and their exporter."""
    modules = {type(component).__module__.partition(".")[0] for component in components(estimator)}
    found = sorted(modules & _OTHERS.keys())
    return [*found, "onnxmltools"] if found else []


def export(estimator: Any, features: int, *, is_precise: bool) -> onnx.ModelProto:
    """Return the estimator as ONNX, input `[None, features]` in float64 (`is_precise`) or float32.

    Raises:
        FailedPrecondition: skl2onnx cannot convert the estimator.
    """
    sklearn_trees.install_corrections()
    for component in components(estimator):
        _register_other(component)
    kind = DoubleTensorType if is_precise else FloatTensorType
    try:
        model: onnx.ModelProto = to_onnx(
            estimator,
            initial_types=[("x", kind([None, features]))],
            options={id(component): options for component, options in _options(estimator)},
            target_opset=OPSETS,
            name="model",
        )
    except Exception as err:
        # skl2onnx passes on every error of its converters and of NumPy.
        raise FailedPrecondition(f"skl2onnx cannot convert it: {_first_line(err)}") from err
    return model


def _options(estimator: Any) -> Iterator[tuple[Any, dict[str, object]]]:
    if not hasattr(estimator, "classes_"):
        return
    last = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator
    # By default skl2onnx turns scores into pseudo-probabilities, and probabilities into a map, which is not a tensor.
    options = {"zipmap": False, **({} if hasattr(estimator, "predict_proba") else {"raw_scores": True})}
    name = sklearn_operator_name_map.get(type(last), type(last).__name__)
    try:
        known = get_converter(name).get_allowed_options() or {}
    except ValueError:
        # No converter: the export reports that.
        return
    yield last, {option: value for option, value in options.items() if option in known}


def _register_other(estimator: Any) -> None:
    module = type(estimator).__module__.partition(".")[0]
    if module not in _OTHERS:
        return
    extra, where, function = _OTHERS[module]
    converter = getattr(needed(where, extra, f"converting a {type(estimator).__name__}"), function)
    is_classifier = hasattr(estimator, "classes_")
    shape = calculate_linear_classifier_output_shapes if is_classifier else calculate_linear_regressor_output_shapes
    options = {"nocl": [True, False], "zipmap": [True, False, "columns"]} if is_classifier else None
    update_registered_converter(
        type(estimator), type(estimator).__name__, shape, sklearn_trees.corrected(converter), options=options
    )


def _first_line(error: Exception) -> str:
    # Some messages contain the whole model.
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{' ...' if len(text) > 300 else ''}"
