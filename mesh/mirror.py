"""A live copy of all keys under a prefix of etcd: list once, then watch for ever.

    list ──> watch from revision + 1 ──(failure: stale, backoff)──> watch from the last revision + 1
      ^                 └──(compacted, or another etcd under the same address)──────┐
      └─────────────────────────────────────────────────────────────────────────────┘

While etcd is away the last copy stands, marked stale.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from mesh.etcd import Compacted, Entry, Etcd, Event
from mesh.latest import Latest
from mesh.tasks import Background
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

_BACKOFF_S = (0.05, 0.1, 0.2, 0.4)
# Then 0.4 s for ever: a handful of clients that ask twice a second harm no etcd, and all is well soon after its return.


@dataclass(frozen=True)
class Copy:
    """The keys at `revision` (0: never seen any). `stale`: etcd cannot be reached, this is the last that was known."""

    entries: Mapping[bytes, Entry] = field(default_factory=lambda: MappingProxyType({}))
    revision: int = 0
    stale: bool = True


def applied(entries: Mapping[bytes, Entry], events: tuple[Event, ...]) -> Mapping[bytes, Entry]:
    """The entries after the events; the given ones stay as they are."""
    after = dict(entries)
    for event in events:
        if event.entry is None:
            after.pop(event.key, None)
        else:
            after[event.key] = event.entry
    return MappingProxyType(after)


class Mirror(Background):
    """Follows `prefix` for as long as the `async with` block lasts. Entering does not wait for etcd."""

    def __init__(self, etcd: Etcd, prefix: bytes) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._copy: Latest[Copy] = Latest(Copy())

    @property
    def copy(self) -> Copy:
        """The newest copy."""
        return self._copy.value

    async def after(self, seen: Copy, timeout_s: float | None = None) -> Copy:
        """The copy as soon as it is another than `seen`, or as it is after `timeout_s`."""
        return await self._copy.after(seen, timeout_s)

    def follow(self) -> AsyncIterator[Copy]:
        """The copy as it is now, and again after each change. Never ends; the slow miss what was replaced meanwhile."""
        return self._copy.follow()

    async def _run(self) -> None:
        failures = 0
        listed = False
        while True:
            try:
                if not listed:
                    listing = await self._etcd.list(self._prefix)
                    entries = MappingProxyType({entry.key: entry for entry in listing.entries})
                    self._copy.set(Copy(entries, listing.revision, stale=False))
                    listed = True
                failures = 0
                listed = await self._watch()
            except Compacted as err:
                log.info("%s: listing again", err)
                listed = False
            except Exception as err:
                if not isinstance(err, ShoalError):  # A fault of ours must not end the copy for ever.
                    log.exception("mirror of %s", self._prefix.decode())
                    listed = False
                if not self.copy.stale:
                    log.warning("lost sight of etcd: %s", err)
                self._copy.set(replace(self.copy, stale=True))
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
                failures += 1

    async def _watch(self) -> bool:
        """Applies changes until the watch fails. Returns False when this etcd has less history than the copy."""
        async with aclosing(self._etcd.watch(self._prefix, self.copy.revision + 1)) as changes:
            async for change in changes:
                if change.revision < self.copy.revision:
                    log.warning("etcd's revision went back from %d to %d", self.copy.revision, change.revision)
                    return False
                entries = applied(self.copy.entries, change.events) if change.events else self.copy.entries
                # Quiet items do not move the revision: an event up to theirs may still be on its way.
                revision = change.revision if change.events else self.copy.revision
                if self.copy.stale:
                    log.info("etcd is back in sight at revision %d", change.revision)
                self._copy.set(Copy(entries, revision, stale=False))
        return True
