"""Streams of a decoupled model: its requests are sent to the model process, its responses are received from there.

    event loop ──outbox──> writer thread ──start, credit, cancel──> process ──response, end──> reader thread ──> handler

A DecoupledStreams object belongs to one run of a process and ends with that run. The event loop never blocks on the
process: the writer thread waits when the process does not read.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.infer.model_process.channel import ChannelClosed, Message
from services.infer.model_process.inner_calls import ModelRun, OuterCall
from services.infer.model_process.instance import Runner
from services.infer.model_process.payload import TensorPart

log = logging.getLogger(__name__)

_REAPED_S = 5.0

MessageHandler = Callable[[Message | None], None]
"""Handles the messages for one request, on the reader thread; None: the process has died."""


class DecoupledStreams:
    """The streams of one running process."""

    def __init__(self, process: Runner, on_call: Callable[[Message, ModelRun | None, DecoupledStreams], None]) -> None:
        """Start the reader and the writer thread.

        Args:
            on_call: receives the calls that the model makes of other models, each with the request that it is made for;
                None: no request is in progress.
        """
        self.process = process
        self._on_call = on_call
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._requests: dict[int, tuple[MessageHandler, ModelRun]] = {}
        # Makes the calls of threads that the model has started; ends with the last request.
        self._common_run: ModelRun | None = None
        self._is_over = False
        self.is_crash_recorded = False
        """True once the requests that were running at the crash are in the poison table."""
        self._outbox: queue.SimpleQueue[tuple[dict[str, Any], Sequence[TensorPart]] | None] = queue.SimpleQueue()
        for work in (self._read, self._write):
            threading.Thread(target=work, name=f"{work.__name__[1:]} {process.title}", daemon=True).start()

    def start(
        self, header: Mapping[str, Any], parts: Sequence[TensorPart], run: ModelRun, handler: MessageHandler
    ) -> int:
        """Start a request and return its number.

        `handler` receives the responses, up to the final one, or None when the process dies.
        """
        number = next(self._numbers)
        with self._lock:
            if not self._is_over:
                self._requests[number] = handler, run
                self._outbox.put(({**header, "op": "start", "id": number}, parts))
                return number
        handler(None)
        return number

    def send_control(self, number: int, op: str, **fields: Any) -> None:
        """Send a control message for a running request: `cancel` or `credit`."""
        self._outbox.put(({"op": op, "id": number, **fields}, ()))
        if op == "cancel":
            self._end_common_run()

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
                log.warning(
                    "model %(model_process)s: a request could not be sent: %(error)s",
                    {"event": "model.request_not_sent", "model_process": self.process.title, "error": err},
                )
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
            requests, self._requests = self._requests, {}
        for handler, run in requests.values():
            run.end()
            handler(None)
        self._end_common_run()

    def _dispatch(self, message: Message) -> None:
        if message.op == "call":
            self._on_call(message, self._caller(message.header.get("for")), self)
            return
        number = message.header.get("id")
        if message.op not in ("response", "end") or not isinstance(number, int):
            raise ChannelClosed(f"unknown operation '{message.op}'")
        with self._lock:
            is_last = message.op == "end" or message.header.get("final") is True
            found = self._requests.pop(number, None) if is_last else self._requests.get(number)
        if found is None:
            return
        handler, run = found
        if is_last:
            run.end()
            self._end_common_run()
        handler(message)

    def _caller(self, number: object) -> ModelRun | None:
        """Return the request that a call is made for, None when it has ended; without its number, all in progress."""
        with self._lock:
            if isinstance(number, int):
                found = self._requests.get(number)
                return found[1] if found is not None else None
            runs = [run for _, run in self._requests.values() if not run.is_over]
            if runs and self._common_run is None:
                self._common_run = ModelRun(runs[0].model, self._common_outer)
            return self._common_run if runs else None

    def _common_outer(self) -> OuterCall:
        with self._lock:
            outer_calls = [run.outer() for _, run in self._requests.values() if not run.is_over]
        return max(outer_calls, key=lambda outer: outer.deadline, default=OuterCall(-math.inf))

    def _end_common_run(self) -> None:
        with self._lock:
            ended = self._common_run
            if ended is None or not all(run.is_over for _, run in self._requests.values()):
                return
            self._common_run = None
        ended.end()

    @property
    def is_over(self) -> bool:
        """True once the process has died: no request can be started any more."""
        return self._is_over
