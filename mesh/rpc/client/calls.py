"""One call from its start to its end. Calls know no frames: the connection passes data to them.

Channel ──> [waits for a connection] ──> start ──> receive, receive ... ──> end
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from typing import Protocol

import grpc

from mesh.h2.sending import Sender
from mesh.rpc.client import request
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.framing import PREFIX, PREFIX_BYTES, Deframer, framed
from mesh.rpc.limits import MESSAGE_BYTES
from shoal.errors import InvalidArgument

S = grpc.StatusCode


class CallOwner(Protocol):
    """Current owner of a call: the channel while the call waits, then its connection."""

    def drop(self, call: Call) -> None:
        """Remove a call whose caller does not wait any more."""

    def open_window(self, call: Call) -> None:
        """Give back flow-control credit: the reader has consumed some of the received data."""


class Call(ABC):
    """Base class of unary calls and streams.

    Args:
        fields: encoded headers, without the timeout.
        timeout_s: seconds until the call fails with DEADLINE_EXCEEDED, waiting or running; None: no deadline.
    """

    __slots__ = (
        "_deframer",
        "_fields",
        "_loop",
        "_timer",
        "credited",
        "deadline",
        "has_headers",
        "held",
        "is_over",
        "is_sent",
        "may_repeat",
        "number",
        "owner",
        "received",
        "timeout_s",
    )

    def __init__(self, owner: CallOwner, fields: bytes, timeout_s: float | None) -> None:
        self.owner = owner
        self._fields = fields
        self._loop = asyncio.get_running_loop()
        self.timeout_s = timeout_s
        self.deadline = math.inf if timeout_s is None else self._loop.time() + timeout_s
        self._timer = None if timeout_s is None else self._loop.call_later(timeout_s, self._expire)
        self._deframer: Deframer | None = None
        self.number = 0
        self.has_headers = self.is_sent = self.is_over = False
        self.may_repeat = False
        """True while the call may be repeated on another connection."""
        self.received = self.credited = self.held = 0

    def block(self, *, has_waited: bool) -> bytes:
        """Return the encoded headers."""
        if self.timeout_s is None:
            return self._fields
        left_s = max(0.0, self.deadline - self._loop.time()) if has_waited else self.timeout_s
        return self._fields + request.timeout(left_s)

    @abstractmethod
    def start(self, sender: Sender, block: bytes) -> None:
        """Send the request: the connection has assigned `number`."""

    def receive(self, data: bytes) -> None:
        """Receive a piece of the response. Raises InvalidArgument or ResourceExhausted: malformed, or too large."""
        if self._deframer is None:
            size = len(data) - PREFIX_BYTES
            if size >= 0 and PREFIX.unpack_from(data) == (0, size) and size <= MESSAGE_BYTES:
                # The common case: the frame is exactly one message.
                self._on_message(data[PREFIX_BYTES:])
                return
            self._deframer = Deframer(None, MESSAGE_BYTES)
        for message in self._deframer.feed(data):
            self._on_message(message if isinstance(message, bytes) else b"".join(message))

    @abstractmethod
    def _on_message(self, message: bytes) -> None:
        """Handle a whole message."""

    def end(self, failure: CallFailed | None) -> None:
        """End the call: successfully (None), or with a failure."""
        if self.is_over:
            return
        if failure is None and self._deframer is not None and self._deframer.holds:
            failure = CallFailed(S.INTERNAL, "the response ended inside a message")
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
        self._end(failure)

    @abstractmethod
    def _end(self, failure: CallFailed | None) -> None:
        """Deliver the outcome to the caller."""

    def cancel(self) -> None:
        """Cancel the call, here and at the server."""
        self._abort(CallFailed(S.CANCELLED, "Locally cancelled by application!", is_unprocessed=not self.number))

    def _expire(self) -> None:
        self._abort(deadline_exceeded(is_unprocessed=not self.number))

    def _abort(self, failure: CallFailed) -> None:
        if not self.is_over:
            self.owner.drop(self)
            self.end(failure)


class UnaryCall(Call):
    """Unary call; `future` gets the response message."""

    __slots__ = ("_body", "_response", "future")

    def __init__(self, owner: CallOwner, fields: bytes, timeout_s: float | None, message: bytes) -> None:
        super().__init__(owner, fields, timeout_s)
        self._body = framed(message)
        self._response: bytes | None = None
        self.future: asyncio.Future[bytes] = self._loop.create_future()
        self.may_repeat = True

    def start(self, sender: Sender, block: bytes) -> None:
        sender.request(self.number, block, self._body)

    def _on_message(self, message: bytes) -> None:
        if self._response is not None:
            raise InvalidArgument("a unary call got a response of more than one message")
        self._response = message

    def _end(self, failure: CallFailed | None) -> None:
        if failure is None and self._response is None:
            failure = CallFailed(S.INTERNAL, "a unary call got a response without a message")
        if self.future.done():
            return
        if failure is None:
            self.future.set_result(self._response or b"")
        else:
            self.future.set_exception(failure)


def deadline_exceeded(*, is_unprocessed: bool) -> CallFailed:
    """Return the failure of a call whose deadline has passed."""
    return CallFailed(S.DEADLINE_EXCEEDED, "Deadline Exceeded", is_unprocessed=is_unprocessed)


def too_large(size: int) -> CallFailed:
    """Return the failure of a call whose message of `size` bytes is too large."""
    details = f"CLIENT: Sent message larger than max ({size} vs. {MESSAGE_BYTES})"
    return CallFailed(S.RESOURCE_EXHAUSTED, details, is_unprocessed=True)
