"""One call, from when it is made to its end. It knows no frames: the line feeds it.

Channel ──> [waits for a line] ──> go ──> take, take ... ──> end
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


class Owner(Protocol):
    """Where a call is, as it needs it: it waits in a channel, then runs on a line."""

    def drop(self, call: Call) -> None:
        """It is over, as nobody wants its answer any more."""

    def open_window(self, call: Call) -> None:
        """Some of what it received has been taken."""


class Call(ABC):
    """What both kinds have in common.

    Args:
        fields: its headers but for the timeout, encoded.
        timeout_s: seconds from now until it fails with DEADLINE_EXCEEDED, wherever it is then; None: it has no end.
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

    def __init__(self, owner: Owner, fields: bytes, timeout_s: float | None) -> None:
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
        """Nobody has seen anything of it: it may begin once more, on another line."""
        self.received = self.credited = self.held = 0

    def block(self, *, has_waited: bool) -> bytes:
        """Its headers."""
        if self.timeout_s is None:
            return self._fields
        left_s = max(0.0, self.deadline - self._loop.time()) if has_waited else self.timeout_s
        return self._fields + request.timeout(left_s)

    @abstractmethod
    def go(self, sender: Sender, block: bytes) -> None:
        """Its line has given it a number: sends what there is to send."""

    def take(self, data: bytes) -> None:
        """A piece of the answer. Raises InvalidArgument or ResourceExhausted when it is none, or too large."""
        if self._deframer is None:
            size = len(data) - PREFIX_BYTES
            if size >= 0 and PREFIX.unpack_from(data) == (0, size) and size <= MESSAGE_BYTES:
                self._came(data[PREFIX_BYTES:])  # Nearly always: a frame is a message.
                return
            self._deframer = Deframer(None, MESSAGE_BYTES)
        for message in self._deframer.feed(data):
            self._came(message)

    @abstractmethod
    def _came(self, message: bytes) -> None:
        """A whole message has come."""

    def end(self, failure: CallFailed | None) -> None:
        """It is over: with an answer (None), or failed."""
        if self.is_over:
            return
        if failure is None and self._deframer is not None and self._deframer.holds:
            failure = CallFailed(S.INTERNAL, "the answer ended inside a message")
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
        self._end(failure)

    @abstractmethod
    def _end(self, failure: CallFailed | None) -> None:
        """Tells the caller."""

    def cancel(self) -> None:
        """The caller has lost interest: whoever serves it is told."""
        self._give_up(CallFailed(S.CANCELLED, "Locally cancelled by application!", is_unprocessed=not self.number))

    def _expire(self) -> None:
        self._give_up(deadline_exceeded(is_unprocessed=not self.number))

    def _give_up(self, failure: CallFailed) -> None:
        if not self.is_over:
            self.owner.drop(self)
            self.end(failure)


class UnaryCall(Call):
    """A message, and an answer: `future` has it."""

    __slots__ = ("_answer", "_body", "future")

    def __init__(self, owner: Owner, fields: bytes, timeout_s: float | None, message: bytes) -> None:
        super().__init__(owner, fields, timeout_s)
        self._body = framed(message)
        self._answer: bytes | None = None
        self.future: asyncio.Future[bytes] = self._loop.create_future()
        self.may_repeat = True

    def go(self, sender: Sender, block: bytes) -> None:
        sender.request(self.number, block, self._body)

    def _came(self, message: bytes) -> None:
        if self._answer is not None:
            raise InvalidArgument("a unary call was answered with more than one message")
        self._answer = message

    def _end(self, failure: CallFailed | None) -> None:
        if failure is None and self._answer is None:
            failure = CallFailed(S.INTERNAL, "a unary call was answered without a message")
        if self.future.done():
            return
        if failure is None:
            self.future.set_result(self._answer or b"")
        else:
            self.future.set_exception(failure)


def deadline_exceeded(*, is_unprocessed: bool) -> CallFailed:
    """What a call fails with whose time is up."""
    return CallFailed(S.DEADLINE_EXCEEDED, "Deadline Exceeded", is_unprocessed=is_unprocessed)


def too_large(size: int) -> CallFailed:
    """What a call fails with that would send `size` bytes."""
    details = f"CLIENT: Sent message larger than max ({size} vs. {MESSAGE_BYTES})"
    return CallFailed(S.RESOURCE_EXHAUSTED, details, is_unprocessed=True)
