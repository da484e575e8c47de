"""Call with a stream of messages in both directions.

    write ──windows──> peer        peer ──the stream's window──> messages ──> iteration

A message counts against the window until its reader has consumed it, so a slow reader slows the sender down.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

import grpc

from mesh.h2.sending import Sender
from mesh.rpc.client.calls import Call, CallOwner, too_large
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.framing import PREFIX_BYTES, framed
from mesh.rpc.limits import MESSAGE_BYTES

S = grpc.StatusCode


class StreamCall(Call):
    """Streaming call: iteration yields the responses, `write` sends requests. `async with` ends the call.

    One task iterates; the same task or another one writes. The iteration raises the call's failure (CallFailed) after
    the responses that arrived before; `drain` raises it, too.
    """

    def __init__(self, owner: CallOwner, fields: bytes, timeout_s: float | None) -> None:
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

    # -- requests

    def write(self, message: bytes) -> None:
        """Send a message when windows allow; until then it is kept, and `drain` waits. Ignored after the end."""
        if self._is_half_closed:
            raise RuntimeError("the call is half-closed: it accepts no more messages")
        if self.is_over:
            return
        if len(message) > MESSAGE_BYTES:
            self._abort(too_large(len(message)))
        elif self._sender is None:
            self._unsent.append(message)
        else:
            self._is_sending = True
            self._sender.data(self.number, framed(message), self._sent)

    def half_close(self) -> None:
        """End the requests: no more messages will be written."""
        self._is_half_closed = True
        if self._sender is not None and not self.is_over:
            self._sender.end(self.number)

    async def drain(self) -> None:
        """Wait until everything written is sent, or the call is over. Raises CallFailed."""
        while not self.is_over and (self._sender is None or self._is_sending):
            self._drained.clear()
            await self._drained.wait()
        if self._failure is not None:
            raise self._failure

    def start(self, sender: Sender, block: bytes) -> None:
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

    # -- responses

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
        """Return the only response of a call. Raises CallFailed, also for another number of responses."""
        messages = [message async for message in self]
        if len(messages) != 1:
            raise CallFailed(S.INTERNAL, f"a call with one response got {len(messages)} messages")
        return messages[0]

    def _on_message(self, message: bytes) -> None:
        self.held += PREFIX_BYTES + len(message)
        self._messages.append(message)
        self._readable.set()

    def cancel(self) -> None:
        """Cancel the call, here and at the server. Unread responses are dropped."""
        self._messages.clear()
        super().cancel()

    def _end(self, failure: CallFailed | None) -> None:
        self._failure = failure
        self._unsent.clear()
        self._readable.set()
        self._drained.set()
