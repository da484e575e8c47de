"""One client connection of a channel: requests out, responses in (RFC 9113).

    begin ──HEADERS, DATA──> peer ──HEADERS, DATA, HEADERS──> call.receive ... call.end

The connection accepts calls until it retires: the peer sent GOAWAY, the stream ids are used up, or the connection is
lost. Calls in flight may then finish, except those that the peer never began, and those of a lost connection.
A peer that is silent while calls are in flight is sent a PING, and is disconnected when it stays silent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
from collections.abc import Mapping
from typing import Protocol

import grpc

from mesh.h2 import frames
from mesh.h2.frames import END_STREAM, LARGEST_WINDOW, PING, PREFACE, ConnectionBroken, Reason
from mesh.h2.headers import Block
from mesh.h2.peer import CREDIT, STREAM_WINDOW, Peer
from mesh.rpc.client import failures
from mesh.rpc.client.calls import Call
from mesh.rpc.client.failures import CallFailed
from shoal.errors import ResourceExhausted, ShoalError

log = logging.getLogger(__name__)

S = grpc.StatusCode

TICK_S = 5.0
# Ticks of silence: PING after 5 to 10 s, disconnected 10 s later. A blocked event loop counts as one tick.
_PING_AFTER, _GIVE_UP_AFTER = 2, 4

# Envoy closes a connection with all its calls after 1,000 resets in a burst, or more than 33 a second after that.
_RESETS, _RESETS_A_S = 900.0, 30.0

# Longest time to send the remaining data of a connection that ends.
_CLOSE_S = 1.0


class ConnectionOwner(Protocol):
    """Owner of a connection: the channel."""

    def retire(self, connection: ClientConnection) -> None:
        """Handle a connection that accepts no more calls."""

    def lost(self, connection: ClientConnection) -> None:
        """Handle a connection that has ended."""

    def has_capacity(self) -> None:
        """Handle free capacity: a call has ended, and another may begin."""

    def repeat(self, call: Call) -> None:
        """Begin a call again that the peer never began."""


class ClientConnection(Peer):
    """Client connection. `address` is for messages; `ready` is done when the peer's settings have arrived."""

    def __init__(self, owner: ConnectionOwner, address: str, tick_s: float = TICK_S) -> None:
        super().__init__(awaits_preface=False)
        self._owner = owner
        self._address = address
        self._tick_s = tick_s
        self._silent_ticks = 0
        self._calls: dict[int, Call] = {}
        self._half_open: list[int] = []
        self._resets_left, self._resets_counted_at = _RESETS, self._loop.time()
        self._next = 1
        self._max_calls = 0
        self.is_retired = self._is_lost = False
        self.has_responded = False
        self.ready: asyncio.Future[None] = self._loop.create_future()

    # -- transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._begin(transport)
        self._sender.write(PREFACE)
        self._send_settings({frames.ENABLE_PUSH: 0})
        self._timer = self._loop.call_later(self._tick_s, self._tick)

    def data_received(self, data: bytes) -> None:
        self._silent_ticks = 0
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost("the connection was closed" if exc is None else str(exc) or type(exc).__name__)

    def _break(self, err: ConnectionBroken) -> None:
        super()._break(err)
        self._loop.call_later(_CLOSE_S, self._transport.abort)
        self._on_lost(f"the peer broke HTTP/2, {err.reason.name}: {err}")

    def abort(self, why: str) -> None:
        """End the connection and its calls immediately."""
        self._transport.abort()
        self._on_lost(why)

    def leave_to_parent(self) -> None:
        """Replace the socket by the null device in a forked child, which shares the socket with the parent.

        No byte of the child reaches the peer, and the peer sees the end when the parent closes the connection. Closing
        the socket object instead would free its number, which later clean-up of the transport might close once more.
        """
        socket = self._transport.get_extra_info("socket")
        number = -1 if socket is None else socket.fileno()
        if number >= 0:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number, inheritable=False)
            os.close(null)

    def _on_lost(self, why: str) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        self._timer.cancel()
        self._owner.lost(self)
        self._retire()
        self._sender.close()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.end(CallFailed(S.UNAVAILABLE, f"lost {self._address}: {why}"))
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(why))

    def _tick(self) -> None:
        self._silent_ticks = self._silent_ticks + 1 if self._calls else 0
        if self._silent_ticks >= _GIVE_UP_AFTER:
            silent_s = self._silent_ticks * self._tick_s
            self.abort(f"the peer has sent nothing for {silent_s:.0f} s, and does not acknowledge PING")
            return
        if self._silent_ticks == _PING_AFTER:
            self._sender.write(frames.frame(PING, 0, 0, b"shoal..."))
        self._timer = self._loop.call_later(self._tick_s, self._tick)

    # -- calls

    def accepts_calls(self) -> bool:
        """Return True when a call can begin now."""
        return len(self._calls) < self._max_calls and not self.is_retired and not self._transport.is_closing()

    def begin(self, call: Call, *, has_waited: bool) -> None:
        """Begin a call. Only when `accepts_calls` returns True."""
        number, self._next = self._next, self._next + 2
        call.owner, call.number = self, number
        self._calls[number] = call
        self._sender.open(number)
        call.start(self._sender, call.block(has_waited=has_waited))
        if self._next > LARGEST_WINDOW:
            self._retire()

    def drop(self, call: Call) -> None:
        """Cancel a call whose caller does not wait any more."""
        self._remove(call, Reason.CANCEL)

    def open_window(self, call: Call) -> None:
        """Give the peer credit for the consumed data of `call`, in steps of CREDIT bytes."""
        size = call.received - call.credited - call.held
        if size >= CREDIT:
            call.credited += size
            self._sender.write(frames.window_update(call.number, size))

    def _remove(self, call: Call, reason: Reason | None) -> None:
        if self._calls.pop(call.number, None) is None:
            return
        if reason is None and not call.is_sent:
            self._half_open.append(call.number)
        if reason is not None:
            self._reset(call.number, reason)
        self._on_call_removed()

    def _reset(self, number: int, reason: Reason) -> None:
        """Send RST_STREAM, as often as the peer tolerates.

        Long before that limit, the connection retires. Streams that are not reset end with the connection.
        """
        self._sender.forget(number)
        now = self._loop.time()
        self._resets_left = min(_RESETS, self._resets_left + (now - self._resets_counted_at) * _RESETS_A_S)
        self._resets_counted_at = now
        if self._resets_left >= 1:
            self._resets_left -= 1
            self._sender.write(frames.rst_stream(number, reason))
        if self._resets_left < _RESETS / 2:
            # The peer works: the next connection needs no backoff.
            self.has_responded = True
            self._retire()

    def _receive(self, data: bytes, most: int) -> None:
        super()._receive(data, most)
        if self._half_open:
            self._close_half_open()

    def _close_half_open(self) -> None:
        """End our side of streams whose response ended before the request.

        Most peers reset such a stream themselves, right after the response. Only unsent data needs a reset from here:
        Envoy treats many resets as an attack.
        """
        for number in self._half_open:
            if self._sender.has_unsent(number):
                self._reset(number, Reason.NO_ERROR)
            else:
                self._sender.end(number)
        self._half_open.clear()

    def _on_call_removed(self) -> None:
        if self.is_retired:
            self._close_when_done()
        else:
            self._owner.has_capacity()

    def _finish(self, call: Call, failure: CallFailed | None, reason: Reason | None = None) -> None:
        self._remove(call, reason)
        self.has_responded = True
        call.end(failure)

    def _unprocessed(self, call: Call, failure: CallFailed) -> None:
        if call.may_repeat and not call.has_headers:
            call.may_repeat = False
            self._owner.repeat(call)
        else:
            call.end(failure)

    # -- frames from the peer

    def _on_data(self, number: int, flags: int, payload: bytes, size: int) -> None:
        self._credited(size)
        call = self._calls.get(number)
        if call is None:
            self._check_known(number, "DATA")
            return
        if flags & frames.PADDED:
            payload = frames.without_padding(payload, flags)
        call.received += size
        if call.received - call.credited > STREAM_WINDOW:
            raise ConnectionBroken(Reason.FLOW_CONTROL_ERROR, f"more on stream {number} than its window")
        if not call.has_headers:
            self._finish(call, CallFailed(S.INTERNAL, "the response has no headers"), Reason.PROTOCOL_ERROR)
            return
        try:
            if payload:
                call.receive(payload)
        except ShoalError as err:
            code = S.RESOURCE_EXHAUSTED if isinstance(err, ResourceExhausted) else S.INTERNAL
            self._finish(call, CallFailed(code, err.message), Reason.CANCEL)
            return
        if flags & END_STREAM:
            self._finish(call, CallFailed(S.UNKNOWN, "the response ended without a grpc-status"))
        else:
            self.open_window(call)

    def _on_block(self, number: int, flags: int, block: Block) -> None:
        call = self._calls.get(number)
        if call is None:
            self._check_known(number, "HEADERS")
        elif call.has_headers:
            if flags & END_STREAM:
                self._finish(call, failures.of_trailers(block))
            else:
                self._finish(call, CallFailed(S.INTERNAL, "headers inside a response"), Reason.PROTOCOL_ERROR)
        elif flags & END_STREAM:
            self._finish(call, failures.of_head(block))
        elif failures.is_grpc_head(block):
            call.has_headers = True
        # After a status of 100 to 199 the response is still to come.
        elif not block.by_name.get(b":status", b"").startswith(b"1"):
            self._finish(call, failures.of_head(block), Reason.CANCEL)

    def _on_reset(self, number: int, reason: int) -> None:
        call = self._calls.pop(number, None)
        self._sender.forget(number)
        if call is None:
            self._check_known(number, "RST_STREAM")
            return
        failure = failures.of_reset(reason)
        if failure.is_unprocessed:
            self._unprocessed(call, failure)
        else:
            call.end(failure)
        self._on_call_removed()

    def _check_known(self, number: int, what: str) -> None:
        """Raise ConnectionBroken for a stream that was never opened. Frames of ended streams are ignored."""
        if not number & 1 or not 0 < number < self._next:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"{what} on stream {number}, which was never opened")

    def _on_goaway(self, payload: bytes) -> None:
        if len(payload) < 8:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "GOAWAY of less than 8 bytes")
        last, reason = struct.unpack_from(">II", payload)
        if reason != Reason.NO_ERROR:
            text = payload[8:].decode("utf-8", "replace")[:200]
            log.warning(
                "%(address)s ends the connection with error code %(error_code)d: %(details)s",
                {
                    "event": "channel.goaway",
                    "address": self._address,
                    "error_code": reason,
                    "details": text or "no details",
                },
            )
        self._retire()
        failure = CallFailed(S.UNAVAILABLE, f"{self._address} ended the connection (GOAWAY)", is_unprocessed=True)
        for number in [number for number in self._calls if number > last & LARGEST_WINDOW]:
            self._sender.forget(number)
            self._unprocessed(self._calls.pop(number), failure)
        self._close_when_done()

    def _settled(self, settings: Mapping[int, int]) -> None:
        if not self.ready.done():
            self._max_calls = LARGEST_WINDOW
            self.ready.set_result(None)
        self._max_calls = settings.get(frames.MAX_STREAMS, self._max_calls)
        self._owner.has_capacity()

    # -- the end

    def _ended(self, number: int, reason: Reason | None) -> None:
        call = self._calls.get(number)
        if call is None:
            return
        call.is_sent = True
        # The peer has made the stream's window larger than the maximum.
        if reason is not None:
            del self._calls[number]
            call.end(CallFailed(S.INTERNAL, f"{self._address} broke HTTP/2: {reason.name}"))
            self._on_call_removed()

    def _retire(self) -> None:
        if not self.is_retired:
            self.is_retired = True
            self._owner.retire(self)

    def _close_when_done(self) -> None:
        if self.is_retired and not self._calls and not self._transport.is_closing():
            self._sender.flush()
            self._transport.close()
            self._loop.call_later(_CLOSE_S, self._transport.abort)
