"""One connector: receives messages, runs each as a job, sends the result on, and then settles the message.

    receive ──window (messages, bytes)──> a task for each message: submit, wait, send ──> settle
       └── not called while the window is full: the backpressure, up to the broker

After an unexpected error, the connector restarts from what its source has committed: messages are delivered again, find
their jobs by their keys, and have the same results. So no step needs to be undone.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Protocol, TypeVar

from mesh.process.tasks import Background
from services.ingest.connectors.connector_spec import ConnectorSpec, Endpoints, Sink
from services.ingest.connectors.message import Message, Outgoing, Partition
from services.ingest.connectors.outcome import MessageFailure, answer_of, dead_letter, failed_of, submit_of
from services.ingest.connectors.progress import ConnectorProgress
from services.ingest.intake.intake import Accepted
from services.ingest.intake.stream import Window
from services.ingest.job import PERMANENT, Job
from services.ingest.limits import CONNECTOR_LABEL, SOURCE_LABEL
from services.ingest.queries.completions import Ended
from shoal.errors import AlreadyExists, Code, InvalidArgument, ShoalError
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2

log = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 10.0
_RECEIVED_AT_ONCE = 500
# Errors that are retried where they happen; any other error restarts the connector.
_TRANSIENT = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.ABORTED})

T = TypeVar("T")


class JobIntake(Protocol):
    """Interface to the intake."""

    async def begin_of_connector(self, submit: pb.SubmitRequest) -> asyncio.Future[Accepted]: ...

    async def by_key(self, tenant: str, key: str) -> Job | None: ...


class JobCompletions(Protocol):
    """Interface to the completions of jobs."""

    async def until_ended(self, job_id: str, *, is_old: bool = False) -> None: ...

    async def result(self, job_id: str) -> Ended: ...


class Connector(Background):
    """Runs the connector of a specification until its block ends. Waits while a dependency is unavailable."""

    def __init__(
        self,
        spec: ConnectorSpec,
        intake: JobIntake,
        endings: JobCompletions,
        *,
        ready: asyncio.Event,
        progress: ConnectorProgress,
    ) -> None:
        self._spec = spec
        self._intake = intake
        self._endings = endings
        self._ready = ready
        self._in_flight: dict[Partition, set[asyncio.Task[None]]] = {}
        self._freed = asyncio.Event()
        self.progress = progress

    async def _run(self) -> None:
        await self._ready.wait()
        backoff = Backoff()
        while True:
            before = self.progress.settled
            try:
                await self._serve(self._spec.open())
            except* ShoalError as group:
                self._log_problem(_first(group))
            except* Exception as group:
                log.exception(
                    "connector %(connector)s",
                    {"event": "connector.failed", "connector": self._spec.name},
                    exc_info=group,
                )
                self.progress.record_error("an unexpected error: the log has the cause")
            backoff = Backoff() if self.progress.settled > before else backoff
            self.progress.stopped()
            await backoff.sleep()

    async def _serve(self, endpoints: Endpoints) -> None:
        window = Window(self._spec.max_in_flight, self._spec.max_bytes)
        async with AsyncExitStack() as stack:
            for part in (endpoints.dead_letters, endpoints.sink, endpoints.source):
                if part is not None:
                    await stack.enter_async_context(part)
            self.progress.started(endpoints.source.status)
            async with asyncio.TaskGroup() as tasks:
                while True:
                    for message in await endpoints.source.receive(await self._capacity()):
                        await window.enter(message.nbytes)
                        self._start_task(tasks, message, endpoints, window)

    async def _capacity(self) -> int:
        """Wait until a quarter of the window is free, and return the number of messages to receive."""
        while (free := self._spec.max_in_flight - self.progress.in_flight) < max(1, self._spec.max_in_flight // 4):
            self._freed.clear()
            await self._freed.wait()
        return min(free, _RECEIVED_AT_ONCE)

    def _start_task(self, tasks: asyncio.TaskGroup, message: Message, endpoints: Endpoints, window: Window) -> None:
        self.progress.received()
        task = tasks.create_task(self._process(message, endpoints))
        self._in_flight.setdefault(message.partition, set()).add(task)
        message.partition.on_revoked = self._cancel_partition

        # A callback, not a `finally`: a task that is cancelled before its first step runs no code of its own.
        def finished(_: object) -> None:
            self.progress.left()
            window.leave(message.nbytes)
            self._freed.set()
            self._in_flight[message.partition].discard(task)
            if not self._in_flight[message.partition]:
                del self._in_flight[message.partition]

        task.add_done_callback(finished)
        if message.partition.is_revoked:
            task.cancel()

    def _cancel_partition(self, partition: Partition) -> None:
        for task in self._in_flight.get(partition, ()):
            task.cancel()

    async def _process(self, message: Message, endpoints: Endpoints) -> None:
        is_dead = await self._send_outcome(message, await self._outcome(message), endpoints)
        endpoints.source.settle(message)
        self.progress.done(is_dead=is_dead)

    async def _outcome(self, message: Message) -> store_pb2.Result | MessageFailure:
        """Submit the message's job and return its result, or the reason for which there is none."""
        try:
            submit = submit_of(self._spec, message)
        except InvalidArgument as err:
            return MessageFailure(err.code, err.message)
        accepted = await self._submitted(submit)
        if isinstance(accepted, MessageFailure):
            return accepted
        if accepted.existed and not _is_of_message(accepted.job, submit):
            other = f"its idempotency key belongs to job {accepted.job.id}, which is no job of this message"
            return MessageFailure(Code.ALREADY_EXISTS, other)
        await self._endings.until_ended(accepted.job.id, is_old=accepted.existed)
        try:
            return (await self._retry_until_available(lambda: self._endings.result(accepted.job.id))).result
        except ShoalError as err:
            if err.code not in (Code.NOT_FOUND, Code.DATA_LOSS):
                raise
            return MessageFailure(err.code, err.message, accepted.job.id)

    async def _submitted(self, submit: pb.SubmitRequest) -> Accepted | MessageFailure:
        async def submitted() -> Accepted:
            return await (await self._intake.begin_of_connector(submit))

        try:
            return await self._retry_until_available(submitted)
        except AlreadyExists:
            # The same message was submitted with another configuration of the connector. Its job is kept.
            earlier = await self._retry_until_available(
                lambda: self._intake.by_key(submit.tenant, submit.idempotency_key)
            )
            if earlier is not None:
                return Accepted(earlier, True)
            # The job was purged in between, so its key is free again.
            await asyncio.sleep(_FIRST_WAIT_S)
            return await self._submitted(submit)
        except ShoalError as err:
            if err.code not in PERMANENT:
                raise
            return MessageFailure(err.code, err.message)

    async def _send_outcome(
        self, message: Message, outcome: store_pb2.Result | MessageFailure, endpoints: Endpoints
    ) -> bool:
        """Send the answer or the dead letter of a message. Return True when it was a dead letter."""
        failed = outcome if isinstance(outcome, MessageFailure) else failed_of(outcome)
        if failed is None and isinstance(outcome, store_pb2.Result):
            if endpoints.sink is None:
                return False
            try:
                outgoing = answer_of(self._spec, message, outcome)
                await self._send(endpoints.sink, outgoing)
                return False
            except ShoalError as err:
                if err.code not in (Code.INVALID_ARGUMENT, Code.DATA_LOSS):
                    raise
                failed = MessageFailure(err.code, f"the answer cannot be sent on: {err.message}", outcome.job_id)
        assert failed is not None
        try:
            await self._send(endpoints.dead_letters, dead_letter(self._spec, message, failed))
        except InvalidArgument:
            # The message is too large with its reason. Its content is still at the source.
            await self._send(endpoints.dead_letters, dead_letter(self._spec, message, failed, is_whole=False))
        return True

    async def _send(self, sink: Sink, outgoing: Outgoing) -> None:
        await self._retry_until_available(lambda: sink.send(outgoing))

    async def _retry_until_available(self, act: Callable[[], Awaitable[T]]) -> T:
        """Return what `act` returns; retry transient errors without limit, and raise any other error."""
        backoff = Backoff()
        while True:
            try:
                return await act()
            except ShoalError as err:
                if err.code not in _TRANSIENT:
                    raise
                self._log_problem(err)
                await backoff.sleep(err.retry_after_ms)

    def _log_problem(self, err: ShoalError) -> None:
        if self.progress.record_error(err.message):
            log.warning(
                "connector %(connector)s: %(error)s",
                {"event": "connector.retrying", "connector": self._spec.name, "error": err.message},
            )


def _is_of_message(job: Job, submit: pb.SubmitRequest) -> bool:
    """Return True when a connector submitted `job` for the message of `submit`; its other labels may have changed."""
    labels = dict(job.labels)
    return all(labels.get(name) == submit.labels[name] for name in (CONNECTOR_LABEL, SOURCE_LABEL))


class Backoff:
    """Exponential backoff with jitter."""

    def __init__(self) -> None:
        self._next_s = _FIRST_WAIT_S

    async def sleep(self, at_least_ms: int | None = None) -> None:
        wait_s = max(self._next_s * random.uniform(0.5, 1), (at_least_ms or 0) / 1000)
        self._next_s = min(self._next_s * 2, _LONGEST_WAIT_S)
        await asyncio.sleep(wait_s)


def _first(group: BaseExceptionGroup[ShoalError]) -> ShoalError:
    found = group.exceptions[0]
    return found if isinstance(found, ShoalError) else _first(found)
