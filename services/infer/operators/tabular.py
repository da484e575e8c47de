"""Rows of a table as a model takes them: missing numbers filled, numbers standardised, categories one-hot.

The numbers come from a JSON file, most often scikit-learn's attributes:

    {"mean": [..], "std": [..], "fill": [..], "categories": [[1, 2, 3], [10, 20]]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from kernels.tabular import Columns, columns, tabular
from services.infer.operators.operation import Results, Setting, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value
from shoal.errors import FailedPrecondition


class TabularParameters(Parameters):
    """Of `tabular`."""

    file: str = "tabular.json"
    numbers: Literal["FP32", "FP64"] = "FP32"
    """The datatype of the numbers, and of the arithmetic on them."""


class _Fitted(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    mean: list[float] = []
    std: list[float] | None = None
    fill: list[float | None] | None = None
    """None (`null`) leaves a missing number missing."""
    categories: list[list[int]] = []


class Tabular:
    """Numbers (NaN where missing) and INT64 codes to FP32 features."""

    is_batched = True
    only_computes = True

    def __init__(self, parameters: TabularParameters, setting: Setting) -> None:
        self._place = setting.place
        self._columns = _columns(parameters, setting)
        numbers, codes = self._columns.inputs
        self._dtype = self._columns.dtype
        self._columns = self._columns.moved(setting.place.put)
        # A table may have columns of one kind only: then the other input is not there.
        has = {"numbers": numbers, "codes": codes}
        kinds = {"numbers": parameters.numbers, "codes": "INT64"}
        self.inputs = tuple(spec(name, kinds[name], count) for name, count in has.items() if count)
        self.outputs = (spec("features", "FP32", self._columns.width),)

    def run(self, inputs: Mapping[str, Value]) -> Results:
        count = len(next(iter(inputs.values())))
        numbers = inputs.get("numbers", np.empty((count, 0), self._dtype))
        codes = inputs.get("codes", np.empty((count, 0), np.int64))
        put, give = self._place.put, self._place.give
        return Results({"features": give(tabular(self._columns, put(numbers), put(codes)))})

    def example(self) -> Mapping[str, Value]:
        return {each.name: np.zeros((1, *each.shape[1:]), each.datatype.dtype) for each in self.inputs}


def _columns(parameters: TabularParameters, setting: Setting) -> Columns:
    try:
        fitted = _Fitted.model_validate(json.loads(setting.assets.text(parameters.file)))
        if not fitted.mean and not fitted.categories:
            raise ValueError("it has neither 'mean' nor 'categories'")
        fill = None if fitted.fill is None else [np.nan if each is None else each for each in fitted.fill]
        return columns(
            mean=fitted.mean,
            std=fitted.std,
            fill=fill,
            categories=fitted.categories,
            dtype="float32" if parameters.numbers == "FP32" else "float64",
        )
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FailedPrecondition(f"operation tabular: {parameters.file}: '{where}': {first['msg']}") from err
    except (ValueError, TypeError) as err:
        raise FailedPrecondition(f"operation tabular: {parameters.file}: {err}") from err
