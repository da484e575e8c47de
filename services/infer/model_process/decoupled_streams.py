"""Streams of a decoupled model: its requests are sent to the model process, its responses are received from there.

    event loop ──outbox──> writer thread ──start, credit, cancel──> process ──response, end──> reader thread ──> handler

A DecoupledStreams object belongs to one run of a process and ends with that run. The event loop never blocks on the
process: the writer thread waits when the process does not read.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.infer.model_process.channel import ChannelClosed, Message
from services.infer.model_process.instance import Runner
from services.infer.model_process.payload import TensorPart

log = logging.getLogger(__name__)

_REAPED_S = 5.0

MessageHandler = Callable[[Message | None], None]
"""Handles the messages for one request, on the reader thread; None: the process has died."""


class DecoupledStreams:
    """The streams of one running process."""

    def __init__(self, process: Runner, on_call: Callable[[Message, DecoupledStreams], None]) -> None:
        """Start the reader and the writer thread. `on_call` receives the calls that the model makes of other models."""
        self.process = process
        self._on_call = on_call
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._handlers: dict[int, MessageHandler] = {}
        self._is_over = False
        self.is_crash_recorded = False
        """True once the requests that were running at the crash are in the poison table."""
        self._outbox: queue.SimpleQueue[tuple[dict[str, Any], Sequence[TensorPart]] | None] = queue.SimpleQueue()
        for work in (self._read, self._write):
            threading.Thread(target=work, name=f"{work.__name__[1:]} {process.title}", daemon=True).start()

    def start(self, header: Mapping[str, Any], parts: Sequence[TensorPart], handler: MessageHandler) -> int:
        """Start a request and return its number.

        `handler` receives the responses, up to the final one, or None when the process dies.
        """
        number = next(self._numbers)
        with self._lock:
            if not self._is_over:
                self._handlers[number] = handler
                self._outbox.put(({**header, "op": "start", "id": number}, parts))
                return number
        handler(None)
        return number

    def send_control(self, number: int, op: str, **fields: Any) -> None:
        """Send a control message for a running request: `cancel` or `credit`."""
        self._outbox.put(({"op": op, "id": number, **fields}, ()))

    def reply(self, header: Mapping[str, Any], parts: Sequence[TensorPart]) -> None:
        """Send the response to a call that the model made of another model."""
        self._outbox.put((dict(header), parts))

    def _write(self) -> None:
        while (item := self._outbox.get()) is not None:
            try:
                self.process.channel.send(*item)
            except ChannelClosed:
                return
            # No memory for the tensors: nothing was sent.
            except (OSError, ValueError) as err:
                log.warning("model %s: a request could not be sent: %s", self.process.title, err)
                self.process.kill(f"killed: a request could not be sent to it: {err}")
                return

    def _read(self) -> None:
        with self.process.using:
            try:
                while (message := self.process.channel.receive()) is not None:
                    self._dispatch(message)
            except ChannelClosed as err:
                if not self.process.died.wait(_REAPED_S):
                    self.process.kill(f"it closed its channel: {err}")
                    self.process.died.wait()
        self._outbox.put(None)
        with self._lock:
            self._is_over = True
            handlers, self._handlers = self._handlers, {}
        for handler in handlers.values():
            handler(None)

    def _dispatch(self, message: Message) -> None:
        if message.op == "call":
            self._on_call(message, self)
            return
        number = message.header.get("id")
        if message.op not in ("response", "end") or not isinstance(number, int):
            raise ChannelClosed(f"unknown operation '{message.op}'")
        with self._lock:
            is_last = message.op == "end" or message.header.get("final") is True
            handler = self._handlers.pop(number, None) if is_last else self._handlers.get(number)
        if handler is not None:
            handler(message)

    @property
    def is_over(self) -> bool:
        """True once the process has died: no request can be started any more."""
        return self._is_over
