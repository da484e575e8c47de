"""Streams of responses of gRPC as JSON: one record for each message, as NDJSON or server-sent events.

    GET /path?field=value ──query──> request ──handler──> messages ──> {...}\n {...}\n   or   data: {...}\n\n
                              └── 400: an unknown field            └── {"error": {...}}: the last record

Envoy's transcoder would lose an error in the middle of a stream, and names no unknown field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing
from functools import cached_property, partial
from typing import Any
from urllib.parse import parse_qsl

import orjson
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from mesh.rest.call import Events, RestCall, accepted
from mesh.rest.handlers import responses
from mesh.rpc.heavy_work import Steps
from shoal.errors import Code, InvalidArgument, quoted

_NDJSON, _EVENTS = b"application/x-ndjson", b"text/event-stream"

MAX_FIELDS = 1_100
"""Fields of a query: a filter has at most 1,000 ids of jobs."""


class JsonStream(RestCall):
    """A call whose response is a stream of records. Its errors have the form of JSON calls (docs/http-api.md)."""

    @cached_property
    def _has_events(self) -> bool:
        return _EVENTS in accepted(self.headers.get(b"accept", b""))

    @property
    def heartbeat(self) -> bytes:  # type: ignore[override] # Constant in the other calls.
        """Bytes that are sent when there is no record: a comment, or an empty line."""
        return b":\n\n" if self._has_events else b"\n"

    @property
    def events_type(self) -> bytes:
        return _EVENTS if self._has_events else _NDJSON

    def event(self, document: bytes) -> bytes:
        return super().event(document) if self._has_events else document + b"\n"

    def error_document(self, code: Code, message: str) -> bytes:
        text = message.encode(errors="replace").decode()
        return orjson.dumps({"code": int(code), "message": text, "details": []})

    def last_event(self, code: Code, message: str) -> bytes:
        return self.event(b'{"error":%b}' % self.error_document(code, message))


def followed(request: type[Message]) -> Callable[[RestCall], Any]:
    """Return the operation that serves an RPC's stream of responses; `request` is the class of its request."""
    return partial(_follow, request)


async def _follow(kind: type[Message], call: RestCall) -> Events:
    if await call.body():
        raise InvalidArgument("this call takes no body: its fields are in the query")
    request = kind()
    fields = call.target.fields
    read_query(call.query, request, fields)
    for name, value in fields.items():
        setattr(request, name, value)
    return _records(call, request)


async def _records(call: RestCall, request: Message) -> Events:
    async with aclosing(responses(call, call.target.rpc, request)) as found:
        async for response in found:
            yield await call.in_turn(_written(response))
            # A stream that waits for its next record keeps none of the last one.
            del response


def _written(message: Message) -> Steps[bytes]:
    """Return a message as JSON. The elements of its lists are steps: a list may have hundreds."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated and field.message_type is not None and not field.message_type.GetOptions().map_entry:
            elements = found[field.name] = []
            for element in getattr(message, field.name):
                elements.append(transcoded(element))
                yield
            message.ClearField(field.name)
    return orjson.dumps({**transcoded(message), **found})


def transcoded(message: Message) -> dict[str, Any]:
    """Return protobuf's JSON form of a message, as JSON calls have it: every field is there, also an empty one."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def read_query(query: str, request: Message, taken: Mapping[str, Any]) -> None:
    """Set the fields that a query names: `a=1&filter.b=c`, a list as a repeated name, a map as `labels.key=value`.

    Raises:
        InvalidArgument: a field is unknown, repeated, in the path (`taken`), or has a value of another type.
    """
    try:
        pairs = parse_qsl(
            query, keep_blank_values=True, strict_parsing=bool(query), errors="strict", max_num_fields=MAX_FIELDS
        )
    except ValueError as err:
        raise InvalidArgument(
            f"the query is malformed: expected name=value&... in UTF-8, at most {MAX_FIELDS} fields"
        ) from err
    document: dict[str, Any] = {}
    for name, text in pairs:
        if name in taken:
            raise InvalidArgument(f"field {quoted(name)} is in the path, and not in the query")
        _add(document, request.DESCRIPTOR, name, name, text)
    try:
        json_format.ParseDict(document, request)
    except json_format.ParseError as err:
        raise InvalidArgument(f"the query: {str(err)[:300]}") from err


def _add(document: dict[str, Any], message: Any, full: str, name: str, text: str) -> None:
    """Add the field `name` of `message` to a document; `full` is its name in the query."""
    first, _, rest = name.partition(".")
    field = message.fields_by_name.get(first)
    inner = None if field is None else field.message_type
    is_map = inner is not None and inner.GetOptions().map_entry
    # Timestamps and durations are texts.
    is_plain = inner is None or inner.file.package == "google.protobuf"
    if field is None or bool(rest) == is_plain or (field.is_repeated and not is_plain and not is_map):
        raise InvalidArgument(f"{message.full_name} has no field {quoted(full)} that a query can set")
    if is_plain and field.is_repeated:
        document.setdefault(first, []).append(_value(field, full, text))
        return
    into, key = (document, first) if is_plain else (document.setdefault(first, {}), rest)
    if not is_plain and not is_map:
        assert inner is not None
        _add(into, inner, full, rest, text)
    elif key in into:
        raise InvalidArgument(f"the query has the field {quoted(full)} twice")
    else:
        into[key] = _value(field, full, text)


def _value(field: FieldDescriptor, name: str, text: str) -> Any:
    if field.type != FieldDescriptor.TYPE_BOOL:
        return text
    if text not in ("true", "false"):
        raise InvalidArgument(f"field {quoted(name)}: expected true or false, got {quoted(text)}")
    return text == "true"
