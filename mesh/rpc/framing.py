"""gRPC messages in HTTP/2 bodies: one byte of flags, four bytes of length (big-endian), and the message.

Format: the gRPC protocol, PROTOCOL-HTTP2.md, "Length-Prefixed-Message".
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from shoal.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, ShoalError, Unimplemented

PREFIX = struct.Struct(">BI")
PREFIX_BYTES = PREFIX.size
"""Size of the prefix of each message."""

ACCEPTED = b"identity,deflate,gzip"
"""Supported compressions, in the form of the header `grpc-accept-encoding`."""

INLINE_BYTES = 256 << 10
"""Largest message, compressed and decompressed, that is decompressed on the event loop: it costs at most 1 ms."""

JOIN_BYTES = 4 << 20
"""Larger bodies are joined in a thread. On the event loop, 32 MiB took 57 ms: most of it for fresh memory."""

RETRY_MS = 1_000
"""Time after which a call that found no memory may be tried again: bodies of 100 MB arrive within it."""

PIECE_OVERHEAD = 64
"""Memory of a kept piece of a body beside its bytes."""

MOST_PIECES, PIECE_BYTES = 256, 256
"""A message may come in so many pieces of any size, and in more when they have so many bytes on average. To read
a piece of one byte costs a third of reading a small call."""

# Larger messages may grow by this factor. Tensors of numbers grow by 2 to 10; only constants and bombs reach 1000.
_MAX_RATIO, _FREE_BYTES = 100, 1 << 20

# Output and input of one step.
_STEP_BYTES, _SLICE_BYTES = 1 << 20, 64 << 10

_WBITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


def framed(message: bytes) -> bytes:
    """Return one message with its prefix, uncompressed."""
    return PREFIX.pack(0, len(message)) + message


class MessageParts:
    """A message that is serialised already, in parts: bytes-like, `size` bytes together. They are sent as they are."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Sequence[Any], size: int) -> None:
        self.parts = parts
        self.size = size


# Parts of a message that are joined: as much as a frame costs.
_SMALL_PART_BYTES = 16 << 10


def pieces(prefix: bytes, parts: Sequence[Any]) -> list[bytes | memoryview]:
    """Return the prefix and the parts of a message as pieces, of which the small ones are joined."""
    found: list[bytes | memoryview] = []
    small: list[Any] = [prefix]
    for part in parts:
        with memoryview(part) as view:
            is_large = view.nbytes > _SMALL_PART_BYTES
        if is_large:
            found += [b"".join(small), memoryview(part).cast("B")]
            small = []
        else:
            small.append(part)
    if small:
        found.append(b"".join(small))
    return found


class Unfinished(list[bytes]):
    """Parts of a message that are to be joined and decompressed."""

    is_compressed: bool

    def __init__(self, parts: Iterable[bytes], *, is_compressed: bool) -> None:
        super().__init__(parts)
        self.is_compressed = is_compressed


class Deframer:
    """Cuts the pieces of a body into whole messages. Large and compressed ones are `Unfinished`.

    Args:
        encoding: the call's `grpc-encoding`, or None.
        limit: maximal bytes of a message, compressed or not.
    """

    def __init__(self, encoding: bytes | None, limit: int) -> None:
        self._encoding = encoding if encoding not in (None, b"identity") else None
        self._limit = limit
        self._held = bytearray()
        # A large message is kept in parts: growing one buffer would copy it again and again.
        self._large: Unfinished | None = None
        self._missing = self._large_bytes = 0
        # Pieces that have come of a message which is not whole.
        self._pieces = 0

    def feed(self, data: bytes) -> Iterator[bytes | Unfinished]:
        """Yield the messages that are complete with `data`.

        Raises:
            InvalidArgument: the flags are invalid.
            ResourceExhausted: a message is larger than the limit. Its prefix says so, before the message has arrived.
                Or it comes in too many pieces.
        """
        self._pieces += 1
        if self._pieces > MOST_PIECES:
            check_pieces(self._pieces, self.holds + len(data))
        if self._large is not None:
            part = data[: self._missing]
            self._large.append(part)
            self._missing -= len(part)
            self._large_bytes += len(part)
            if self._missing:
                return
            large, self._large, self._large_bytes = self._large, None, 0
            self._pieces = 0
            yield large
            data = data[len(part) :]
        self._held += data
        while len(self._held) >= PREFIX_BYTES:
            flags, size = PREFIX.unpack_from(self._held)
            if flags > 1:
                raise InvalidArgument(
                    f"a message begins with the flags {flags}: expected 0, or 1 when it is compressed"
                )
            if size > self._limit:
                raise too_large(size, self._limit)
            if flags and self._encoding is None:
                raise not_encoded()
            end = PREFIX_BYTES + size
            if len(self._held) < end:
                if size > JOIN_BYTES:
                    self._begin_large(end, is_compressed=flags == 1)
                return
            message = bytes(memoryview(self._held)[PREFIX_BYTES:end])
            del self._held[:end]
            self._pieces = 0
            yield Unfinished([message], is_compressed=True) if flags else message

    def _begin_large(self, end: int, *, is_compressed: bool) -> None:
        part = bytes(memoryview(self._held)[PREFIX_BYTES:])
        self._large, self._large_bytes = Unfinished([part], is_compressed=is_compressed), len(part)
        self._missing = end - len(self._held)
        self._held = bytearray()

    @property
    def holds(self) -> int:
        """Bytes of a message that is not complete yet."""
        return len(self._held) + self._large_bytes

    def finish(self) -> None:
        """End the body. Raises InvalidArgument when a message is not complete."""
        if self._held or self._large is not None:
            raise InvalidArgument(f"the request ends inside a message: {self.holds} bytes are left over")


