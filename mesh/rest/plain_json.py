"""Messages as JSON in Triton's form.

Unlike in protobuf's own JSON, 64-bit numbers are numbers, and plain fields without a value are present.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
from google.protobuf.message import Message

from mesh.rpc.heavy_work import Steps


def as_json(message: Message) -> dict[str, Any]:
    """Return all fields with a value, and all plain fields without one."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and not field.is_repeated and not message.HasField(field.name):
            continue
        if field.containing_oneof is not None and not message.HasField(field.name):
            continue
        found[field.name] = _value(field, getattr(message, field.name))
    return found


def list_json(name: str, messages: Iterable[Message]) -> Steps[bytes]:
    """Return an object with one list of messages as JSON, each message in a step."""
    found = []
    for message in messages:
        found.append(orjson.dumps(as_json(message)))
        yield
    return b'{"%b":[%b]}' % (name.encode(), b",".join(found))


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        inner = field.message_type.fields_by_name["value"]
        return {str(key): _single(inner, value[key]) for key in value}
    if field.is_repeated:
        return [_single(field, each) for each in value]
    return _single(field, value)


def _single(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_json(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known else value
    return value.decode(errors="replace") if isinstance(value, bytes) else value
