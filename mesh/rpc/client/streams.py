"""A call of messages both ways.

    write ──windows──> peer        peer ──its window of the stream──> messages ──> whoever iterates

A message counts against the window until its reader has taken it, so a slow reader slows the sender down.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

import grpc

from mesh.h2.sending import Sender
from mesh.rpc.client.calls import Call, Owner, too_large
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.framing import PREFIX_BYTES, framed
from mesh.rpc.limits import MESSAGE_BYTES

S = grpc.StatusCode


class StreamCall(Call):
    """Iterate it for the answers, in one task; write in another, or in between. `async with` ends the call.

    What it fails with (CallFailed) is raised by the iteration, after the answers that came before, and by `drain`.
    """

    def __init__(self, owner: Owner, fields: bytes, timeout_s: float | None) -> None:
        super().__init__(owner, fields, timeout_s)
        self._sender: Sender | None = None
        self._unsent: list[bytes] = []
        self._is_sending = self._is_half_closed = False
        self._messages: deque[bytes] = deque()
        self._readable = asyncio.Event()
        self._drained = asyncio.Event()
        self._failure: CallFailed | None = None

    async def __aenter__(self) -> StreamCall:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.cancel()

    # -- what goes

    def write(self, message: bytes) -> None:
        """Sends a message as windows allow, and keeps it until then: `drain` waits for that. Of a call that is over,
        nothing is sent any more."""
        if self._is_half_closed:
            raise RuntimeError("the call was half-closed: it takes no more messages")
        if self.is_over:
            return
        if len(message) > MESSAGE_BYTES:
            self._give_up(too_large(len(message)))
        elif self._sender is None:
            self._unsent.append(message)
        else:
            self._is_sending = True
            self._sender.data(self.number, framed(message), self._sent)

    def half_close(self) -> None:
        """No more messages will be written."""
        self._is_half_closed = True
        if self._sender is not None and not self.is_over:
            self._sender.end_data(self.number)

    async def drain(self) -> None:
        """Waits until all that was written has gone, or the call is over. Raises CallFailed."""
        while not self.is_over and (self._sender is None or self._is_sending):
            self._drained.clear()
            await self._drained.wait()
        if self._failure is not None:
            raise self._failure

    def go(self, sender: Sender, block: bytes) -> None:
        self._sender = sender
        sender.headers(self.number, block)
        unsent, self._unsent = self._unsent, []
        is_half_closed, self._is_half_closed = self._is_half_closed, False
        for message in unsent:
            self.write(message)
        if is_half_closed:
            self.half_close()
        self._drained.set()

    def _sent(self) -> None:
        self._is_sending = False
        self._drained.set()

    # -- what comes

    def __aiter__(self) -> StreamCall:
        return self

    async def __anext__(self) -> bytes:
        while not self._messages:
            if self._failure is not None:
                raise self._failure
            if self.is_over:
                raise StopAsyncIteration
            self._readable.clear()
            await self._readable.wait()
        message = self._messages.popleft()
        self.held -= PREFIX_BYTES + len(message)
        if not self.is_over:
            self.owner.open_window(self)
        return message

    async def only(self) -> bytes:
        """The answer of a call that has one. Raises CallFailed."""
        messages = [message async for message in self]
        if len(messages) != 1:
            raise CallFailed(S.INTERNAL, f"a call that has one answer was answered with {len(messages)} messages")
        return messages[0]

    def _came(self, message: bytes) -> None:
        self.held += PREFIX_BYTES + len(message)
        self._messages.append(message)
        self._readable.set()

    def cancel(self) -> None:
        """Ends the call: whoever serves it is told. What has come and was not taken is dropped."""
        self._messages.clear()
        super().cancel()

    def _end(self, failure: CallFailed | None) -> None:
        self._failure = failure
        self._unsent.clear()
        self._readable.set()
        self._drained.set()
