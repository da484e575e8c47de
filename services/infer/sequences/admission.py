"""Admission check of sequence steps."""

from __future__ import annotations

from services.infer.error_text import quoted
from services.infer.requests.request import InferenceRequest
from services.infer.sequences import rejections
from shoal.errors import InvalidArgument
from shoal.oip.datatypes import Datatype

# Longest id that is a text, as in Triton.
_MAX_ID_BYTES = 128

# Ids that a control of 32 bits can carry. A control of 64 bits carries every id, if need be as a negative number.
_RANGES = {"INT32": (-(1 << 31), (1 << 31) - 1), "UINT32": (0, (1 << 32) - 1)}


def check(model: str, request: InferenceRequest, id_datatype: Datatype | None) -> None:
    """Check that a request can be a step of a sequence; `id_datatype` is that of the model's CORRID control, if any.

    Raises:
        InvalidArgument: no id, several rows, or an id that the control cannot carry.
    """
    id = request.parameters.sequence_id
    if not id:
        raise rejections.without_id(model)
    if request.rows > 1:
        raise rejections.too_many_rows(model, request.rows)
    if isinstance(id, str) and len(id.encode()) > _MAX_ID_BYTES:
        raise InvalidArgument(
            f"sequence_id for model '{model}': expected at most {_MAX_ID_BYTES} bytes, got {quoted(id)}"
        )
    if id_datatype is None or id_datatype.is_bytes:
        return
    least, most = _RANGES.get(id_datatype.name, (-(1 << 63), (1 << 64) - 1))
    if isinstance(id, int) and least < 0 and id >> 63:
        # Signed, as the client wrote the id.
        id -= 1 << 64
    if isinstance(id, str) or not least <= id <= most:
        raise InvalidArgument(
            f"sequence_id {quoted(str(id))} for model '{model}': its CONTROL_SEQUENCE_CORRID is {id_datatype.name}: "
            f"expected a number from {least} to {most}"
        )
