"""Results as an Arrow table, one row each. docs/store.md describes the columns.

Outputs keep the bytes of the inference protocol (little-endian; BYTES with a length of four bytes before each element).
A reader gets an array back with `numpy.frombuffer(data, dtype).reshape(shape)`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from google.protobuf.timestamp_pb2 import Timestamp

from shoal.inference.v2.inference_pb2 import InferParameter, ModelInferResponse
from shoal.oip.datatypes import BY_NAME
from shoal.oip.tensors import pack_bytes
from shoal.store.v1.store_pb2 import Result

_TIME = pa.timestamp("us", tz="UTC")
_OUTPUT = pa.struct(
    [("name", pa.string()), ("datatype", pa.string()), ("shape", pa.list_(pa.int64())), ("data", pa.binary())]
)
SCHEMA = pa.schema(
    [
        ("job_id", pa.string()),
        ("outcome", pa.string()),
        ("model_name", pa.string()),
        ("model_version", pa.string()),
        ("tenant", pa.string()),
        ("labels", pa.map_(pa.string(), pa.string())),
        ("code", pa.int32()),
        ("message", pa.string()),
        ("attempt", pa.int32()),
        ("instance", pa.string()),
        ("submitted_at", _TIME),
        ("recorded_at", _TIME),
        ("parameters", pa.string()),
        ("outputs", pa.list_(_OUTPUT)),
        ("answer_lost", pa.string()),
    ]
)
_SAME = ("job_id", "model_name", "model_version", "tenant", "code", "message", "attempt", "instance")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def table_of(results: Sequence[Result]) -> pa.Table:
    """Return the rows of `results`, in their order."""
    return pa.Table.from_pylist([_row(result) for result in results], SCHEMA)


def _row(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {field: getattr(result, field) for field in _SAME}
    row["outcome"] = Result.Outcome.Name(result.outcome).removeprefix("OUTCOME_").lower()
    row["labels"] = sorted(result.labels.items())
    for field in ("submitted_at", "recorded_at"):
        row[field] = _time(getattr(result, field)) if result.HasField(field) else None
    row["answer_lost"] = result.answer_lost or None
    if result.HasField("response"):
        row["parameters"] = _parameters(result.response)
        row["outputs"] = _outputs(result.response)
    return row


def _time(time: Timestamp) -> datetime:
    return _EPOCH + timedelta(seconds=time.seconds, microseconds=time.nanos // 1_000)


def _parameters(response: ModelInferResponse) -> str:
    return json.dumps({name: _value(parameter) for name, parameter in sorted(response.parameters.items())})


def _value(parameter: InferParameter) -> Any:
    which = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, which) if which else None
    if isinstance(value, float) and not math.isfinite(value):
        # As protobuf's JSON writes them: JSON has no such numbers, and readers reject the row.
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _outputs(response: ModelInferResponse) -> list[dict[str, Any]]:
    raw = response.raw_output_contents
    return [
        {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
            "data": (raw[at] if at < len(raw) else None) if raw else _bytes_of(output),
        }
        for at, output in enumerate(response.outputs)
    ]


def _bytes_of(output: ModelInferResponse.InferOutputTensor) -> bytes | None:
    """Return the raw contents of an output with typed contents; None for a datatype that has none."""
    datatype = BY_NAME.get(output.datatype)
    if datatype is None or not datatype.contents:
        return None
    values = getattr(output.contents, datatype.contents)
    if datatype.is_bytes:
        return pack_bytes(values)
    # A client can send values beyond their datatype's range. They wrap, as they do in memory.
    return np.asarray(values).astype(datatype.dtype).tobytes()
