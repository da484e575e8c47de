"""One connection of a channel: calls out, answers in (RFC 9113, as a client).

    begin ──HEADERS, DATA──> peer ──HEADERS, DATA, HEADERS──> call.take ... call.end

It takes calls until it says so to its owner (`retire`): the peer said goodbye (GOAWAY), the ids of streams ran out, or
it is lost. Calls under way may finish, except those that the peer said it never began, and those of a lost connection.
A peer that says nothing while calls are under way is asked (PING), and given up soon after.
"""

from __future__ import annotations

import asyncio
import logging
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
_ASK_AFTER, _GIVE_UP_AFTER = 2, 4
# Ticks of silence: asked after 5 to 10 s, given up 10 s later. However long our own loop stands still, it is one tick.

_RESETS, _RESETS_A_S = 900.0, 30.0
# Envoy ends a connection, and all its calls, when more than 1,000 resets come at once and 33 a second after that.

_CLOSE_S = 1.0
# Longest for what a connection that ends still has to send.


class Owner(Protocol):
    """The channel, as a line needs it."""

    def retire(self, line: ClientConnection) -> None:
        """It takes no more calls."""

    def lost(self, line: ClientConnection) -> None:
        """It has ended."""

    def has_room(self) -> None:
        """A call has ended: another may begin."""

    def repeat(self, call: Call) -> None:
        """A call that the peer never began, and that may begin elsewhere."""


