"""Messages as JSON in Triton's form.

Unlike in protobuf's own JSON, 64-bit numbers are numbers, and plain fields without a value are present.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson
from google.protobuf.message import Message

from mesh.rpc.heavy_work import Steps

# Messages of a list within a message in one step: 1 ms.
_STEP_MESSAGES = 32


def as_json(message: Message) -> dict[str, Any]:
    """Return all fields with a value, and all plain fields without one."""
    return {field.name: _value(field, getattr(message, field.name)) for field in _present(message)}


def _present(message: Message) -> Iterator[Any]:
    for field in message.DESCRIPTOR.fields:
        is_single_message = field.message_type is not None and not field.is_repeated
        if (is_single_message or field.containing_oneof is not None) and not message.HasField(field.name):
            continue
        yield field


def list_json(name: str, messages: Iterable[Message]) -> Steps[bytes]:
    """Return an object with one list of messages as JSON. Each message takes a step, and a long list in it several."""
    found = []
    for message in messages:
        fields: dict[str, Any] = {}
        for field in _present(message):
            value = getattr(message, field.name)
            if field.is_repeated and field.message_type is not None and not _is_map(field):
                fields[field.name] = values = []
                for n, each in enumerate(value, 1):
                    values.append(as_json(each))
                    if not n % _STEP_MESSAGES:
                        yield
            else:
                fields[field.name] = _value(field, value)
        found.append(orjson.dumps(fields))
        yield
    return b'{"%b":[%b]}' % (name.encode(), b",".join(found))


def _is_map(field: Any) -> bool:
    is_map: bool = field.message_type.GetOptions().map_entry
    return is_map


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None and _is_map(field):
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
