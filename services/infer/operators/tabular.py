"""Operation `tabular`: table rows to features. Fills missing numbers, standardises numbers, one-hot encodes categories.

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
from services.infer.operators.operation import OperationContext, Results, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value
from shoal.errors import FailedPrecondition


class TabularParameters(Parameters):
    """Parameters of `tabular`."""

    file: str = "tabular.json"
    numbers: Literal["FP32", "FP64"] = "FP32"
    """Datatype of the numbers and of the arithmetic."""


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

    def __init__(self, parameters: TabularParameters, context: OperationContext) -> None:
        self._device = context.device
        self._columns = _columns(parameters, context)
        numbers, codes = self._columns.inputs
        self._dtype = self._columns.dtype
        self._columns = self._columns.moved(context.device.to_device)
        # A table may have columns of one kind only: the other input is left out.
        counts = {"numbers": numbers, "codes": codes}
        kinds = {"numbers": parameters.numbers, "codes": "INT64"}
        self.inputs = tuple(spec(name, kinds[name], count) for name, count in counts.items() if count)
        self.outputs = (spec("features", "FP32", self._columns.width),)

    def run(self, inputs: Mapping[str, Value]) -> Results:
        count = len(next(iter(inputs.values())))
        numbers = inputs.get("numbers", np.empty((count, 0), self._dtype))
        codes = inputs.get("codes", np.empty((count, 0), np.int64))
        to_device, to_value = self._device.to_device, self._device.to_value
        return Results({"features": to_value(tabular(self._columns, to_device(numbers), to_device(codes)))})

    def example(self) -> Mapping[str, Value]:
        return {known.name: np.zeros((1, *known.shape[1:]), known.datatype.dtype) for known in self.inputs}


def _columns(parameters: TabularParameters, context: OperationContext) -> Columns:
    try:
        fitted = _Fitted.model_validate(json.loads(context.assets.text(parameters.file)))
        if not fitted.mean and not fitted.categories:
            raise ValueError("it has neither 'mean' nor 'categories'")
        fill = None if fitted.fill is None else [np.nan if value is None else value for value in fitted.fill]
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
