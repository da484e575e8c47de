"""HTTP/2 frames (RFC 9113, sections 4 and 6): frame types, frame encoding, error codes."""

from __future__ import annotations

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITIZED = 0x20

HEADER = struct.Struct(">BHBBI")
"""Frame header: length (24 bits, in two parts), type, flags, stream."""
HEADER_BYTES = 9

TABLE_SIZE, ENABLE_PUSH, MAX_STREAMS, WINDOW_SIZE, FRAME_SIZE, HEADER_LIST_SIZE = 1, 2, 3, 4, 5, 6
"""Numbers of the settings."""

DEFAULT_WINDOW = 65_535
DEFAULT_FRAME = 16_384
DEFAULT_TABLE = 4096
LARGEST_FRAME = (1 << 24) - 1
LARGEST_WINDOW = (1 << 31) - 1


class Reason(IntEnum):
    """Error codes of RST_STREAM and GOAWAY (RFC 9113, section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11


class ConnectionBroken(Exception):
    """The peer violated the protocol: the connection is closed with `reason`."""

    def __init__(self, reason: Reason, what: str) -> None:
        super().__init__(what)
        self.reason = reason


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    size = len(payload)
    return HEADER.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def opening(kind: int, flags: int, stream: int, size: int) -> bytes:
    """Encode the header of a frame whose payload of `size` bytes follows."""
    return HEADER.pack(size >> 16, size & 0xFFFF, kind, flags, stream)


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", key, value) for key, value in values.items()))


def window_update(stream: int, size: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", size))


def rst_stream(stream: int, reason: Reason) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", reason))


def goaway(last: int, reason: Reason, what: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", last, reason) + what.encode()[:256])


def without_padding(payload: bytes, flags: int) -> bytes:
    """Return the payload of DATA or HEADERS without padding. Raises ConnectionBroken for more padding than payload."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionBroken(Reason.PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - payload[0]]
