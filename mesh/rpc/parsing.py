"""Parse of requests, bounded before: protobuf holds the GIL while it parses, also in a thread.

    message ──up to 4 KiB─────────────────────────────────────────> protobuf
            ──up to 128 KiB──> turn (heavy_work) ─────────────────> protobuf
            ──larger──> turns: scan, in slices ──in bounds──> turn ──> protobuf
                                            └──> INVALID_ARGUMENT

The scan walks the wire format (protobuf.dev, "Encoding"). It jumps over text, bytes and packed numbers, and ends when
the rest has at most 128 KiB: a message with large tensors costs it a few steps. All bounds together keep a parse below
50 ms on one core of 2.x GHz; the times below are from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Generic, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from mesh.rpc.heavy_work import HeavyWork, Steps
from shoal.errors import InvalidArgument

Q = TypeVar("Q")

TURN_BYTES = 4 << 10
"""Smaller messages cost less to parse than the rest of their call."""

UNSCANNED_BYTES = 128 << 10
"""Messages of up to this size are not scanned. The costliest (a submessage with an entry of a map in each 4 bytes)
takes 43 ns a byte to parse: 6 ms."""

MAX_FIELDS = 100_000
"""Submessages and other fields of a larger message, without `MAX_ELEMENTS`. The scan of so many takes 60 ms in 100
slices, and protobuf 10 ms."""

MAX_ELEMENTS = 300_000
"""Texts or bytes of a larger message that follow another of their field, as in BYTES tensors. The scan of so many takes
30 ms in 20 slices, and protobuf 13 ms."""

PACKED_BYTES = 2 << 20
"""Packed integers and booleans of a larger message: each byte may become 8. 2 MiB take 7 ms to parse, 4 MiB took 83."""

# A slice of the scan takes 0.6 ms.
_SLICE_FIELDS = 1_024

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
# The varints of a tag, of a length and of a value end within so many bytes.
_VARINT_BYTES = 10
_JUMPED = frozenset(
    {
        FieldDescriptor.TYPE_STRING,
        FieldDescriptor.TYPE_BYTES,
        FieldDescriptor.TYPE_FLOAT,
        FieldDescriptor.TYPE_DOUBLE,
        FieldDescriptor.TYPE_FIXED32,
        FieldDescriptor.TYPE_FIXED64,
        FieldDescriptor.TYPE_SFIXED32,
        FieldDescriptor.TYPE_SFIXED64,
    }
)


class Parser(Generic[Q]):
    """Parses the messages of one class. Raises InvalidArgument for bytes that are no such message."""

    def __init__(self, parse: Callable[[bytes], Q]) -> None:
        """Parse with `parse`, a message class's `FromString`; any other function has no bounds."""
        self._parse = parse
        self.message: Descriptor | None = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)

    def __call__(self, data: bytes, start: int = 0) -> Q:
        """Parse a message that is small, or has its turn. It begins at `start`."""
        try:
            return self._parse(data[start:] if start else data)
        except Exception as err:
            raise _malformed(len(data) - start, err) from err


async def parse_in_turn(heavy: HeavyWork, tenant: bytes, parser: Parser[Q], data: bytes, start: int = 0) -> Q:
    """Return the message that begins at `start` of `data`; a small one without a wait. The caller counts its memory.

    Raises:
        InvalidArgument: `data` is malformed, or out of bounds.
    """
    if len(data) <= TURN_BYTES:
        return parser(data, start)
    return await heavy.run(tenant, _checked(parser, data, start))


def _checked(parser: Parser[Q], data: bytes, start: int) -> Steps[Q]:
    # Before its turn, a message is not even copied.
    if len(data) > UNSCANNED_BYTES and parser.message is not None:
        yield from scan(data, parser.message, start)
        yield
    return parser(data, start)


class _Fields(dict[int, "Descriptor | None"]):
    """Fields of a message by their tag: submessages with their class, and packed integers and booleans with None."""

    message: Descriptor


@cache
def _fields(message: Descriptor) -> _Fields:
    found = _Fields()
    found.message = message
    for field in message.fields:
        tag = field.number << 3 | _LENGTH
        if field.message_type is not None:
            found[tag] = field.message_type
        elif field.type not in _JUMPED:
            found[tag] = None
    return found


def scan(data: bytes, message: Descriptor, start: int = 0) -> Iterator[None]:
    """Check that protobuf can parse what begins at `start` in a short time; yield after each slice of the work.

    Raises:
        InvalidArgument: `data` has too many fields or packed integers, or is malformed; its tail is not checked.
    """
    fields, at, end = _fields(message), start, len(data)
    count = elements = packed = 0
    # The message without the scanned tensors.
    left = size_bytes = end - start
    outer: list[tuple[_Fields, int]] = []
    try:
        while True:
            while at >= end:
                if at > end:
                    raise _malformed(size_bytes, f"a field of {fields.message.full_name} is longer than its message")
                if not outer:
                    return
                fields, end = outer.pop()
            tag = data[at]
            if tag < 128:
                at += 1
            else:
                tag, at = varint(data, at)
            count += 1
            if not count % _SLICE_FIELDS:
                yield
            if count > MAX_FIELDS:
                raise _too_many(size_bytes, message, f"{MAX_FIELDS} fields and submessages", fields.message, tag)
            wire = tag & 7
            if wire != _LENGTH:
                at = at + _SIZES[wire] if wire else varint(data, at)[1]
                continue
            size = data[at]
            if size < 128:
                at += 1
            else:
                size, at = varint(data, at)
            is_jumped = tag not in fields
            if not is_jumped:
                inner = fields[tag]
                if inner is not None:
                    outer.append((fields, end))
                    fields, end = _fields(inner), at + size
                    if end > outer[-1][1]:
                        raise _malformed(size_bytes, f"a {inner.full_name} is longer than the message around it")
                    continue
                packed += size
                if packed > PACKED_BYTES:
                    most = f"{PACKED_BYTES} bytes of packed integers or booleans"
                    raise _too_many(size_bytes, message, most, fields.message, tag)
            at += size
            left -= size
            # More elements of the same field, as in BYTES tensors.
            while is_jumped and left > UNSCANNED_BYTES and at < end and data[at] == tag:
                size = data[at + 1]
                if size < 128:
                    at += 2 + size
                elif data[at + 2] < 128:
                    size += (data[at + 2] - 1) << 7
                    at += 3 + size
                else:
                    break
                left -= size
                elements += 1
                if not elements % (4 * _SLICE_FIELDS):
                    yield
                if elements > MAX_ELEMENTS:
                    raise _too_many(size_bytes, message, f"{MAX_ELEMENTS} elements", fields.message, tag)
            if left <= UNSCANNED_BYTES:
                return
    except (IndexError, KeyError):
        raise _malformed(size_bytes, "it ends inside a field, or has a field of an unknown kind") from None


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at `at`, and the place after it. Raises IndexError when it is too long, or cut."""
    value = 0
    for shift in range(0, 7 * _VARINT_BYTES, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise IndexError


def _malformed(size_bytes: int, error: Exception | str) -> InvalidArgument:
    return InvalidArgument(f"these {size_bytes} bytes are not a message of the expected type: {error}")


def _too_many(size_bytes: int, message: Descriptor, most: str, inner: Descriptor, tag: int) -> InvalidArgument:
    field = inner.fields_by_number.get(tag >> 3)
    name = field.full_name if field is not None else f"field {tag >> 3} of {inner.full_name}"
    return InvalidArgument(
        f"a {message.full_name} of {size_bytes} bytes has more than {most}, the last is {name}: send fewer at a time, "
        "and tensors in raw contents"
    )
