"""What comes to a model process: read where it is wanted, or by a thread while the model is at work.

A model that runs without a word to anybody reads its requests itself: that spares a thread the hop. One that can be
cancelled, is paid in credit, or calls other models has a thread that hears of these things meanwhile.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from services.infer.model_process.channel import Channel, ChannelClosed, Message
from services.infer.model_process.hosted import RunFailed
from services.infer.model_process.payload import Tensor, TensorPart


@dataclass(frozen=True)
class Abandoned:
    """A request's sender was dropped by the model."""

    id: int


class Hearer(Protocol):
    """What is told of a running request."""

    def cancel(self) -> None: ...

    def credit(self, more: int) -> None: ...


WAKE = object()
"""Something has changed: look again."""


class Mailbox:
    """The receiving side of a model process's channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_listening = False
        self._calls: dict[int, Future[Message]] = {}
        self._numbers = itertools.count(1)
        self.hearers: dict[int, Hearer] = {}
        """By the id of their request; changed by the main thread only."""

    def listen(self) -> None:
        """From now on a thread reads."""
        self._is_listening = True
        threading.Thread(target=self._listen, name="mailbox", daemon=True).start()

    def next(self) -> Any:
        """Waits for the next Message, Abandoned or WAKE. Raises ChannelClosed when the server is gone."""
        if not self._is_listening:
            return self._channel.receive()
        found = self._queue.get()
        if isinstance(found, ChannelClosed):
            raise found
        return found

    def poll(self) -> Any:
        """As `next`, without waiting; None when there is nothing. Only while a thread listens."""
        return None if self._queue.empty() else self.next()

    def put(self, thing: object) -> None:
        """From any thread, and from finalizers."""
        self._queue.put(thing)

    def call(
        self, header: Mapping[str, Any], parts: Sequence[TensorPart]
    ) -> tuple[Mapping[str, Any], list[tuple[str, str, Tensor]]]:
        """Calls another model of the server, from any thread. Raises RunFailed."""
        if not self._is_listening:
            raise RunFailed("other models can be called only while a request is executed")
        number, answer = next(self._numbers), Future[Message]()
        self._calls[number] = answer
        try:
            self._channel.send({**header, "op": "call", "id": number}, parts)
            message = answer.result()
        except ChannelClosed as err:
            raise RunFailed("the server is gone") from err
        finally:
            self._calls.pop(number, None)
        return message.header, message.tensors

    def _listen(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._take(message)
        except ChannelClosed as err:
            self._end(err)

    def _take(self, message: Message) -> None:
        number = int(message.header.get("id", 0))
        if message.op == "answer":
            if (answer := self._calls.get(number)) is not None:
                answer.set_result(message)
        elif message.op in ("cancel", "credit"):
            if (hearer := self.hearers.get(number)) is not None:
                hearer.cancel() if message.op == "cancel" else hearer.credit(int(message.header.get("more", 0)))
                self._queue.put(WAKE)
        else:
            self._queue.put(message)

    def _end(self, error: ChannelClosed) -> None:
        for hearer in list(self.hearers.values()):
            hearer.cancel()
        for answer in list(self._calls.values()):
            answer.set_exception(error)
        self._queue.put(error)
