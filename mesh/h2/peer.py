"""Base class of a server's and a client's connection: frame parsing, frame order, settings, PING.

data_received ──whole frames──> DATA, header blocks (of HEADERS and CONTINUATION)      for the subclass
                                WINDOW_UPDATE, SETTINGS, PING                          handled here, with the sender
"""

from __future__ import annotations

import asyncio
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping

from mesh.h2 import frames
from mesh.h2.bursts import Bursts
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
from mesh.h2.headers import LIST_BYTES, Block, Decoder, HeaderCache
from mesh.h2.memory_account import ClientShare, Share, unlimited
from mesh.h2.sending import Sender
from mesh.h2.turns import AT_ONCE, PART_FRAMES, PART_S, Lot, Turns

log = logging.getLogger(__name__)

# Bytes that a peer may send before they are consumed: many large tensors at the same time.
STREAM_WINDOW = 4 << 20
CONNECTION_WINDOW = 256 << 20

# Flow-control credit is given back in steps of this size: a WINDOW_UPDATE costs as much as a small request.
CREDIT = 1 << 20

# More frames than data can have.
_ALL = 1 << 30

READ_BYTES = 64 << 10
"""After so many bytes at a time, a connection waits for its turn to be read again. libuv would read 8 MiB of each
connection in one iteration of the event loop."""

_BLOCK_BYTES = 128 << 10
# Frames of one block: 128 KiB in frames of 16 KiB, with room. Without a bound, empty frames could go on without end.
_MAX_CONTINUATIONS = 64


