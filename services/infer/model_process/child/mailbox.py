"""Mailbox of a model process: receives messages on the main thread, or on a thread of its own while the model runs.

A model that needs no messages during a run reads its requests on the main thread, which saves a thread hand-off. Models
that can be cancelled, use credit or call other models need a reader thread for these messages.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from services.infer.model_process.channel import Channel, ChannelClosed, Message
from services.infer.model_process.hosted import RunFailed
from services.infer.model_process.payload import Tensor, TensorPart


@dataclass(frozen=True)
class Abandoned:
    """Mailbox item: the model has dropped the sender of the request `id`."""

    id: int


class RequestListener(Protocol):
    """Receiver of the control messages for one running request."""

    def cancel(self) -> None: ...

    def credit(self, more: int) -> None: ...


RUNNING_ID: ContextVar[int | None] = ContextVar("running_id", default=None)
"""Id of the request, or batch, that this thread or task runs; None in a thread that the model has started."""

WAKE = object()
"""Mailbox item without content: the state of a request has changed, so the engine checks all requests again."""


class Mailbox:
    """Receiving side of a model process's channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_listening = False
        self._calls: dict[int, Future[Message]] = {}
        self._numbers = itertools.count(1)
        self.listeners: dict[int, RequestListener] = {}
        """Listener of each running request, by request id; only the main thread changes the dict."""

    def listen(self) -> None:
        """Start the reader thread."""
        self._is_listening = True
        threading.Thread(target=self._listen, name="mailbox", daemon=True).start()

    def next(self) -> Any:
        """Wait for the next Message, Abandoned or WAKE. Raises ChannelClosed when the server has closed the channel."""
        if not self._is_listening:
            return self._channel.receive()
        item = self._queue.get()
        if isinstance(item, ChannelClosed):
            raise item
        return item

    def poll(self) -> Any:
        """Return the next item, or None when the mailbox is empty. The reader thread must be running."""
        return None if self._queue.empty() else self.next()

    def put(self, item: object) -> None:
        """Add an item, from any thread or from a finalizer."""
        self._queue.put(item)

    def call(
        self, header: Mapping[str, Any], parts: Sequence[TensorPart]
    ) -> tuple[Mapping[str, Any], list[tuple[str, str, Tensor]]]:
        """Call another model of the server and wait for the response, on any thread. Raises RunFailed."""
        if not self._is_listening:
            raise RunFailed("other models can be called only while a request is executed")
        number, response = next(self._numbers), Future[Message]()
        self._calls[number] = response
        try:
            self._channel.send({**header, "op": "call", "id": number, "for": RUNNING_ID.get()}, parts)
            message = response.result()
        except ChannelClosed as err:
            raise RunFailed("the server has closed the channel") from err
        finally:
            self._calls.pop(number, None)
        return message.header, message.tensors

    def _listen(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._dispatch(message)
        except ChannelClosed as err:
            self._end(err)

    def _dispatch(self, message: Message) -> None:
        number = int(message.header.get("id", 0))
        if message.op == "answer":
            if (response := self._calls.get(number)) is not None:
                response.set_result(message)
        elif message.op in ("cancel", "credit"):
            if (listener := self.listeners.get(number)) is not None:
                listener.cancel() if message.op == "cancel" else listener.credit(int(message.header.get("more", 0)))
                self._queue.put(WAKE)
            elif message.op == "cancel":
                # The request has ended, or its start is still in the queue, which the cancellation then follows.
                self._queue.put(message)
        else:
            self._queue.put(message)

    def _end(self, error: ChannelClosed) -> None:
        for listener in list(self.listeners.values()):
            listener.cancel()
        for response in list(self._calls.values()):
            response.set_exception(error)
        self._queue.put(error)
