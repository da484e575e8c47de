"""Requests of a decoupled model on their way to its process, and the responses on their way back.

    event loop ──outbox──> writer thread ──start, credit, cancel──> process ──response, end──> reader thread ──> takers

One link is of one run of a process, and ends with it. The event loop never waits for the process: not even for it to
read.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.infer.model_process.channel import ChannelClosed, Message
from services.infer.model_process.instance import Running
from services.infer.model_process.payload import TensorPart

log = logging.getLogger(__name__)

_REAPED_S = 5.0

Taker = Callable[[Message | None], None]
"""Takes what comes for one request, on the reader's thread; None: the process has died."""


class DecoupledStreams:
    """The streams of one running process."""

    def __init__(self, process: Running, on_call: Callable[[Message, DecoupledStreams], None]) -> None:
        """Starts its threads. `on_call` is given the calls that the model makes of other models."""
        self.process = process
        self._on_call = on_call
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._takers: dict[int, Taker] = {}
        self._is_over = False
        self.is_blamed = False
        """Whoever it was at work for when it broke has been remembered."""
        self._outbox: queue.SimpleQueue[tuple[dict[str, Any], Sequence[TensorPart]] | None] = queue.SimpleQueue()
        for work in (self._read, self._write):
            threading.Thread(target=work, name=f"{work.__name__[1:]} {process.title}", daemon=True).start()

    def start(self, header: Mapping[str, Any], parts: Sequence[TensorPart], taker: Taker) -> int:
        """Begins with a request; its number. `taker` gets its responses, until one is the last or None comes."""
        number = next(self._numbers)
        with self._lock:
            if not self._is_over:
                self._takers[number] = taker
                self._outbox.put(({**header, "op": "start", "id": number}, parts))
                return number
        taker(None)
        return number

    def tell(self, number: int, op: str, **said: Any) -> None:
        """Sends word of a request: `cancel`, or `credit`."""
        self._outbox.put(({"op": op, "id": number, **said}, ()))

    def reply(self, header: Mapping[str, Any], parts: Sequence[TensorPart]) -> None:
        """Answers a call that the model made."""
        self._outbox.put((dict(header), parts))

    def _write(self) -> None:
        while (found := self._outbox.get()) is not None:
            try:
                self.process.channel.send(*found)
            except ChannelClosed:
                return
            except (OSError, ValueError) as err:  # No memory for the tensors: nothing was sent.
                log.warning("model %s: a request could not be sent: %s", self.process.title, err)
                self.process.kill(f"killed: a request could not be sent to it: {err}")
                return

    def _read(self) -> None:
        with self.process.using:
            try:
                while (message := self.process.channel.receive()) is not None:
                    self._take(message)
            except ChannelClosed as err:
                if not self.process.died.wait(_REAPED_S):
                    self.process.kill(f"it broke off: {err}")
                    self.process.died.wait()
        self._outbox.put(None)
        with self._lock:
            self._is_over = True
            takers, self._takers = self._takers, {}
        for taker in takers.values():
            taker(None)

    def _take(self, message: Message) -> None:
        if message.op == "call":
            self._on_call(message, self)
            return
        number = message.header.get("id")
        if message.op not in ("response", "end") or not isinstance(number, int):
            raise ChannelClosed(f"an unknown word: {message.op}")
        with self._lock:
            is_last = message.op == "end" or message.header.get("final") is True
            taker = self._takers.pop(number, None) if is_last else self._takers.get(number)
        if taker is not None:
            taker(message)

    @property
    def is_over(self) -> bool:
        """The process has died: nothing more can be started."""
        return self._is_over
