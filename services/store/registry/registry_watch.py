"""Live copy of the registry: one in the process, shared by all watchers.

    change stream on models and aliases ──> changed ──> wait for the rest of a burst ──> read the whole ──> Watched

The stream only signals *that* something changed; the registry is then read as a whole. So a broken stream needs no
resume token: it is opened again, and the registry is read once more after that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from types import TracebackType

from mesh.mongo import Document, next_change, translated
from mesh.process.tasks import end
from mesh.process.watched import Watched
from mesh.rpc.places import Places
from services.store.documents import Collections
from services.store.registry.model_rules import check_name
from services.store.registry.registry import Registry, Version
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

# A push registers and then sets an alias: one snapshot for both.
_BURST_S = 0.05
# A large registry takes long to read: while a folder of models is pushed, at most a quarter of the time goes into it.
_READ_SHARE, _LONGEST_BURST_S = 3, 0.5
_RETRY_S = 0.5
_AWAIT_MS = 1_000
_PIPELINE: list[Document] = [
    {"$match": {"ns.coll": {"$in": ["models", "aliases"]}}},
    {"$project": {"_id": 1, "operationType": 1}},
]


class RegistryWatch:
    """Use as `async with`: follows the registry while the block lasts, through any outage of MongoDB."""

    def __init__(self, collections: Collections, registry: Registry, max_watches: int) -> None:
        self._collections = collections
        self._registry = registry
        self._latest: Watched[tuple[Version, ...]] = Watched(())
        self._reading = asyncio.Lock()
        # Numbers of the reads that began last, and that ended last.
        self._begun = self._ended = 0
        # Watches of tenants take no places of the services that watch, such as infer.
        self._of_tenants, self._of_others = (Places(max_watches, "watches") for _ in range(2))
        self.turn = asyncio.Lock()
        """Held by a watcher while it works on a change: all of them are notified at the same time."""
        self._watched = asyncio.Event()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> RegistryWatch:
        async with AsyncExitStack() as stack:
            for loop in (self._follow_for_ever(), self._read_for_ever()):
                stack.push_async_callback(end, asyncio.create_task(loop))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def follow(self, name: str, tenant: str | None = None) -> AsyncGenerator[tuple[Version, ...], None]:
        """Yield the registry (or only model `name`) as it is now, and again after each change. Never ends.

        Raises:
            InvalidArgument: a bad name.
            ResourceExhausted: too many watches.
            Unavailable: MongoDB is unavailable at the start. A later outage is waited out.
        """
        if name:
            check_name(name)
        places = self._of_tenants if tenant else self._of_others
        with places.take(tenant):
            self._watched.set()
            await self._read()
            shown: tuple[Version, ...] | None = None
            async for versions in self._latest.follow():
                selected = versions if not name else tuple(each for each in versions if each.name == name)
                is_new = selected != shown
                # The newest of equal ones: a watcher keeps no earlier copy.
                shown = selected
                if is_new:
                    yield selected

    async def _read(self) -> None:
        """Replace the copy by a new read, one at a time, so that an older read never replaces a newer one.

        A read that begins after this call will do: those that wait meanwhile share it.
        """
        asked_at = self._begun
        async with self._reading:
            if self._ended > asked_at:
                return
            self._begun = number = self._begun + 1
            self._latest.set(tuple(await self._registry.versions("")))
            self._ended = number

    async def _read_for_ever(self) -> None:
        took_s = 0.0
        while True:
            await self._changed.wait()
            await asyncio.sleep(min(max(_BURST_S, _READ_SHARE * took_s), _LONGEST_BURST_S))
            self._changed.clear()
            start = time.monotonic()
            try:
                await self._read()
                took_s = time.monotonic() - start
            except Exception as err:
                self._changed.set()
                await _log_and_wait("reading the registry", err)

    async def _follow_for_ever(self) -> None:
        # The stream opens with the first watcher.
        await self._watched.wait()
        while True:
            try:
                await self._follow()
            except Exception as err:
                await _log_and_wait("watching the registry", err)

    async def _follow(self) -> None:
        """Signal a change when the stream opens, and at each of its events until it fails."""
        database = self._collections.db
        with translated("opening a change stream"):
            async with await database.watch(_PIPELINE, max_await_time_ms=_AWAIT_MS) as stream:
                self._changed.set()
                while stream.alive:
                    if await next_change(stream) is not None:
                        self._changed.set()


async def _log_and_wait(doing: str, err: Exception) -> None:
    if isinstance(err, ShoalError):
        log.warning("%(doing)s: %(error)s; retrying", {"event": "registry.retrying", "doing": doing, "error": err})
    else:
        log.error("%(doing)s failed; retrying", {"event": "registry.failed", "doing": doing}, exc_info=err)
    await asyncio.sleep(_RETRY_S)
