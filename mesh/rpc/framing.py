"""gRPC messages in HTTP/2 bodies: one byte of flags, four bytes of length (big-endian), and the message.

Format: the gRPC protocol, PROTOCOL-HTTP2.md, "Length-Prefixed-Message".
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from shoal.errors import InvalidArgument, ResourceExhausted, Unimplemented

PREFIX = struct.Struct(">BI")
PREFIX_BYTES = PREFIX.size
"""Size of the prefix of each message."""

ACCEPTED = b"identity,deflate,gzip"
"""Supported compressions, in the form of the header `grpc-accept-encoding`."""

_PIECE_BYTES = 1 << 20

_WBITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


def framed(message: bytes) -> bytes:
    """Return one message with its prefix, uncompressed."""
    return PREFIX.pack(0, len(message)) + message


class Deframer:
    """Cuts the pieces of a body into whole messages.

    Args:
        encoding: the call's `grpc-encoding`, or None.
        limit: maximal bytes of a message, compressed or not.
    """

    def __init__(self, encoding: bytes | None, limit: int) -> None:
        self._encoding = encoding if encoding not in (None, b"identity") else None
        self._limit = limit
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that are complete with `data`.

        Raises:
            InvalidArgument: the flags or the compressed data are invalid.
            ResourceExhausted: a message is larger than the limit. Its prefix says so, before the message has arrived.
            Unimplemented: the compression is not supported.
        """
        self._held += data
        while len(self._held) >= PREFIX_BYTES:
            flags, size = PREFIX.unpack_from(self._held)
            if flags > 1:
                raise InvalidArgument(
                    f"a message begins with the flags {flags}: expected 0, or 1 when it is compressed"
                )
            if size > self._limit:
                raise too_large(size, self._limit)
            end = PREFIX_BYTES + size
            if len(self._held) < end:
                return
            message = bytes(memoryview(self._held)[PREFIX_BYTES:end])
            del self._held[:end]
            yield self._inflated(message) if flags else message

    @property
    def holds(self) -> int:
        """Bytes of a message that is not complete yet."""
        return len(self._held)

    def finish(self) -> None:
        """End the body. Raises InvalidArgument when a message is not complete."""
        if self._held:
            raise InvalidArgument(f"the request ends inside a message: {len(self._held)} bytes are left over")

    def _inflated(self, message: bytes) -> bytes:
        if self._encoding is None:
            raise InvalidArgument("a message is marked as compressed, but the call has no grpc-encoding")
        return inflated(message, self._encoding, self._limit)


def inflated(message: bytes, encoding: bytes, limit: int) -> bytes:
    """Decompress a message. Raises Unimplemented, InvalidArgument or ResourceExhausted, as `Deframer.feed` does."""
    check_encoding(encoding)
    stream, plain, left = zlib.decompressobj(_WBITS[encoding]), bytearray(), message
    try:
        # Decompressed piece by piece: the memory of an oversized message is freed here, not with its exception.
        while not stream.eof:
            piece = stream.decompress(left, _PIECE_BYTES)
            left = stream.unconsumed_tail
            if not piece and not left:
                break
            plain += piece
            if len(plain) > limit:
                plain.clear()
                raise too_large(limit + 1, limit)
    except zlib.error as err:
        plain.clear()
        raise InvalidArgument(f"a message is marked as {encoding.decode()}, but is not: {err}") from err
    if not stream.eof or stream.unused_data:
        plain.clear()
        problem = "is followed by something else" if stream.eof else "ends too early"
        raise InvalidArgument(f"a message of {encoding.decode()} {problem}")
    return bytes(plain)


def check_encoding(encoding: bytes | None) -> None:
    """Raise Unimplemented for a `grpc-encoding` that is not supported."""
    if encoding not in (None, b"identity", *_WBITS):
        raise Unimplemented(
            f"grpc-encoding {(encoding or b'?')[:40]!r} is not supported: use one of {ACCEPTED.decode()}"
        )


def too_large(size: int, limit: int) -> ResourceExhausted:
    """Return the error of a message of `size` bytes that is larger than the limit."""
    return ResourceExhausted(f"Received message larger than max ({size} vs. {limit} bytes)")