def inflated_inline(message: bytes | memoryview, encoding: bytes) -> bytes | None:
    """Decompress a small message. Return None for a large one. Raises InvalidArgument."""
    if len(message) > INLINE_BYTES:
        return None
    stream = zlib.decompressobj(_WBITS[encoding])
    try:
        plain = stream.decompress(message, INLINE_BYTES + 1)
    except zlib.error as err:
        raise _malformed(encoding, err) from err
    if len(plain) > INLINE_BYTES:
        return None
    _check_end(stream, encoding)
    return plain


def most_inflated(message: bytes | memoryview, encoding: bytes, limit: int) -> int:
    """Return the most bytes that a message may have when it is decompressed: its memory is reserved before."""
    most = min(limit, max(_FREE_BYTES, _MAX_RATIO * len(message)))
    # The last bytes of gzip are the size (RFC 1952, section 2.3.1). Damaged data fails when it is decompressed.
    return min(most, int.from_bytes(message[-4:], "little")) if encoding == b"gzip" else most


def inflated(
    message: bytes | memoryview, encoding: bytes, limit: int, is_over: Callable[[], bool], *, is_framed: bool = False
) -> bytes:
    """Return the decompressed message, with a prefix or without one. Runs in a thread, mostly without the GIL.

    It ends early, with any result, when `is_over` returns True.

    Raises:
        InvalidArgument: the data is malformed.
        ResourceExhausted: the message is larger than the limit, or grows too much.
    """
    most = most_inflated(message, encoding, limit)
    pieces: list[bytes] = []
    stream, view, size = zlib.decompressobj(_WBITS[encoding]), memoryview(message), 0
    try:
        # By slices: zlib copies what it has not consumed.
        for at in range(0, len(view), _SLICE_BYTES):
            left: bytes | memoryview = view[at : at + _SLICE_BYTES]
            piece = left
            while not stream.eof and (left or len(piece) == _STEP_BYTES) and not is_over():
                piece = stream.decompress(left, _STEP_BYTES)
                left = stream.unconsumed_tail
                size += len(piece)
                if size > most:
                    pieces.clear()
                    raise _too_much(len(message), size, encoding, limit)
                pieces.append(piece)
            if stream.eof:
                _check_end(stream, encoding, len(view) - at - _SLICE_BYTES)
                break
    except zlib.error as err:
        pieces.clear()
        raise _malformed(encoding, err) from err
    if not is_over():
        _check_end(stream, encoding)
    if is_framed:
        pieces.insert(0, PREFIX.pack(0, size))
    return b"".join(pieces)


def _too_much(sent: int, size: int, encoding: bytes, limit: int) -> ShoalError:
    if size > limit:
        return too_large(limit + 1, limit)
    if size > max(_FREE_BYTES, _MAX_RATIO * sent):
        return ResourceExhausted(
            f"a message of {encoding.decode()} grows from {sent} to more than {size - 1} bytes: at most "
            f"{_MAX_RATIO} times its size is accepted beyond {_FREE_BYTES} bytes: send it uncompressed"
        )
    return InvalidArgument(f"a message of {encoding.decode()} is larger than its last bytes say")


def _check_end(stream: Any, encoding: bytes, rest: int = 0) -> None:
    """Raise InvalidArgument for data that is cut, or followed by other data; `rest` bytes were not read yet."""
    if not stream.eof or stream.unused_data or rest > 0:
        problem = "is followed by something else" if stream.eof else "ends too early"
        raise InvalidArgument(f"a message of {encoding.decode()} {problem}")


def _malformed(encoding: bytes, err: zlib.error) -> InvalidArgument:
    return InvalidArgument(f"a message is marked as {encoding.decode()}, but is not: {err}")


def not_encoded() -> InvalidArgument:
    """Return the error of a compressed message in a call without compression."""
    return InvalidArgument("a message is marked as compressed, but the call has no grpc-encoding")


def check_encoding(encoding: bytes | None) -> None:
    """Raise Unimplemented for a `grpc-encoding` that is not supported."""
    if encoding not in (None, b"identity", *_WBITS):
        raise Unimplemented(
            f"grpc-encoding {(encoding or b'?')[:40]!r} is not supported: use one of {ACCEPTED.decode()}"
        )


def too_large(size: int, limit: int) -> ResourceExhausted:
    """Return the error of a message of `size` bytes that is larger than the limit."""
    return ResourceExhausted(f"Received message larger than max ({size} vs. {limit} bytes)")


def no_memory() -> ResourceExhausted:
    """Return the error of a call whose request, or a copy that it needs, finds no room."""
    return ResourceExhausted(
        f"too many bytes of unfinished requests are held: retry after {RETRY_MS} ms", retry_after_ms=RETRY_MS
    )


def check_pieces(count: int, size: int, most: int = MOST_PIECES) -> None:
    """Raise ResourceExhausted when `size` bytes of one message came in too many pieces: `count`."""
    if count > most and size < count * PIECE_BYTES:
        raise ResourceExhausted(
            f"a message came in {count} pieces of {size // count} bytes on average: "
            f"send at least {PIECE_BYTES} bytes at a time"
        )


def unread() -> ResourceExhausted:
    """Return the error of a call whose response finds no room."""
    return ResourceExhausted(
        f"too many bytes of responses are not read by this client: read them, and retry after {RETRY_MS} ms",
        retry_after_ms=RETRY_MS,
    )


def stalled(idle_s: float) -> DeadlineExceeded:
    """Return the error of a call whose body does not arrive."""
    return DeadlineExceeded(f"the body of the request made no progress for {idle_s:.0f} s: it is not whole")
