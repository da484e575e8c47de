"""What both ends of a connection have in common: frames are cut out of what comes, kept in order, and checked.

data_received ──whole frames──> DATA, header blocks (of HEADERS and CONTINUATION)      for whoever knows the calls
                                WINDOW_UPDATE, SETTINGS, PING                          done here, with the sender
"""

from __future__ import annotations

import asyncio
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping

from mesh.h2 import frames
from mesh.h2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_FRAME,
    END_HEADERS,
    GOAWAY,
    HEADER_BYTES,
    HEADERS,
    LARGEST_WINDOW,
    PING,
    PREFACE,
    PRIORITIZED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ConnectionBroken,
    Reason,
)
from mesh.h2.headers import Block, Decoder
from mesh.h2.sending import Sender

log = logging.getLogger(__name__)

STREAM_WINDOW = 4 << 20
CONNECTION_WINDOW = 256 << 20
# What a trusted peer may send before we took it: many large tensors at the same time.

CREDIT = 1 << 20
# Windows are opened again in steps of this size: an update costs as much as a small request.

_BLOCK_BYTES = 128 << 10
_CONTINUATIONS = 64
# Frames of one block: 128 KiB in frames of 16 KiB, with room. Else empty ones could come for ever.


class Peer(asyncio.Protocol, ABC):
    """One end. Its heirs know the calls.

    Args:
        awaits_preface: the other end is a client, which begins with one.
    """

    def __init__(self, *, awaits_preface: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder()
        self._sender = Sender(self._ended)
        self._rest = b""
        self._has_preface = not awaits_preface
        self._has_settings = False
        self._block: tuple[int, int, bytearray] | None = None
        self._continuations = 0
        self._newest = 0
        self._credit = 0

    def _begin(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment] # uvloop's is of no common class.
        self._sender.begin(self._transport)

    def _greet(self, settings: Mapping[int, int]) -> None:
        """Our settings, beside those that both ends have; and the connection's window."""
        ours = {
            frames.TABLE_SIZE: 0,
            **settings,
            frames.WINDOW_SIZE: STREAM_WINDOW,
            frames.HEADER_LIST_SIZE: 64 << 10,
        }
        self._sender.write(frames.settings(ours) + frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW))

    def pause_writing(self) -> None:
        self._sender.pause()

    def resume_writing(self) -> None:
        self._sender.resume()

    def data_received(self, data: bytes) -> None:
        try:
            self._take(data)
        except ConnectionBroken as err:
            self._break(err)
        except Exception:
            log.exception("a fault while reading a connection: it ends")
            self._break(ConnectionBroken(Reason.INTERNAL_ERROR, "internal error"))
        self._sender.flush()

    def _break(self, err: ConnectionBroken) -> None:
        log.warning("a connection is ended with %s: %s", err.reason.name, err)
        self._sender.write(frames.goaway(self._newest, err.reason, str(err)))
        self._sender.flush()
        self._transport.close()

    # -- frames

    def _take(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        if not self._has_preface:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, "this is no HTTP/2: the connection preface is missing")
            if end < len(PREFACE):
                self._rest = data
                return
            at, self._has_preface = len(PREFACE), True
        unpack = frames.HEADER.unpack_from
        while end - at >= HEADER_BYTES:
            high, low, kind, flags, number = unpack(data, at)
            size = high << 16 | low
            if size > DEFAULT_FRAME:
                raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, f"a frame of {size} bytes: at most {DEFAULT_FRAME}")
            start = at + HEADER_BYTES
            if start + size > end:
                break
            at = start + size
            if self._block is not None or not self._has_settings:
                self._check_order(kind)
            payload = data[start:at]
            if kind == DATA:
                self._on_data(number, flags, payload, size)
            elif kind == HEADERS:
                self._on_headers(number, flags, payload)
            else:
                self._on_other(kind, flags, number & LARGEST_WINDOW, payload)
        self._rest = data[at:]

    def _check_order(self, kind: int) -> None:
        if self._block is not None and kind != CONTINUATION:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "a header block is not continued")
        if not self._has_settings and kind != SETTINGS:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "the first frame is not SETTINGS")

    def _on_headers(self, number: int, flags: int, payload: bytes) -> None:
        if flags & (frames.PADDED | PRIORITIZED):
            payload = frames.without_padding(payload, flags)
            if flags & PRIORITIZED:
                payload = payload[5:]
        if not flags & END_HEADERS:
            self._block, self._continuations = (number, flags, bytearray(payload)), 0
            return
        self._on_block(number, flags, self._decoder.decode(payload))

    def _on_continuation(self, number: int, flags: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != number:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, first, held = self._block
        held += payload
        self._continuations += 1
        if len(held) > _BLOCK_BYTES or self._continuations > _CONTINUATIONS:
            raise ConnectionBroken(
                Reason.ENHANCE_YOUR_CALM,
                f"a header block of more than {_BLOCK_BYTES} bytes, or {_CONTINUATIONS} frames",
            )
        if flags & END_HEADERS:
            self._block = None
            self._on_block(number, first, self._decoder.decode(bytes(held)))

    def _on_other(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            self._on_window(number, payload)
        elif kind == RST_STREAM:
            if len(payload) != 4:
                raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "RST_STREAM of other than 4 bytes")
            self._on_reset(number, struct.unpack(">I", payload)[0])
        elif kind == SETTINGS:
            self._on_settings(number, flags, payload)
        elif kind == PING:
            if len(payload) != 8 or number:
                raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "PING of other than 8 bytes, or on a stream")
            if flags & ACK:
                self._acknowledged(payload)
            else:
                self._sender.acknowledge(frames.frame(PING, ACK, 0, payload))
        elif kind == CONTINUATION:
            self._on_continuation(number, flags, payload)
        elif kind == GOAWAY:
            self._on_goaway(payload)
        elif kind == PUSH_PROMISE:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "PUSH_PROMISE, which nobody here asks for")
        elif kind == PRIORITY and len(payload) != 5:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "PRIORITY of other than 5 bytes")

    def _on_window(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "WINDOW_UPDATE of other than 4 bytes")
        size = struct.unpack(">I", payload)[0] & LARGEST_WINDOW
        if not size:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        self._sender.widen(number, size)

    def _on_settings(self, number: int, flags: int, payload: bytes) -> None:
        if number or len(payload) % 6:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "SETTINGS that are none")
        if flags & ACK:
            self._decoder.forbid_table()
            return
        self._has_settings = True
        theirs = dict(struct.iter_unpack(">HI", payload))
        self._sender.settle(theirs)
        self._sender.acknowledge(frames.frame(SETTINGS, ACK, 0))
        self._settled(theirs)

    def _credited(self, size: int) -> None:
        """DATA of `size` bytes has come: the connection's window is opened again now and then."""
        self._credit += size
        if self._credit >= CREDIT:
            self._sender.write(frames.window_update(0, self._credit))
            self._credit = 0

    # -- for those who know the calls

    @abstractmethod
    def _on_data(self, number: int, flags: int, payload: bytes, size: int) -> None:
        """DATA has come, of `size` bytes with its padding."""

    @abstractmethod
    def _on_block(self, number: int, flags: int, block: Block) -> None:
        """A whole header block has come, with the flags of its HEADERS."""

    @abstractmethod
    def _on_reset(self, number: int, reason: int) -> None:
        """The other end has ended a stream."""

    @abstractmethod
    def _on_goaway(self, payload: bytes) -> None:
        """The other end wants no more streams."""

    @abstractmethod
    def _ended(self, number: int, reason: Reason | None) -> None:
        """Our side of a stream has ended: with all of it sent (None), or reset."""

    def _settled(self, settings: Mapping[int, int]) -> None:
        """The other end's settings have come, and are in use."""

    def _acknowledged(self, what: bytes) -> None:
        """The other end has answered the PING `what`: it has read all that was sent before."""
