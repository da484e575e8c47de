"""One connector: takes messages, sees each through to its end, and only then lets its source forget it.

    receive ──window (messages, bytes)──> a task a message: submit, wait, send ──> settle
       └── not called while the window is full: that is the backpressure, up to the broker

Whatever unexpected happens, the connector starts again from what its source has committed: messages are delivered
again, find their jobs by their keys, and have the same results. So nothing here needs to be undone.
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
from services.ingest.connectors.outcome import MessageFailure, answered, dead_letter, failed_of, submit_of
from services.ingest.connectors.progress import ConnectorProgress
from services.ingest.intake.intake import Accepted
from services.ingest.intake.stream import Window
from services.ingest.job import PERMANENT, Job
from services.ingest.reading.endings import Ended
from shoal.errors import AlreadyExists, Code, InvalidArgument, ShoalError
from shoal.ingest.v1 import ingest_pb2 as pb
from shoal.store.v1 import store_pb2

log = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 10.0
_RECEIVED_AT_ONCE = 500
_PASSING = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.ABORTED})
# Worth a wait where it happened; what else fails starts the connector anew.

T = TypeVar("T")


class Submits(Protocol):
    """The intake, as a connector needs it."""

    async def begin_when_there_is_room(
        self, submit: pb.SubmitRequest, traceparent: str = ""
    ) -> asyncio.Future[Accepted]: ...

    async def by_key(self, tenant: str, key: str) -> Job | None: ...


class Ends(Protocol):
    """How jobs end, as a connector needs it."""

    async def until_ended(self, job_id: str, *, is_old: bool = False) -> None: ...

    async def result(self, job_id: str) -> Ended: ...


class Connector(Background):
    """Runs a plan until its block ends. Whoever is away, it waits."""

    def __init__(
        self, plan: ConnectorSpec, intake: Submits, endings: Ends, *, ready: asyncio.Event, progress: ConnectorProgress
    ) -> None:
        self._plan = plan
        self._intake = intake
        self._endings = endings
        self._ready = ready
        self._under_way: dict[Partition, set[asyncio.Task[None]]] = {}
        self._freed = asyncio.Event()
        self.progress = progress

    async def _run(self) -> None:
        await self._ready.wait()
        pause = Backoff()
        while True:
            before = self.progress.settled
            try:
                await self._serve(self._plan.open())
            except* ShoalError as group:
                self._log_problem(_first(group))
            except* Exception as group:
                log.exception("connector %s", self._plan.name, exc_info=group)
                self.progress.trouble("an unexpected error: the log has the cause")
            pause = Backoff() if self.progress.settled > before else pause
            self.progress.stopped()
            await pause.sleep()

    async def _serve(self, parts: Endpoints) -> None:
        window = Window(self._plan.max_in_flight, self._plan.max_bytes)
        async with AsyncExitStack() as stack:
            for part in (parts.dead_letters, parts.sink, parts.source):
                if part is not None:
                    await stack.enter_async_context(part)
            self.progress.started(parts.source.status)
            async with asyncio.TaskGroup() as tasks:
                while True:
                    for message in await parts.source.receive(await self._room()):
                        await window.enter(message.nbytes)
                        self._begin(tasks, message, parts, window)

    async def _room(self) -> int:
        """How many messages may come; waits until that is worth asking for."""
        while (room := self._plan.max_in_flight - self.progress.in_flight) < max(1, self._plan.max_in_flight // 4):
            self._freed.clear()
            await self._freed.wait()
        return min(room, _RECEIVED_AT_ONCE)

    def _begin(self, tasks: asyncio.TaskGroup, message: Message, parts: Endpoints, window: Window) -> None:
        self.progress.received()
        task = tasks.create_task(self._process(message, parts))
        self._under_way.setdefault(message.lane, set()).add(task)
        message.lane.on_revoked = self._give_up

        # A callback, not a `finally`: a task that is cancelled before its first step runs no code of its own.
        def left(_: object) -> None:
            self.progress.left()
            window.leave(message.nbytes)
            self._freed.set()
            self._under_way[message.lane].discard(task)
            if not self._under_way[message.lane]:
                del self._under_way[message.lane]

        task.add_done_callback(left)
        if message.lane.is_revoked:
            task.cancel()

    def _give_up(self, lane: Partition) -> None:
        for task in self._under_way.get(lane, ()):
            task.cancel()

    async def _process(self, message: Message, parts: Endpoints) -> None:
        is_dead = await self._deliver(message, await self._outcome(message), parts)
        parts.source.settle(message)
        self.progress.done(is_dead=is_dead)

    async def _outcome(self, message: Message) -> store_pb2.Result | MessageFailure:
        """How the message's job ended, or why there is none."""
        try:
            submit = submit_of(self._plan, message)
        except InvalidArgument as err:
            return MessageFailure(err.code, err.message)
        accepted = await self._accepted(submit)
        if isinstance(accepted, MessageFailure):
            return accepted
        await self._endings.until_ended(accepted.job.id, is_old=accepted.existed)
        try:
            return (await self._retry_until_available(lambda: self._endings.result(accepted.job.id))).result
        except ShoalError as err:
            if err.code not in (Code.NOT_FOUND, Code.DATA_LOSS):
                raise
            return MessageFailure(err.code, err.message, accepted.job.id)

    async def _accepted(self, submit: pb.SubmitRequest) -> Accepted | MessageFailure:
        async def submitted() -> Accepted:
            return await (await self._intake.begin_when_there_is_room(submit))

        try:
            return await self._retry_until_available(submitted)
        except AlreadyExists:
            # The same message, submitted when the connector was set up otherwise. Its job stands.
            earlier = await self._retry_until_available(
                lambda: self._intake.by_key(submit.tenant, submit.idempotency_key)
            )
            if earlier is not None:
                return Accepted(earlier, True)
            await asyncio.sleep(_FIRST_WAIT_S)  # It was purged in between: its key is free again.
            return await self._accepted(submit)
        except ShoalError as err:
            if err.code not in PERMANENT:
                raise
            return MessageFailure(err.code, err.message)

    async def _deliver(self, message: Message, outcome: store_pb2.Result | MessageFailure, parts: Endpoints) -> bool:
        """Sends what became of the message, and says whether that was to the dead letters."""
        failed = outcome if isinstance(outcome, MessageFailure) else failed_of(outcome)
        if failed is None and isinstance(outcome, store_pb2.Result):
            if parts.sink is None:
                return False
            try:
                outgoing = answered(self._plan, message, outcome)
                await self._send(parts.sink, outgoing)
                return False
            except ShoalError as err:
                if err.code not in (Code.INVALID_ARGUMENT, Code.DATA_LOSS):
                    raise
                failed = MessageFailure(err.code, f"the answer cannot be sent on: {err.message}", outcome.job_id)
        assert failed is not None
        try:
            await self._send(parts.dead_letters, dead_letter(self._plan, message, failed))
        except InvalidArgument:
            # Too large with its reason around it. What it was still lies where it came from.
            await self._send(parts.dead_letters, dead_letter(self._plan, message, failed, is_whole=False))
        return True

    async def _send(self, sink: Sink, outgoing: Outgoing) -> None:
        await self._retry_until_available(lambda: sink.send(outgoing))

    async def _retry_until_available(self, act: Callable[[], Awaitable[T]]) -> T:
        """What `act` returns, however long what it needs is away. Raises what waiting does not mend."""
        pause = Backoff()
        while True:
            try:
                return await act()
            except ShoalError as err:
                if err.code not in _PASSING:
                    raise
                self._log_problem(err)
                await pause.sleep(err.retry_after_ms)

    def _log_problem(self, err: ShoalError) -> None:
        if self.progress.trouble(err.message):
            log.warning("connector %s: %s", self._plan.name, err.message)


class Backoff:
    """Waits that double, with jitter."""

    def __init__(self) -> None:
        self._next_s = _FIRST_WAIT_S

    async def sleep(self, at_least_ms: int | None = None) -> None:
        wait_s = max(self._next_s * random.uniform(0.5, 1), (at_least_ms or 0) / 1000)
        self._next_s = min(self._next_s * 2, _LONGEST_WAIT_S)
        await asyncio.sleep(wait_s)


def _first(group: BaseExceptionGroup[ShoalError]) -> ShoalError:
    found = group.exceptions[0]
    return found if isinstance(found, ShoalError) else _first(found)
