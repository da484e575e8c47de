"""Live copy of all keys under a prefix of etcd: list once, then watch.

    list ──> watch from revision + 1 ──(failure: stale, backoff)──> watch from the last revision + 1
      ^                 └──(compacted, or another etcd under the same address)──────┐
      └─────────────────────────────────────────────────────────────────────────────┘

While etcd is unreachable, readers keep the last copy, marked stale.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from mesh.cluster.etcd import Compacted, Entry, Etcd, Event
from mesh.process.tasks import Background
from mesh.process.watched import Watched
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

# The last delay repeats: a few clients that retry twice a second do not load etcd, and they recover quickly.
_BACKOFF_S = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Copy:
    """The keys at `revision` (0 before the first listing). `stale`: etcd is unreachable and this is the last copy."""

    entries: Mapping[bytes, Entry] = field(default_factory=lambda: MappingProxyType({}))
    revision: int = 0
    stale: bool = True


def applied(entries: Mapping[bytes, Entry], events: tuple[Event, ...]) -> Mapping[bytes, Entry]:
    """Return a new mapping: `entries` with `events` applied."""
    after = dict(entries)
    for event in events:
        if event.entry is None:
            after.pop(event.key, None)
        else:
            after[event.key] = event.entry
    return MappingProxyType(after)


class Mirror(Background):
    """Follows `prefix` while the `async with` block runs. Entering does not wait for etcd."""

    def __init__(self, etcd: Etcd, prefix: bytes) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._copy: Watched[Copy] = Watched(Copy())

    @property
    def copy(self) -> Copy:
        """Newest copy."""
        return self._copy.value

    async def after(self, seen: Copy, timeout_s: float | None = None) -> Copy:
        """Wait until the copy differs from `seen`, at most `timeout_s`; return the newest copy."""
        return await self._copy.after(seen, timeout_s)

    def follow(self) -> AsyncIterator[Copy]:
        """Yield the copy now and after each change, for ever. A slow reader skips copies that were replaced."""
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
                log.info("%(error)s: listing again", {"event": "etcd.listing_again", "error": err})
                listed = False
            except Exception as err:
                if not isinstance(err, ShoalError):  # A bug must not stop the mirror for ever.
                    log.exception(
                        "mirror of %(prefix)s", {"event": "etcd.mirror_failed", "prefix": self._prefix.decode()}
                    )
                    listed = False
                if not self.copy.stale:
                    log.warning("etcd is unreachable: %(error)s", {"event": "etcd.unreachable", "error": err})
                self._copy.set(replace(self.copy, stale=True))
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
                failures += 1

    async def _watch(self) -> bool:
        """Apply changes until the watch fails. Return False when this etcd has less history than the copy."""
        async with aclosing(self._etcd.watch(self._prefix, self.copy.revision + 1)) as changes:
            async for change in changes:
                if change.revision < self.copy.revision:
                    log.warning(
                        "etcd's revision went back from %(former_revision)d to %(revision)d",
                        {
                            "event": "etcd.revision_went_back",
                            "former_revision": self.copy.revision,
                            "revision": change.revision,
                        },
                    )
                    return False
                entries = applied(self.copy.entries, change.events) if change.events else self.copy.entries
                # Items without events do not advance the revision: events before theirs may still arrive.
                revision = change.revision if change.events else self.copy.revision
                if self.copy.stale:
                    log.info(
                        "etcd is reachable again, at revision %(revision)d",
                        {"event": "etcd.reachable", "revision": change.revision},
                    )
                self._copy.set(Copy(entries, revision, stale=False))
        return True
