"""MongoDB's log for tests of watches: a double that is read as the test says, and a count of the real one's answers."""

from __future__ import annotations

import asyncio

from pymongo.monitoring import CommandFailedEvent, CommandListener, CommandStartedEvent, CommandSucceededEvent

from mesh.mongo import Document


class Answers(CommandListener):
    """The number of changes in each answer of MongoDB."""

    def __init__(self) -> None:
        self.changes: list[int] = []

    def started(self, event: CommandStartedEvent) -> None: ...

    def succeeded(self, event: CommandSucceededEvent) -> None:
        if event.command_name == "getMore":
            self.changes.append(len(event.reply["cursor"]["nextBatch"]))

    def failed(self, event: CommandFailedEvent) -> None: ...


class Log:
    """MongoDB's log: it is read to its end once the test lets it, by streams in the order of their begin."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.behind: list[str] = []
        self.live = 0
        self.left: list[str] = []

    async def watch(self, pipeline: list[Document], *, max_await_time_ms: int = 1_000, **more: object) -> Stream:
        tenants = (stage["$match"].get("fullDocument.tenant") for stage in pipeline if "$match" in stage)
        return Stream(self, next(filter(None, tenants), ""), is_behind=max_await_time_ms < 100)


class Stream:
    """A stream of changes that has none."""

    alive = True

    def __init__(self, log: Log, tenant: str, *, is_behind: bool) -> None:
        self._log, self._tenant, self._is_behind = log, tenant, is_behind
        self.resume_token: Document = {"_data": "82"}

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def try_next(self) -> None:
        if not self._is_behind:
            self._log.live += 1
            await asyncio.Event().wait()
        self._log.behind.append(self._tenant)
        try:
            await self._log.may_end.wait()
        except asyncio.CancelledError:
            self._log.left.append(self._tenant)
            raise
