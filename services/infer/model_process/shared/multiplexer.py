"""Many connections as one mailbox and one channel: the engine of an owner works as if it had a single server.

connection ──> its infer process's turns ─┐                    ┌──> result ──> the connection that asked
connection ──> its infer process's turns ─┴─> in turn ──> engine ──> "call" ──> one whose request is executed

Infer processes take turns, whatever each has waiting. Batches that wait and can be stacked run as one, up to the
model's max_batch_size. What is under way is marked where the death of this process does not reach (`mark`).
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
from services.infer.model_process.child.mailbox import WAKE, Hearer
from services.infer.model_process.hosted import RunFailed
from services.infer.model_process.payload import Tensor, TensorPart
from services.infer.model_process.shared import merging
from services.infer.model_process.shared.connection import Connection

log = logging.getLogger(__name__)

_UNWANTED_S = 30.0
# What is executed for an infer process that is gone is ended after this, and the owner with it: it may never end.


@dataclass(eq=False)
class ForwardedBatch:
    """Something that an infer process wants executed."""

    connection: Connection
    number: int
    """As its infer process calls it."""
    message: Message
    is_apart: bool = False
    """It was part of a batch that failed: it runs alone now."""
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    waited_ns: int = 0


class Multiplexer:
    """A mailbox and a channel (`isolation.engine.Letters`, `isolation.engine.Sends`). Any thread may use it."""

    def __init__(self) -> None:
        # Re-entrant: a finalizer of the model's may put something while its thread is in here.
        self._changed = threading.Condition(threading.RLock())
        self._turns: dict[int, deque[ForwardedBatch]] = {}
        self._notes: deque[object] = deque()
        self._running: dict[int, list[ForwardedBatch]] = {}
        self._numbers = itertools.count(1)
        self._calls: dict[int, tuple[Connection, Future[Message]]] = {}
        self._is_over = False
        self.hearers: dict[int, Hearer] = {}

    def listen(self) -> None:
        """Every connection has a thread that does."""

    def next(self) -> Any:
        """What is to be done next; a message "close" when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._notes or self._turns)
            if self._is_over:
                return Message({"op": "close"}, [])
            if self._notes:
                return self._notes.popleft()
            number, jobs = self._begun(self._taken())
        # Copies rows: others may come and go meanwhile.
        message = jobs[0].message if len(jobs) == 1 else merging.stacked([job.message for job in jobs])
        return Message({**message.header, "id": number}, message.tensors)

    def poll(self) -> Any:
        """As `next`, without waiting; None when there is nothing."""
        with self._changed:
            return self.next() if self._is_over or self._notes or self._turns else None

    def put(self, thing: object) -> None:
        """Something for the engine itself."""
        with self._changed:
            self._notes.append(thing)
            self._changed.notify()

    def close(self) -> None:
        """Nobody is left to work for."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    # What comes from connections.

    def take(self, connection: Connection, message: Message) -> None:
        """Something that came."""
        number = int(message.header.get("id", 0))
        if message.op in ("run", "start"):
            self._enqueue(ForwardedBatch(connection, number, message))
        elif message.op == "cancel":
            self._cancel(connection, number)
        elif message.op == "credit":
            for local in self._locals(connection, number):
                if (hearer := self.hearers.get(local)) is not None:
                    hearer.credit(int(message.header.get("more", 0)))
                    self.put(WAKE)
        elif message.op == "answer":
            asked, answer = self._calls.get(number, (None, None))
            if asked is connection and answer is not None:
                answer.set_result(message)

    def leave(self, connection: Connection) -> None:
        """It is gone. What it waits for is dropped; what is executed for nobody else is told."""
        with self._changed:
            connection.is_gone = True
            for job in [job for job in self._turns.get(connection.worker, ()) if job.connection is connection]:
                self._drop(job)
            numbers = [
                number
                for number, jobs in self._running.items()
                if any(job.connection is connection for job in jobs) and all(job.connection.is_gone for job in jobs)
            ]
            calls = [answer for asked, answer in self._calls.values() if asked is connection]
        for number in numbers:
            if (hearer := self.hearers.get(number)) is not None:
                hearer.cancel()
                self.put(WAKE)
            watch = threading.Timer(_UNWANTED_S, self._give_up, (number,))
            watch.daemon = True
            watch.start()
        for answer in calls:
            answer.set_exception(RunFailed("the server that wanted it is gone"))

    def _enqueue(self, job: ForwardedBatch) -> None:
        with self._changed:
            self._turns.setdefault(job.connection.worker, deque()).append(job)
            self._changed.notify()

    def _cancel(self, connection: Connection, number: int) -> None:
        with self._changed:
            turns = self._turns.get(connection.worker, ())
            waiting = next((job for job in turns if job.connection is connection and job.number == number), None)
            if waiting is not None:
                self._drop(waiting)
        if waiting is not None:
            op = "error" if waiting.message.op == "run" else "end"
            connection.send({"op": op, "id": number, "error": "nobody waits for it", "code": "CANCELLED"})
        for local in self._locals(connection, number):
            if (hearer := self.hearers.get(local)) is not None:
                hearer.cancel()
                self.put(WAKE)

    def _drop(self, job: ForwardedBatch) -> None:
        turns = self._turns[job.connection.worker]
        turns.remove(job)
        if not turns:
            del self._turns[job.connection.worker]

    def _locals(self, connection: Connection, number: int) -> list[int]:
        """What this is called here while it is executed by itself: what is stacked with others' is not cancelled."""
        with self._changed:
            return [
                local
                for local, (first, *others) in self._running.items()
                if not others and first.connection is connection and first.number == number
            ]

    def _give_up(self, number: int) -> None:
        with self._changed:
            if number not in self._running:
                return
        log.warning("it went on for %.0f s after the server that wanted it was gone: this process ends", _UNWANTED_S)
        os.kill(os.getpid(), signal.SIGKILL)

    # What goes to the engine.

    def _taken(self) -> list[ForwardedBatch]:
        worker = next(iter(self._turns))
        first = self._next_of(worker)
        jobs, rows, most = [first], merging.rows_of(first.message), merging.most_rows(first.message)
        if first.is_apart or not most:
            return jobs
        for other in [turns[0] for turns in self._turns.values()]:
            more = merging.rows_of(other.message)
            if not other.is_apart and rows + more <= most and merging.can_stack(first.message, other.message):
                self._drop(other)
                jobs.append(other)
                rows += more
        return jobs

    def _next_of(self, worker: int) -> ForwardedBatch:
        turns = self._turns.pop(worker)
        job = turns.popleft()
        if turns:
            self._turns[worker] = turns  # At the end: the others come first.
        return job

    def _begun(self, jobs: list[ForwardedBatch]) -> tuple[int, list[ForwardedBatch]]:
        number, now_ns = next(self._numbers), time.monotonic_ns()
        others = {job.connection for running in self._running.values() for job in running} - {jobs[0].connection}
        for job in jobs:
            job.waited_ns = now_ns - job.arrived_ns
            job.connection.begin(now_ns, is_together=bool(others) or len(jobs) > 1)
        for connection in others:
            connection.accompany()
        self._running[number] = jobs
        return number, jobs

    # What comes from the engine.

    def send(self, header: dict[str, Any], parts: Sequence[TensorPart] = ()) -> None:
        """To the connection that asked for it."""
        number = header["id"]
        if header["op"] == "response" and not header.get("final"):
            job = self._running[number][0]
            job.connection.send({**header, "id": job.number}, parts)
            return
        with self._changed:
            jobs = self._running.pop(number)
            for job in jobs:
                job.connection.end()
        if len(jobs) == 1:
            jobs[0].connection.send({**header, "id": jobs[0].number, "waited_ns": jobs[0].waited_ns}, parts)
        else:
            self._part(jobs, header, parts)

    def _part(self, jobs: Sequence[ForwardedBatch], header: Mapping[str, Any], parts: Sequence[TensorPart]) -> None:
        try:
            if header["op"] != "result":
                raise ValueError("one of them fails")
            answers = merging.parted(header, parts, [merging.rows_of(job.message) for job in jobs])
        except ValueError:  # Each for itself: what is wrong with one is no other's fault.
            with self._changed:
                for job in [job for job in jobs if not job.connection.is_gone]:
                    job.is_apart = True
                    self._turns.setdefault(job.connection.worker, deque()).appendleft(job)
                self._changed.notify_all()
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.connection.send({**header, "id": job.number, "waited_ns": job.waited_ns}, answer)

    def call(
        self, header: Mapping[str, Any], parts: Sequence[TensorPart]
    ) -> tuple[Mapping[str, Any], list[tuple[str, str, Tensor]]]:
        """Calls another model, of the server whose request is executed. Raises RunFailed."""
        answer = Future[Message]()
        with self._changed:
            if not self._running:
                raise RunFailed("other models can be called only while a request is executed")
            connection = next(reversed(self._running.values()))[0].connection
            number = next(self._numbers)
            self._calls[number] = connection, answer
        try:
            connection.send({**header, "op": "call", "id": number}, parts)
            message = answer.result()
        finally:
            with self._changed:  # `leave` goes through them.
                self._calls.pop(number, None)
        return message.header, message.tensors
