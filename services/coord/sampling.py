"""Sampling for the history: the leading coord reads the metrics of each node every 5 s, at one address a node.

    each node's admin address ──/metrics──> Counters ──changes of all nodes──> rows ──> History

Only the leader reads, so that each node is asked once. After a failover the history begins anew, at the new leader; a
coord that led before has its own, with a gap.
A node that does not answer within ASK_S has no figures for this slot, and is named as missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

from mesh.cluster.election import Election
from mesh.cluster.mirror import Mirror
from mesh.metrics import page_client
from mesh.process.tasks import Background
from services.coord.cluster import cluster_of
from services.coord.history import EVERY_S, SLOTS, History, Points
from shoal import rates
from shoal.errors import Unavailable
from shoal.rates import Change, Counters, Row

log = logging.getLogger(__name__)

ASK_S, PROCESS_S = 4.0, 2.0
"""Time in which a node must answer, less than a slot, and in which each of its processes must: one that stands still
does not take the others' figures along."""
SERIES = 40_000
"""Most counters of all nodes that are followed: 10 MiB. An idle one is none; a busy model has 25 an instance."""
PAGE_BYTES = 64 << 20
"""Most bytes of a node's page."""
CLOCK_SET_S = 1.0
"""Difference between the two clocks from which the time of day was set since the beginning. Below it, the beginning has
the same time in each report."""
_NAMES = "&".join(f"name[]={quote(name)}" for name in rates.PAGE)


@dataclass(slots=True)
class Node:
    """A node that is asked for its metrics."""

    name: str
    address: str
    seen: float
    """Time of the monotonic clock when it was last registered."""
    counters: Counters = field(default_factory=Counters)
    answered_at: float = 0.0
    """Unix time of the last answer; 0: none."""
    is_missing: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """Points of one kind of names, with the nodes that they are from."""

    since: float
    """Unix time at which the history began, by a clock that may have been set since."""
    until: float
    """Unix time of the end of the last point."""
    points: Points
    nodes: tuple[Node, ...]
    left_out: int
    """Names of the last reading that the memory has no place for."""


class Sampling(Background):
    """Keeps the history while this coord leads. Use as `async with`.

    Args:
        mirror: copy of all keys of the cluster, with the admin address of each node.
        election: tells when this coord leads.
        clock: monotonic seconds.
        now: unix seconds.
    """

    def __init__(
        self,
        mirror: Mirror,
        election: Election,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._mirror = mirror
        self._election = election
        self._clock = clock
        self._now = now
        # One at a time: a thread changes the history, or reads it.
        self._turn = asyncio.Lock()
        self._begin()

    def _begin(self) -> None:
        self._history = History()
        self._nodes: dict[str, Node] = {}
        self._began, self._since = self._clock(), self._now()

    async def _run(self) -> None:
        async for term in self._election.terms():
            if not self._history.slots:
                self._begin()
            while term.is_current():
                # Times at which nodes are asked since the beginning, with those that were passed over.
                number = round((self._clock() - self._began) / EVERY_S)
                try:
                    await self.sample()
                # A bug must not end the history for the rest of the process.
                except Exception:
                    log.exception("cannot read the metrics of the nodes", {"event": "history.sampling_failed"})
                await asyncio.sleep(max(0.0, self._began + (number + 1) * EVERY_S - self._clock()))

    async def sample(self) -> None:
        """Ask every node, and add a slot."""
        asked_at = self._clock()
        self._note_nodes(asked_at)
        pages = await asyncio.gather(*(self._ask(node) for node in self._nodes.values()))
        texts = {node.name: page for node, page in zip(self._nodes.values(), pages, strict=True)}
        async with self._turn:
            await asyncio.to_thread(self._take, texts, asked_at)

    def _note_nodes(self, now: float) -> None:
        """Follow the registered nodes. One that has gone is asked, and named as missing, for an hour."""
        for instance in cluster_of(self._mirror.copy).instances:
            if not instance.admin:
                continue
            node = self._nodes.get(instance.node)
            if node is None or node.address != instance.admin:
                node = self._nodes[instance.node] = Node(instance.node, instance.admin, now)
            node.seen = now
        for name in [name for name, node in self._nodes.items() if now - node.seen > SLOTS * EVERY_S]:
            del self._nodes[name]

    async def _ask(self, node: Node) -> str | None:
        target = f"/metrics?node={quote(node.name)}&within={PROCESS_S:g}&{_NAMES}"
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            found = await page_client.fetch(node.address, target, timeout_s=ASK_S, most_bytes=PAGE_BYTES)
            if found.status == 200:
                return found.body.decode(errors="replace")
        return None

    def _take(self, texts: Mapping[str, str | None], at: float) -> None:
        changes: dict[str, Change] = {}
        for name, text in texts.items():
            node = self._nodes[name]
            node.is_missing = True
            if text is None:
                continue
            with contextlib.suppress(ValueError):
                node.counters.series = SERIES // len(texts)
                change = node.counters.take(text, at)
                node.is_missing, node.answered_at = False, self._now()
                if change is not None:
                    changes[name] = change
        # The first readings are where the growth begins, and end no slot.
        slot = round((at - self._began) / EVERY_S) - 1
        if slot >= 0:
            self._history.add(slot, _rows(changes))

    async def report(self, by: str, seconds: float, points: int) -> Report:
        """Return the figures of a kind of names: `model`, `tenant` or `instance`.

        Raises:
            Unavailable: this coord does not lead.
        """
        if not self._election.is_leader:
            raise Unavailable("no coord leads at present: retry")
        async with self._turn:
            found = await asyncio.to_thread(self._history.points, by, seconds, points)
            nodes = tuple(sorted(self._nodes.values(), key=lambda node: node.name))
            since = self._now() - (self._clock() - self._began)
            if abs(since - self._since) > CLOCK_SET_S:
                self._since = since
            return Report(self._since, self._since + found.end * EVERY_S, found, nodes, self._history.left_out)


def _rows(changes: Mapping[str, Change]) -> Mapping[str, list[Row]]:
    """Return the rows of all nodes by kind: models and tenants summed, instances named `<node>/<process>`."""
    whole = rates.merged(changes, EVERY_S)
    instances = []
    for node, change in changes.items():
        for row in rates.instances(change):
            if row.name.endswith(rates.NO_ANSWER):
                continue
            row.name = f"{node}/{row.name}"
            row.stalls *= EVERY_S / change.seconds
            instances.append(row)
    return {"model": rates.models(whole), "tenant": rates.tenants(whole), "instance": instances}