class Peer(asyncio.Protocol, ABC):
    """One end of a connection. Subclasses handle streams.

    Args:
        awaits_preface: the other end is a client, which begins with the connection preface.
        cache: header cache that connections share; None: the connection has its own.
        unread: share of the memory for data that waits for the other end to read, unless a subclass finds one by
            stream (`_unread_share`); None: the data has no limit.
        turns: queue that connections share; None: all frames are handled when they arrive.
        bursts: turns that connections share for writing what waits; None: the connection has its own.
    """

    def __init__(
        self,
        *,
        awaits_preface: bool,
        cache: HeaderCache | None = None,
        unread: Share | None = None,
        turns: Turns | None = None,
        bursts: Bursts | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(HeaderCache() if cache is None else cache)
        self._unread_of_connection = unlimited() if unread is None else unread
        self._sender = Sender(self._ended, self._unread_share, bursts)
        self._turns = turns
        # Frames of earlier data wait for their turn; the transport cannot write.
        self._is_waiting = self._is_write_paused = False
        self._unparsed = b""
        self._has_preface = not awaits_preface
        self._has_settings = False
        self._block: tuple[int, int, bytearray] | None = None
        self._continuations = 0
        self._newest = 0
        self._credit = 0
        # Time that the data which arrived last took; what counts for its turns, and their kind (`Turns`).
        self._took_s = self.used_s = 0.0
        self.lot = Lot.DIRECT

    def _begin(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment] # uvloop's is of no common class.
        self._sender.attach(self._transport)

    def _unread_share(self, number: int) -> Share | ClientShare:
        """Return the share of the memory in which data of a stream that waits for the other end is counted."""
        return self._unread_of_connection

    def _send_settings(
        self, settings: Mapping[int, int], window: int = CONNECTION_WINDOW, stream_window: int = STREAM_WINDOW
    ) -> None:
        """Send `settings`, the settings that both ends share, and the windows of the connection and of its streams."""
        ours = {
            frames.TABLE_SIZE: 0,
            **settings,
            frames.WINDOW_SIZE: stream_window,
            frames.HEADER_LIST_SIZE: LIST_BYTES,
        }
        self._sender.write(frames.settings(ours) + frames.window_update(0, window - frames.DEFAULT_WINDOW))

    def pause_writing(self) -> None:
        self._sender.pause()

    def resume_writing(self) -> None:
        self._sender.resume()

    def data_received(self, data: bytes) -> None:
        if self._is_waiting:
            self._unparsed += data
            return
        if (turns := self._turns) is None:
            self._handle(data, _ALL)
            return
        if turns.must_wait(len(data), self._took_s):
            self._unparsed += data
            self._wait_for_turn(len(data))
            return
        began = turns.clock()
        self._handle(data, turns.at_once)
        self._took_s = turns.spent_since(began)

    def _handle(self, data: bytes, most: int) -> None:
        try:
            self._receive(data, most)
        except Exception as err:
            self._fail(err)
        self._sender.flush()

    def take_turn(self, frames: int) -> bool:
        """Handle some of the frames that wait. Return False when there are none any more (`Turns`)."""
        if not self._is_waiting:
            return False
        self._is_waiting = False
        self._handle(b"", frames)
        self._read_if_free()
        return True

    def _wait_for_turn(self, size: int) -> None:
        """Handle the rest of `size` bytes later. Meanwhile the connection is not read."""
        assert self._turns is not None
        self._is_waiting = True
        self._become(self._lot(size))
        self._turns.wait(self)
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def _become(self, lot: Lot) -> None:
        # What it has used is counted by kind.
        if lot is not self.lot:
            self.lot, self.used_s = lot, 0.0

    def _lot(self, size: int) -> Lot:
        """Return the kind of the connection while `size` bytes wait."""
        return Lot.DIRECT

    def _read_if_free(self) -> None:
        """Read from the transport again, unless there is another reason not to."""
        if not self._is_waiting and not self._is_write_paused and not self._transport.is_closing():
            self._transport.resume_reading()

    def _fail(self, err: Exception) -> None:
        """Close the connection: its peer is to blame for a ConnectionBroken, and this server for other exceptions."""
        if not isinstance(err, ConnectionBroken):
            log.error(
                "a fault while reading a connection: the connection is closed",
                {"event": "connection.read_failed"},
                exc_info=err,
            )
            err = ConnectionBroken(Reason.INTERNAL_ERROR, "internal error")
        self._break(err)

    def _break(self, err: ConnectionBroken) -> None:
        log.warning(
            "a connection is closed with %(code)s: %(error)s",
            {"event": "connection.protocol_error", "code": err.reason.name, "error": err},
        )
        self._sender.write(frames.goaway(self._newest, err.reason, str(err)))
        self._sender.flush()
        self._transport.close()

    # -- frames

    def _receive(self, data: bytes, most: int) -> None:
        if self._transport.is_closing():
            return
        if self._unparsed:
            data = self._unparsed + data
        at, end = 0, len(data)
        if not self._has_preface:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise ConnectionBroken(Reason.PROTOCOL_ERROR, "this is no HTTP/2: the connection preface is missing")
            if end < len(PREFACE):
                self._unparsed = data
                return
            at, self._has_preface = len(PREFACE), True
        unpack = frames.HEADER.unpack_from
        handled, checked, began = 0, _ALL if self._turns is None else PART_FRAMES, 0.0
        for handled in range(most):
            if end - at < HEADER_BYTES:
                break
            if handled == checked:
                assert self._turns is not None
                checked += PART_FRAMES
                now = self._turns.clock()
                if self._has_handled_enough(now - (began or now)):
                    self._wait_for_turn(end)
                    break
                began = began or now
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
                self._on_data(number & LARGEST_WINDOW, flags, payload, size)
            elif kind == HEADERS:
                self._on_headers(number & LARGEST_WINDOW, flags, payload)
            else:
                self._on_other(kind, flags, number & LARGEST_WINDOW, payload)
        else:
            if at < end:
                self._wait_for_turn(end)
        if (end > READ_BYTES or handled > AT_ONCE) and self._turns is not None and not self._is_waiting:
            if end > READ_BYTES:
                self._wait_for_turn(end)
            else:
                self._turns.used()
        self._unparsed = data[at:]

    def _has_handled_enough(self, took_s: float) -> bool:
        """Return True when the frames that are left must wait: those since the first part have taken `took_s`."""
        return took_s > PART_S

    def _check_order(self, kind: int) -> None:
        if self._block is not None and kind != CONTINUATION:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "a header block is not continued")
        if not self._has_settings and kind != SETTINGS:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "the first frame is not SETTINGS")

    def _on_headers(self, number: int, flags: int, payload: bytes) -> None:
        if flags & (frames.PADDED | PRIORITIZED):
            payload = frames.without_padding(payload, flags)
            if flags & PRIORITIZED:
                if len(payload) < 5:
                    raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "HEADERS too short for their priority")
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
        if len(held) > _BLOCK_BYTES or self._continuations > _MAX_CONTINUATIONS:
            raise ConnectionBroken(
                Reason.ENHANCE_YOUR_CALM,
                f"a header block of more than {_BLOCK_BYTES} bytes, or {_MAX_CONTINUATIONS} frames",
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
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "PUSH_PROMISE, which is not enabled")
        elif kind == PRIORITY and len(payload) != 5:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "PRIORITY of other than 5 bytes")

    def _on_window(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "WINDOW_UPDATE of other than 4 bytes")
        size = struct.unpack(">I", payload)[0] & LARGEST_WINDOW
        if not size:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        self._sender.add_window(number, size)

    def _on_settings(self, number: int, flags: int, payload: bytes) -> None:
        if number or len(payload) % 6:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "SETTINGS that are none")
        if flags & ACK:
            self._decoder.forbid_table()
            return
        self._has_settings = True
        theirs = dict(struct.iter_unpack(">HI", payload))
        self._sender.apply_settings(theirs)
        self._sender.acknowledge(frames.frame(SETTINGS, ACK, 0))
        self._settled(theirs)

    def _credited(self, size: int) -> None:
        """Give back the connection's credit of DATA of `size` bytes, in steps of CREDIT."""
        self._credit += size
        if self._credit >= CREDIT:
            self._sender.write(frames.window_update(0, self._credit))
            self._credit = 0

    # -- for subclasses

    @abstractmethod
    def _on_data(self, number: int, flags: int, payload: bytes, size: int) -> None:
        """Handle DATA of `size` bytes, padding included."""

    @abstractmethod
    def _on_block(self, number: int, flags: int, block: Block) -> None:
        """Handle a whole header block, with the flags of its HEADERS."""

    @abstractmethod
    def _on_reset(self, number: int, reason: int) -> None:
        """Handle RST_STREAM."""

    @abstractmethod
    def _on_goaway(self, payload: bytes) -> None:
        """Handle GOAWAY."""

    @abstractmethod
    def _ended(self, number: int, reason: Reason | None) -> None:
        """Handle the end of our side of a stream: all of it is sent (None), or it was reset."""

    def _settled(self, settings: Mapping[int, int]) -> None:
        """Handle the other end's settings, which are already applied."""

    def _acknowledged(self, payload: bytes) -> None:
        """Handle the acknowledgement of our PING: the other end has read everything that was sent before it."""
