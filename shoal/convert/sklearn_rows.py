"""Random rows for a fitted scikit-learn estimator, near the values that it learned from its data.

trees               near their thresholds (shoal/convert/trees.py), mapped back through the steps before the trees
scalers, imputers   around the learned mean or range
others              standard normal
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.convert import lightgbm_trees, trees, xgboost_trees
from shoal.convert.original import Array
from shoal.convert.sklearn_exporters import components


def draw(estimator: Any, features: int, rows: int, generator: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    """Return `[rows, features]` of `dtype`, float32 or float64; NaN only where the estimator takes it."""
    steps: Sequence[Any] = [step for _, step in estimator.steps] if hasattr(estimator, "steps") else [estimator]
    steps = [step for step in steps if step is not None and step != "passthrough"]
    drawn = _of_training_data(steps[0], features, rows, generator)
    splits = _splits(steps[-1])
    if splits.thresholds or splits.categories:
        drawn = _through_inverse(steps[:-1], trees.draw(splits, rows, generator, dtype), drawn)
    if _takes_missing(estimator):
        drawn[generator.random(drawn.shape) < 0.05] = np.nan
    return drawn.astype(dtype)


def _through_inverse(before: Sequence[Any], rows: Array, fallback: Array) -> Array:
    """Return inputs that the steps `before` transform to about `rows`; `fallback` when a step has no inverse."""
    found = rows.astype(np.float64)
    for step in reversed(before):
        if not hasattr(step, "inverse_transform"):
            return fallback
        found = step.inverse_transform(np.nan_to_num(found))
    return np.asarray(found) if found.shape == fallback.shape else fallback


def _of_training_data(first: Any, features: int, rows: int, generator: np.random.Generator) -> Array:
    middle, spread = np.zeros(features), np.ones(features)
    if (mean := getattr(first, "mean_", None)) is not None and np.shape(mean) == (features,):
        middle = np.asarray(mean)
        scale = getattr(first, "scale_", None)
        spread = np.ones(features) if scale is None else np.asarray(scale)
    elif hasattr(first, "data_min_"):
        middle, spread = (first.data_min_ + first.data_max_) / 2, (first.data_max_ - first.data_min_) / 2
    elif hasattr(first, "center_") and hasattr(first, "scale_"):
        middle, spread = np.broadcast_to(first.center_, features), np.broadcast_to(first.scale_, features)
    else:
        # Training rows, or rows that represent them.
        for name in ("support_vectors_", "cluster_centers_", "_fit_X"):
            seen = getattr(first, name, None)
            if isinstance(seen, np.ndarray) and seen.ndim == 2:
                middle, spread = seen.mean(axis=0), seen.std(axis=0)
    return np.asarray(generator.normal(middle, 1.5 * spread + 1e-12, (rows, features)))


def _splits(last: Any) -> trees.Splits:
    if type(last).__module__.startswith("xgboost."):
        return xgboost_trees.splits(last.get_booster())
    if type(last).__module__.startswith("lightgbm."):
        return lightgbm_trees.splits(last.booster_.model_to_string(), last.n_features_in_)
    found: dict[int, set[float]] = {}
    for component in components(last):
        for feature, threshold in _of_tree(component):
            found.setdefault(int(feature), set()).add(float(threshold))
    features = int(getattr(last, "n_features_in_", 0))
    return trees.Splits(features, {feature: np.array(sorted(values)) for feature, values in found.items()})


def _of_tree(component: Any) -> list[tuple[int, float]]:
    if hasattr(component, "tree_"):
        inner = component.tree_.children_left != -1
        return list(zip(component.tree_.feature[inner], component.tree_.threshold[inner], strict=True))
    pairs = []
    for predictors in getattr(component, "_predictors", ()):
        for predictor in predictors:
            nodes = predictor.nodes[(predictor.nodes["is_leaf"] == 0) & (predictor.nodes["is_categorical"] == 0)]
            pairs += list(zip(nodes["feature_idx"], nodes["num_threshold"], strict=True))
    return pairs


def _takes_missing(estimator: Any) -> bool:
    from sklearn.utils import get_tags

    return bool(get_tags(estimator).input_tags.allow_nan)
