"""skl2onnx, with the exporters of other packages' estimators, and what has to be put right on the way."""

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
"""What is served today knows them; newer ones give these models nothing."""

_OTHERS = {
    "xgboost": (XGBOOST, "onnxmltools.convert.xgboost.operator_converters.XGBoost", "convert_xgboost"),
    "lightgbm": (LIGHTGBM, "onnxmltools.convert.lightgbm.operator_converters.LightGbm", "convert_lightgbm"),
}


def parts(estimator: Any) -> Iterator[Any]:
    """The estimator, and every estimator that it is built of."""
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
            yield from parts(each)


def others(estimator: Any) -> list[str]:
    """Packages besides scikit-learn that parts of it are of, and their exporter."""
    modules = {type(part).__module__.partition(".")[0] for part in parts(estimator)}
    found = sorted(modules & _OTHERS.keys())
    return [*found, "onnxmltools"] if found else []


def export(estimator: Any, features: int, *, is_precise: bool) -> onnx.ModelProto:
    """The estimator as ONNX, input `[None, features]` in float64 (`is_precise`) or float32.

    Raises:
        FailedPrecondition: skl2onnx cannot.
    """
    sklearn_trees.put_right()
    for part in parts(estimator):
        _register_other(part)
    kind = DoubleTensorType if is_precise else FloatTensorType
    try:
        model: onnx.ModelProto = to_onnx(
            estimator,
            initial_types=[("x", kind([None, features]))],
            options={id(part): options for part, options in _options(estimator)},
            target_opset=OPSETS,
            name="model",
        )
    except Exception as err:  # It raises whatever its converters and NumPy raise.
        raise FailedPrecondition(f"skl2onnx cannot convert it: {_first_line(err)}") from err
    return model


def _options(estimator: Any) -> Iterator[tuple[Any, dict[str, object]]]:
    if not hasattr(estimator, "classes_"):
        return
    last = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator
    # By default scores are made probabilities of a kind, and those a map of names to numbers, which is no tensor.
    wanted = {"zipmap": False, **({} if hasattr(estimator, "predict_proba") else {"raw_scores": True})}
    name = sklearn_operator_name_map.get(type(last), type(last).__name__)
    try:
        known = get_converter(name).get_allowed_options() or {}
    except ValueError:  # Nobody converts it: skl2onnx will say so.
        return
    yield last, {option: value for option, value in wanted.items() if option in known}


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
        type(estimator), type(estimator).__name__, shape, sklearn_trees.around(converter), options=options
    )


def _first_line(error: Exception) -> str:
    # Some of its messages carry the whole model.
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{' ...' if len(text) > 300 else ''}"
