"""Attacks as data, and the loop that runs them at the full rate of one core."""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.siege.wire import Connection, Script

ATTACKER = "attacker"
"""Tenant of the attacker, and of one of the bystanders."""

# Interval at which lost connections are opened again and parked scripts continue.
_TICK_S = 0.01

# An attack opens at most this many connections, one after the other.
MAX_CONNECTIONS = 20_000


@dataclass(frozen=True)
class Attack:
    """One attack: `connections` at a time, each with `scripts` scripts. A connection that ends is opened again."""

    name: str
    what: str
    script: Callable[[Connection], Script]
    prepare: Callable[[], object] = lambda: None
    """Makes the bodies, before the time of the attack begins."""
    stock: Callable[[str], object] = lambda address: None
    """Puts into the node at this address what the attack needs, before its time begins."""
    connections: int = 8
    scripts: int = 1
    settings: Mapping[int, int] = field(default_factory=dict)
    is_raw: bool = False
    """The script begins before the server's SETTINGS have arrived."""
    fills_own_queue: bool = False
    """The bystander of the attacker's tenant may be refused: its tenant's part of the model's queue is full."""
    is_plain: bool = False
    """The connections speak HTTP/1.1."""
    is_brief: bool = False
    """A connection is closed at the end of its scripts."""
    is_of_jobs: bool = False
    """Needs ingest and store, and has bystanders that submit jobs."""


def has_begun(tally: Mapping[str, int]) -> bool:
    """Return True when a script has sent something: each waits for the SETTINGS of the server, and counts its work."""
    return any(tally.get(sent) for sent in ("calls", "frames", "greetings", "messages", "resets", "streams"))


class Siege:
    """Attacks on one address, several at a time."""

    def __init__(self, attacks: Sequence[Attack], address: str) -> None:
        self._address = address
        self._epoll = select.epoll()
        for attack in attacks:
            attack.prepare()
            attack.stock(address)
        self._places = [attack for attack in attacks for _ in range(attack.connections)]
        self._open: list[Connection | None] = [None] * len(self._places)
        self._place_of: dict[int, int] = {}
        self._watched: dict[int, int] = {}
        self._next_tick = 0.0
        self.tally: Counter[str] = Counter()

    def begin(self, until: float) -> bool:
        """Attack until a script has sent something, or until `until` (time.monotonic). Return `has_begun`."""
        while not has_begun(self.tally) and time.monotonic() < until:
            self._attack(until)
        return has_begun(self.tally)

    def run(self, until: float) -> Counter[str]:
        """Attack until `until` (time.monotonic), then close all connections."""
        while time.monotonic() < until:
            self._attack(until)
        for connection in self._open:
            if connection is not None and connection.is_open:
                self.tally["calls in flight at the end"] += len(connection.streams)
                connection.close()
        return self.tally

    def _attack(self, until: float) -> None:
        if (now := time.monotonic()) >= self._next_tick:
            self._next_tick = now + _TICK_S
            self._tick()
        for number, events in self._epoll.poll(max(0.0, min(self._next_tick, until) - time.monotonic()), 64):
            self._serve(self._place_of[number], number, events)

    def _tick(self) -> None:
        """Open what is missing, and continue parked scripts."""
        for place, connection in enumerate(self._open):
            if connection is None or not connection.is_open:
                self._connect(place)
            elif connection.is_parked:
                connection.is_parked = False
                self._watch(connection)

    def _connect(self, place: int) -> None:
        if self.tally["connections"] >= MAX_CONNECTIONS:
            return
        attack = self._places[place]
        connection = Connection(self._address, self.tally, settings=attack.settings, is_plain=attack.is_plain)
        connection.scripts = [attack.script(connection) for _ in range(attack.scripts)]
        connection.is_greeted = attack.is_raw or attack.is_plain
        self._open[place] = connection
        self.tally["connections"] += 1
        number = connection.socket.fileno()
        self._place_of[number] = place
        self._watched[number] = select.EPOLLIN | select.EPOLLOUT
        self._epoll.register(number, self._watched[number])

    def _serve(self, place: int, number: int, events: int) -> None:
        connection = self._open[place]
        assert connection is not None
        if events & ~select.EPOLLOUT:
            connection.read()
        if connection.is_open and connection.has_output:
            connection.write()
        if connection.is_open and not connection.scripts and self._places[place].is_brief:
            self.tally["connections closed by the attacker"] += 1
            connection.close()
        if connection.is_open:
            self._watch(connection)
        elif self._places[place].is_brief:
            self._connect(place)

    def _watch(self, connection: Connection) -> None:
        number = connection.socket.fileno()
        events = select.EPOLLIN * connection.is_reading | select.EPOLLOUT * connection.has_output
        if events != self._watched[number]:
            self._epoll.modify(number, events)
            self._watched[number] = events