class ClientConnection(Peer):
    """A connection to `address`, a name for messages. `ready` is done once the peer's settings have come."""

    def __init__(self, owner: Owner, address: str, tick_s: float = TICK_S) -> None:
        super().__init__(awaits_preface=False)
        self._owner = owner
        self._address = address
        self._tick_s = tick_s
        self._silent = 0
        self._calls: dict[int, Call] = {}
        self._half_open: list[int] = []
        self._resets_left, self._reset_at = _RESETS, self._loop.time()
        self._next = 1
        self._most = 0
        self.is_retired = self._is_lost = False
        self.has_answered = False
        self.ready: asyncio.Future[None] = self._loop.create_future()

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._begin(transport)
        self._sender.write(PREFACE)
        self._send_settings({frames.ENABLE_PUSH: 0})
        self._timer = self._loop.call_later(self._tick_s, self._tick)

    def data_received(self, data: bytes) -> None:
        self._silent = 0
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("the connection was closed" if exc is None else str(exc) or type(exc).__name__)

    def _break(self, err: ConnectionBroken) -> None:
        super()._break(err)
        self._loop.call_later(_CLOSE_S, self._transport.abort)
        self._lose(f"it broke HTTP/2, {err.reason.name}: {err}")

    def abort(self, why: str) -> None:
        """Ends it at once, and its calls."""
        self._transport.abort()
        self._lose(why)

    def _lose(self, why: str) -> None:
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
        self._silent = self._silent + 1 if self._calls else 0
        if self._silent >= _GIVE_UP_AFTER:
            self.abort(f"it has said nothing for {self._silent * self._tick_s:.0f} s, and does not answer PING")
            return
        if self._silent == _ASK_AFTER:
            self._sender.write(frames.frame(PING, 0, 0, b"shoal..."))
        self._timer = self._loop.call_later(self._tick_s, self._tick)

    # -- calls

    def takes(self) -> bool:
        """Whether a call can begin now."""
        return len(self._calls) < self._most and not self.is_retired and not self._transport.is_closing()

    def begin(self, call: Call, *, has_waited: bool) -> None:
        """Sends a call off. Only where `takes` says so."""
        number, self._next = self._next, self._next + 2
        call.owner, call.number = self, number
        self._calls[number] = call
        self._sender.open(number)
        call.go(self._sender, call.block(has_waited=has_waited))
        if self._next > LARGEST_WINDOW:
            self._retire()

    def drop(self, call: Call) -> None:
        """The caller has gone."""
        self._forget(call, Reason.CANCEL)

    def open_window(self, call: Call) -> None:
        """Some of what came for `call` has been taken: the peer may send as much again, in large steps."""
        size = call.received - call.credited - call.held
        if size >= CREDIT:
            call.credited += size
            self._sender.write(frames.window_update(call.number, size))

    def _forget(self, call: Call, reason: Reason | None) -> None:
        if self._calls.pop(call.number, None) is None:
            return
        if reason is None and not call.is_sent:
            self._half_open.append(call.number)
        if reason is not None:
            self._reset(call.number, reason)
        self._one_less()

    def _reset(self, number: int, reason: Reason) -> None:
        """Tells the peer that nobody wants a stream's answer, as often as it bears that.

        Long before it does not, new calls go to another connection; what it is not told of ends with this one, soon.
        """
        self._sender.forget(number)
        now = self._loop.time()
        self._resets_left = min(_RESETS, self._resets_left + (now - self._reset_at) * _RESETS_A_S)
        self._reset_at = now
        if self._resets_left >= 1:
            self._resets_left -= 1
            self._sender.write(frames.rst_stream(number, reason))
        if self._resets_left < _RESETS / 2:
            self.has_answered = True  # It is not to blame.
            self._retire()

    def _take(self, data: bytes) -> None:
        super()._take(data)
        if self._half_open:
            self._close_half_open()

    def _close_half_open(self) -> None:
        """Answers came before the ends of their requests. Peers say so themselves, mostly right behind (RST_STREAM):
        else our side is ended here. Resets are for what would still be sent: Envoy takes many for an attack."""
        for number in self._half_open:
            if self._sender.has_unsent(number):
                self._reset(number, Reason.NO_ERROR)
            else:
                self._sender.end_data(number)
        self._half_open.clear()

    def _one_less(self) -> None:
        if self.is_retired:
            self._close_when_done()
        else:
            self._owner.has_room()

    def _finish(self, call: Call, failure: CallFailed | None, reason: Reason | None = None) -> None:
        self._forget(call, reason)
        self.has_answered = True
        call.end(failure)

    def _unprocessed(self, call: Call, failure: CallFailed) -> None:
        if call.may_repeat and not call.has_headers:
            call.may_repeat = False
            self._owner.repeat(call)
        else:
            call.end(failure)

    # -- what comes

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
            self._finish(call, CallFailed(S.INTERNAL, "the answer has no headers"), Reason.PROTOCOL_ERROR)
            return
        try:
            if payload:
                call.take(payload)
        except ShoalError as err:
            code = S.RESOURCE_EXHAUSTED if isinstance(err, ResourceExhausted) else S.INTERNAL
            self._finish(call, CallFailed(code, err.message), Reason.CANCEL)
            return
        if flags & END_STREAM:
            self._finish(call, CallFailed(S.UNKNOWN, "the answer ended without a grpc-status"))
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
                self._finish(call, CallFailed(S.INTERNAL, "headers inside an answer"), Reason.PROTOCOL_ERROR)
        elif flags & END_STREAM:
            self._finish(call, failures.of_head(block))
        elif failures.is_of_grpc(block):
            call.has_headers = True
        elif not block.by_name.get(b":status", b"").startswith(b"1"):  # 100 to 199: the answer is still to come.
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
        self._one_less()

    def _check_known(self, number: int, what: str) -> None:
        """What comes for a stream that has ended is dropped; there must have been one."""
        if not number & 1 or not 0 < number < self._next:
            raise ConnectionBroken(Reason.PROTOCOL_ERROR, f"{what} on stream {number}, which was never opened")

    def _on_goaway(self, payload: bytes) -> None:
        if len(payload) < 8:
            raise ConnectionBroken(Reason.FRAME_SIZE_ERROR, "GOAWAY of less than 8 bytes")
        last, reason = struct.unpack_from(">II", payload)
        if reason != Reason.NO_ERROR:
            text = payload[8:].decode("utf-8", "replace")[:200]
            log.warning("%s ends the connection with error code %d: %s", self._address, reason, text or "no details")
        self._retire()
        failure = CallFailed(S.UNAVAILABLE, f"{self._address} ended the connection (GOAWAY)", is_unprocessed=True)
        for number in [number for number in self._calls if number > last & LARGEST_WINDOW]:
            self._sender.forget(number)
            self._unprocessed(self._calls.pop(number), failure)
        self._close_when_done()

    def _settled(self, settings: Mapping[int, int]) -> None:
        if not self.ready.done():
            self._most = LARGEST_WINDOW
            self.ready.set_result(None)
        self._most = settings.get(frames.MAX_STREAMS, self._most)
        self._owner.has_room()

    # -- the end

    def _ended(self, number: int, reason: Reason | None) -> None:
        call = self._calls.get(number)
        if call is None:
            return
        call.is_sent = True
        if reason is not None:  # Its window was made larger than a window can be.
            del self._calls[number]
            call.end(CallFailed(S.INTERNAL, f"{self._address} broke HTTP/2: {reason.name}"))
            self._one_less()

    def _retire(self) -> None:
        if not self.is_retired:
            self.is_retired = True
            self._owner.retire(self)

    def _close_when_done(self) -> None:
        if self.is_retired and not self._calls and not self._transport.is_closing():
            self._sender.flush()
            self._transport.close()
            self._loop.call_later(_CLOSE_S, self._transport.abort)
