"""Client operations on batches: get, list, follow, cancel, pause and resume."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from mesh.process.pauses import Pauses
from mesh.process.tasks import uninterrupted
from mesh.rpc.places import Places
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from mesh.rpc.tenant_turns import WAIT_S, TenantTurns
from services.ingest.batches.batch import Batch, BatchState, Ending, Totals
from services.ingest.batches.batch_repository import BatchRepository
from services.ingest.batches.chunk_repository import ChunkRepository
from services.ingest.limits import REASON_CHARS
from services.ingest.queries.jobs import Filter
from services.ingest.ulid import is_ulid
from shoal.errors import FailedPrecondition, InvalidArgument, Unavailable

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1_000
WATCH_S = 0.5
"""Interval at which a watcher polls for progress."""
POLLS_PER_S = 100
"""Polls of all watchers of a tenant: each reads a batch and the sum of its chunks, in about a millisecond together."""
# Lifetime of a cached sum: many clients may watch one batch.
_SUM_TTL_S = 0.25
# A sum reads all chunks of its batch, 244,000 of a billion rows. It lives this many times as long as it took, so that
# sums take at most a twentieth of MongoDB's time for a batch.
_SUM_TTL_TIMES = 20
# As many as batches may be active.
_MAX_SUMS = 1_000
_SUMS_AT_ONCE = 4
CALLS_AT_ONCE = 8
"""Reads and changes of batches by clients. 4,000 at once took all connections to MongoDB for 6 s."""
# Time that CancelBatch waits for the batch's end before it responds.
_CANCEL_WAIT_S = 3.0
# Interval of its polls, unless calls of the tenant together would read more than POLLS_PER_S.
_CANCEL_POLL_S = 0.05
# Time that a watcher survives an unavailable database.
_OUTAGE_S = 30.0


@dataclass(frozen=True, slots=True)
class BatchView:
    """Batch with its counts so far."""

    batch: Batch
    totals: Totals


class BatchControl:
    """Client operations on batches."""

    def __init__(
        self,
        batches: BatchRepository,
        chunks: ChunkRepository,
        *,
        on_change: Callable[[], None],
        max_watches: int,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._batches = batches
        self._chunks = chunks
        self._on_change = on_change
        self._watches = Places(max_watches, "watches")
        # Calls of CancelBatch that wait, by tenant.
        self._cancelling: Counter[str] = Counter()
        self._sum_turns = TenantTurns(_SUMS_AT_ONCE, leaves_room=True)
        self._call_turns = TenantTurns(CALLS_AT_ONCE, leaves_room=True, wait_s=WAIT_S)
        self.pauses = Pauses()
        """Of calls for pages."""
        self._monotonic = monotonic
        self._sleep = sleep
        # Each with the time until which it is returned.
        self._sums: OrderedDict[tuple[str, bool], tuple[float, Totals]] = OrderedDict()
        self._locks: WeakValueDictionary[tuple[str, bool], asyncio.Lock] = WeakValueDictionary()

    async def get(self, batch_id: str, scope: TenantScope = EVERY_TENANT) -> BatchView:
        """Return one batch of the scope.

        Raises:
            InvalidArgument: the id is empty. NotFound: no such batch. Unavailable: MongoDB is unavailable.
        """
        return await self._view(await self._read(batch_id, scope))

    async def _read(self, batch_id: str, scope: TenantScope) -> Batch:
        async with self._call_turns.take(scope.tenant or ""):
            return await uninterrupted(self._batches.get(batch_id, scope))

    async def page(self, requested: Filter, size: int, token: str) -> tuple[list[BatchView], str]:
        """Return the newest batches, and a token for the next page: empty on the last page.

        Raises:
            InvalidArgument: a bad size or token. Unavailable: MongoDB is unavailable.
        """
        if not 0 <= size <= MAX_PAGE_SIZE:
            raise InvalidArgument(f"page_size: 0 (the default, {DEFAULT_PAGE_SIZE}) to {MAX_PAGE_SIZE}, got {size}")
        if token and not is_ulid(token):
            raise InvalidArgument("page_token: not the next_page_token of a page of batches")
        size = size or DEFAULT_PAGE_SIZE
        async with self._call_turns.take(requested.tenant):
            found, has_more = await uninterrupted(self._batches.page(requested, size, token))
        views = [await self._view(batch) for batch in found]
        return views, found[-1].id if has_more else ""

    async def follow(self, batch_id: str, scope: TenantScope = EVERY_TENANT) -> AsyncIterator[BatchView]:
        """Yield a batch of the scope now, and after each change, until the batch has ended.

        Raises:
            NotFound: no such batch. ResourceExhausted: too many watches. Unavailable: MongoDB was unavailable for too
            long.
        """
        with self._watches.take(scope.tenant):
            last = await self.get(batch_id, scope)
            yield last
            while not last.batch.is_final:
                await self._sleep(self._interval_s(scope.tenant))
                view = await self._get_with_retry(batch_id, scope)
                if view != last:
                    last = view
                    yield view

    def _interval_s(self, tenant: str | None) -> float:
        return max(WATCH_S, self._watches.held_by(tenant) / POLLS_PER_S)

    async def cancel(self, batch_id: str, reason: str, scope: TenantScope = EVERY_TENANT) -> BatchView:
        """Cancel a batch of the scope; published parts stay. Wait briefly for the batch's end, and return the batch.

        Raises:
            InvalidArgument: no id, or the reason is too long. NotFound: no such batch. Unavailable: MongoDB is
            unavailable.
        """
        _check_reason(reason)
        await self._read(batch_id, scope)
        text = f"cancelled: {reason}" if reason else "cancelled by a client"
        async with self._call_turns.take(scope.tenant or ""):
            await uninterrupted(self._batches.request_end(batch_id, Ending(BatchState.CANCELLED, text)))
        self._on_change()
        view = await self.get(batch_id, scope)
        tenant = view.batch.tenant
        self._cancelling[tenant] += 1
        try:
            give_up_at = self._monotonic() + _CANCEL_WAIT_S
            while not view.batch.is_final and self._monotonic() < give_up_at:
                interval_s = max(_CANCEL_POLL_S, self._cancelling[tenant] / POLLS_PER_S)
                await self._sleep(min(interval_s, give_up_at - self._monotonic()))
                view = await self.get(batch_id, scope)
        finally:
            self._cancelling[tenant] -= 1
            if not self._cancelling[tenant]:
                del self._cancelling[tenant]
        return view

    async def pause(self, batch_id: str, reason: str, scope: TenantScope = EVERY_TENANT) -> BatchView:
        """Pause a batch of the scope: start no further chunk, and release the running ones. Idempotent.

        Raises:
            FailedPrecondition: the batch has ended. InvalidArgument, NotFound, Unavailable: as `cancel`.
        """
        reason = reason or "paused by a client"
        return await self._change_state(batch_id, BatchState.RUNNING, BatchState.PAUSED, reason, scope)

    async def resume(self, batch_id: str, reason: str, scope: TenantScope = EVERY_TENANT) -> BatchView:
        """Resume a paused batch of the scope. Raises as `pause` does."""
        reason = reason or "resumed by a client"
        return await self._change_state(batch_id, BatchState.PAUSED, BatchState.RUNNING, reason, scope)

    async def _change_state(
        self, batch_id: str, before: BatchState, after: BatchState, reason: str, scope: TenantScope
    ) -> BatchView:
        _check_reason(reason)
        async with self._call_turns.take(scope.tenant or ""):
            changed = await uninterrupted(self._batches.change_state(batch_id, before, after, reason, scope))
        self._on_change()
        batch = changed or await self._read(batch_id, scope)
        if batch.state is not after or batch.ending is not None:
            state = batch.ending.state if batch.ending is not None else batch.state
            raise FailedPrecondition(f"batch {batch_id} cannot be {_DONE[after]}: it is {state} already")
        return await self._view(batch)

    async def _view(self, batch: Batch) -> BatchView:
        if batch.totals is not None:
            return BatchView(batch, batch.totals)
        if batch.is_final:
            return BatchView(batch, Totals())
        return BatchView(batch, await self._sum(batch))

    async def _sum(self, batch: Batch) -> Totals:
        # The key has `is_planned`, because a sum from before the plan was complete is too small.
        key = (batch.id, batch.is_planned)
        async with self._locks.setdefault(key, asyncio.Lock()):
            began = self._monotonic()
            if (known := self._sums.get(key)) is not None and began < known[0]:
                return known[1]
            async with self._sum_turns.take(batch.tenant):
                began = self._monotonic()
                totals = await uninterrupted(self._chunks.totals(batch.id))
            ended = self._monotonic()
            self._sums[key] = (ended + max(_SUM_TTL_S, (ended - began) * _SUM_TTL_TIMES), totals)
            while len(self._sums) > _MAX_SUMS:
                self._sums.popitem(last=False)
            return totals

    async def _get_with_retry(self, batch_id: str, scope: TenantScope) -> BatchView:
        give_up_at = time.monotonic() + _OUTAGE_S
        while True:
            try:
                return await self.get(batch_id, scope)
            except Unavailable:
                if time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(WATCH_S)


_DONE = {BatchState.PAUSED: "paused", BatchState.RUNNING: "resumed"}


def _check_reason(reason: str) -> None:
    if len(reason) > REASON_CHARS:
        raise InvalidArgument(f"reason: at most {REASON_CHARS} characters, got {len(reason)}")
