"""Multiplexer: presents many connections to the engine of an owner as one mailbox and one channel.

connection ──> queue of its infer process ─┐                         ┌──> result ──> the requesting connection
connection ──> queue of its infer process ─┴─> round-robin ──> engine ──> "call" ──> a connection with a running batch

The queues are served round-robin, whatever their lengths. Queued batches that can be stacked run as one, up to the
model's max_batch_size. A progress mark in shared memory records which batches run, for the case that the owner dies.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from services.infer.model_process.channel import Message
from services.infer.model_process.child.mailbox import RUNNING_ID, WAKE, RequestListener
from services.infer.model_process.hosted import RunFailed
from services.infer.model_process.payload import Tensor, TensorPart
from services.infer.model_process.shared import merging
from services.infer.model_process.shared.connection import Connection

log = logging.getLogger(__name__)

# The owner kills itself when a run does not end within this time after its infer process has disconnected.
_ABANDONED_S = 30.0

_NOT_RUNNING = "other models can be called only while a request is executed"


@dataclass(eq=False)
class ForwardedBatch:
    """A batch, or a request of a decoupled model, that an infer process has sent."""

    connection: Connection
    number: int
    """The id that the infer process has given to the batch."""
    message: Message
    runs_alone: bool = False
    """True after a stacked batch with this batch in it has failed: this batch runs alone then."""
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    waited_ns: int = 0


class Multiplexer:
    """Mailbox and channel of the engine (`engine.MessageSource`, `engine.MessageSink`). Any thread may use it."""

    def __init__(self) -> None:
        # Re-entrant: a finalizer of the model may call `put` while its thread holds the lock.
        self._changed = threading.Condition(threading.RLock())
        self._queues: dict[int, deque[ForwardedBatch]] = {}
        """Queued batches by infer process; the order of the dict is the round-robin order."""
        self._engine_items: deque[object] = deque()
        self._running: dict[int, list[ForwardedBatch]] = {}
        """By the engine's number: one batch, or several that are stacked."""
        self._numbers = itertools.count(1)
        self._calls: dict[int, tuple[Connection, Future[Message]]] = {}
        self._is_over = False
        self.listeners: dict[int, RequestListener] = {}

    def listen(self) -> None:
        """Do nothing: every connection has a reader thread already."""

    def next(self) -> Any:
        """Wait for the next item or batch; after `close`, return a "close" message."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._engine_items or self._queues)
            if self._is_over:
                return Message({"op": "close"}, [])
            if self._engine_items:
                return self._engine_items.popleft()
            batches = self._pop_batches()
            number = self._begin(batches)
        # Stacking copies rows: it runs without the lock.
        message = batches[0].message if len(batches) == 1 else merging.stack([batch.message for batch in batches])
        return Message({**message.header, "id": number}, message.tensors)

    def poll(self) -> Any:
        """Return the next item or batch, or None when there is none."""
        with self._changed:
            return self.next() if self._is_over or self._engine_items or self._queues else None

    def put(self, item: object) -> None:
        """Add an item for the engine itself."""
        with self._changed:
            self._engine_items.append(item)
            self._changed.notify()

    def close(self) -> None:
        """Make `next` return "close": no connection is left."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    # Messages from connections.

    def receive(self, connection: Connection, message: Message) -> None:
        """Process a message that has arrived on `connection`."""
        number = int(message.header.get("id", 0))
        if message.op in ("run", "start"):
            self._enqueue(ForwardedBatch(connection, number, message))
        elif message.op == "cancel":
            self._cancel(connection, number)
        elif message.op == "credit":
            for local in self._local_numbers(connection, number):
                if (listener := self.listeners.get(local)) is not None:
                    listener.credit(int(message.header.get("more", 0)))
                    self.put(WAKE)
        elif message.op == "answer":
            callee, response = self._calls.get(number, (None, None))
            if callee is connection and response is not None:
                response.set_result(message)

    def disconnect(self, connection: Connection) -> None:
        """Drop the queued batches of a closed connection; cancel running batches that no other connection waits for."""
        with self._changed:
            connection.is_disconnected = True
            queue = self._queues.get(connection.worker, ())
            for batch in [batch for batch in queue if batch.connection is connection]:
                self._drop(batch)
            numbers = [
                number
                for number, batches in self._running.items()
                if any(batch.connection is connection for batch in batches)
                and all(batch.connection.is_disconnected for batch in batches)
            ]
            calls = [response for callee, response in self._calls.values() if callee is connection]
        for number in numbers:
            if (listener := self.listeners.get(number)) is not None:
                listener.cancel()
                self.put(WAKE)
            timer = threading.Timer(_ABANDONED_S, self._kill_if_running, (number,))
            timer.daemon = True
            timer.start()
        for response in calls:
            response.set_exception(RunFailed("the infer process that ran the inner call has disconnected"))

    def _enqueue(self, batch: ForwardedBatch) -> None:
        with self._changed:
            self._queues.setdefault(batch.connection.worker, deque()).append(batch)
            self._changed.notify()

    def _cancel(self, connection: Connection, number: int) -> None:
        with self._changed:
            queue = self._queues.get(connection.worker, ())
            queued = next((each for each in queue if each.connection is connection and each.number == number), None)
            if queued is not None:
                self._drop(queued)
        if queued is not None:
            op = "error" if queued.message.op == "run" else "end"
            connection.send({"op": op, "id": number, "error": "the request was cancelled", "code": "CANCELLED"})
        for local in self._local_numbers(connection, number):
            if (listener := self.listeners.get(local)) is not None:
                listener.cancel()
                self.put(WAKE)
            else:
                # The engine has taken the request, and has not started it yet.
                self.put(Message({"op": "cancel", "id": local}, []))

    def _drop(self, batch: ForwardedBatch) -> None:
        queue = self._queues[batch.connection.worker]
        queue.remove(batch)
        if not queue:
            del self._queues[batch.connection.worker]

    def _local_numbers(self, connection: Connection, number: int) -> list[int]:
        """Return the engine's number of a running batch; empty when it is not running or is stacked with others.

        So a control message never reaches a stacked batch, which contains rows of other connections.
        """
        with self._changed:
            return [
                local
                for local, (first, *others) in self._running.items()
                if not others and first.connection is connection and first.number == number
            ]

    def _kill_if_running(self, number: int) -> None:
        with self._changed:
            if number not in self._running:
                return
        log.warning(
            "a run did not end within %(seconds).0f s after its infer process disconnected: exiting",
            {"event": "model.run_abandoned", "seconds": _ABANDONED_S},
        )
        os.kill(os.getpid(), signal.SIGKILL)

    # Batches for the engine.

    def _pop_batches(self) -> list[ForwardedBatch]:
        """Remove the next batch from its queue, with the first batches of other queues that can be stacked with it."""
        worker = next(iter(self._queues))
        first = self._pop_first(worker)
        batches, rows, most = [first], merging.rows_of(first.message), merging.most_rows(first.message)
        if first.runs_alone or not most:
            return batches
        for other in [queue[0] for queue in self._queues.values()]:
            more = merging.rows_of(other.message)
            if not other.runs_alone and rows + more <= most and merging.can_stack(first.message, other.message):
                self._drop(other)
                batches.append(other)
                rows += more
        return batches

    def _pop_first(self, worker: int) -> ForwardedBatch:
        queue = self._queues.pop(worker)
        batch = queue.popleft()
        # Reinserted last: the queues of the other infer processes are next.
        if queue:
            self._queues[worker] = queue
        return batch

    def _begin(self, batches: list[ForwardedBatch]) -> int:
        """Record that `batches` run, as one, and return the engine's number for them."""
        number, now_ns = next(self._numbers), time.monotonic_ns()
        others = {batch.connection for running in self._running.values() for batch in running}
        others -= {batches[0].connection}
        for batch in batches:
            batch.waited_ns = now_ns - batch.arrived_ns
            batch.connection.begin(now_ns, is_together=bool(others) or len(batches) > 1)
        for connection in others:
            connection.accompany()
        self._running[number] = batches
        return number

    # Responses of the engine.

    def send(self, header: dict[str, Any], parts: Sequence[TensorPart] = ()) -> None:
        """Send a response of the engine to the connection that requested it."""
        number = header["id"]
        if header["op"] == "response" and not header.get("final"):
            batch = self._running[number][0]
            batch.connection.send({**header, "id": batch.number}, parts)
            return
        with self._changed:
            batches = self._running.pop(number)
            for batch in batches:
                batch.connection.end()
        if len(batches) == 1:
            batches[0].connection.send({**header, "id": batches[0].number, "waited_ns": batches[0].waited_ns}, parts)
        else:
            self._send_split(batches, header, parts)

    def _send_split(
        self, batches: Sequence[ForwardedBatch], header: Mapping[str, Any], parts: Sequence[TensorPart]
    ) -> None:
        """Send each connection its rows of the result; if that fails, queue each batch again to run alone."""
        try:
            if header["op"] != "result":
                raise ValueError("the stacked batch failed")
            results = merging.split_result(header, parts, [merging.rows_of(batch.message) for batch in batches])
        except ValueError:
            with self._changed:
                for batch in [batch for batch in batches if not batch.connection.is_disconnected]:
                    batch.runs_alone = True
                    self._queues.setdefault(batch.connection.worker, deque()).appendleft(batch)
                self._changed.notify_all()
            return
        for batch, result in zip(batches, results, strict=True):
            batch.connection.send({**header, "id": batch.number, "waited_ns": batch.waited_ns}, result)

    def call(
        self, header: Mapping[str, Any], parts: Sequence[TensorPart]
    ) -> tuple[Mapping[str, Any], list[tuple[str, str, Tensor]]]:
        """Call another model for the batch that this thread runs; return the response, an error when that has ended.

        Raises:
            RunFailed: this thread runs no batch, and no other does.
        """
        response, running = Future[Message](), RUNNING_ID.get()
        with self._changed:
            # A thread that the model has started runs no batch: its infer process chooses among its own requests.
            at = next(reversed(self._running), None) if running is None else running
            batches = self._running.get(at) if at is not None else None
            if batches is None and running is not None:
                return {"error": _NOT_RUNNING, "code": "CANCELLED"}, []
            if batches is None:
                raise RunFailed(_NOT_RUNNING)
            connection, made_for = batches[0].connection, None if running is None else batches[0].number
            number = next(self._numbers)
            self._calls[number] = connection, response
        try:
            connection.send({**header, "op": "call", "id": number, "for": made_for}, parts)
            message = response.result()
        finally:
            # Under the lock: `disconnect` iterates over `_calls`.
            with self._changed:
                self._calls.pop(number, None)
        return message.header, message.tensors
