"""No order of operations collects what is referred to: with no ages at all, so that safety rests on fences alone.

Nor does one count it wrongly for its tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh import mongo
from mesh.process.threads import Threads
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.staging import Staging
from services.store.garbage.collector import Ages, Collector
from services.store.garbage.references import References
from services.store.registry.registry import Registry
from services.store.usage.counters import Counters
from services.store.usage.weight import Weight, weight_of_payloads
from shoal.errors import Aborted, NotFound, Unavailable
from tests.long_form import by_form
from tests.store.artifacts.conftest import uploaded
from tests.store.conftest import sha256
from tests.store.garbage.conftest import Clock, Parts, make_parts
from tests.store.garbage.interleaving import Turnstile, stopped_at

pytestmark = pytest.mark.mongo

NO_AGES = Ages(timedelta(0), timedelta(0), timedelta(0))
NO_TIME = timedelta(0)


class Ticking(Clock):
    """Each look at it is later than the one before; and later than the time of any blob."""

    def __init__(self) -> None:
        super().__init__()
        self.advance(days=1)

    def __call__(self):
        self.advance(milliseconds=1)
        return self.now


_FOR_EVER = 10_000


class Story:
    """What is done with one artifact, and what must be true of it at the end."""

    def __init__(self, parts: Parts, data: bytes) -> None:
        self.parts = parts
        self.data = data
        self.digest = sha256(data)
        self.names = itertools.count()
        self.referred: set[str] = set()

    async def do(self, *acts: str) -> None:
        """Some acts, in turn. One may be refused (here even an upload has no time), but not be told of damage."""
        for act in acts:
            with contextlib.suppress(NotFound, Aborted, Unavailable):
                await getattr(self, act)()

    async def push(self) -> None:
        """As `shoal models push` does it."""
        await self._upload()
        name = f"m{next(self.names)}"
        await self.parts.register(name, self.data)
        self.referred.add(name)

    async def claim(self) -> None:
        """As a job with a large payload does it."""
        name = f"job/{next(self.names)}"
        await self._upload(reference=name)
        await self.parts.refer(name, self.data, "t")
        self.referred.add(name)

    async def let_go(self) -> None:
        """Ends whatever use there is."""
        for name in sorted(self.referred):
            self.referred.discard(name)
            if name.startswith("job/"):
                await self.parts.references.release([name])
            else:
                await self.parts.registry.remove(name, 0)
            return

    async def read(self) -> None:
        assert await self.parts.read(self.data) == self.data

    async def collect(self) -> None:
        await self.parts.collector.collect(strays=True)

    async def collect_twice(self) -> None:
        for _ in range(2):
            await self.collect()

    async def mark(self) -> None:
        await self.parts.collector.mark()

    async def count(self) -> None:
        await Counters(self.parts.collections, self.parts.clock).flush()

    async def recount(self) -> None:
        await Counters(self.parts.collections, self.parts.clock).recount("t")

    async def stat(self) -> None:
        await self.parts.artifacts.stat(self.digest)

    async def _upload(self, **header: object) -> None:
        await self.parts.artifacts.put(await uploaded(self.data, **header))

    async def check(self) -> None:
        """At the end."""
        await self.count()
        claims = sum(name.startswith("job/") for name in self.referred)
        counter = await self.parts.collections.usage.find_one({"_id": "t"})
        counted = Weight() if counter is None else Weight.counted(counter)
        assert counted == weight_of_payloads(claims, claims * len(self.data))
        if self.referred:
            assert await self.parts.read(self.data) == self.data
        # What is condemned in one round goes in the next; what a broken upload left may take two more.
        for rounds in itertools.count(1):
            await self.parts.collector.collect(strays=True)
            keys, known = await self.parts.keys(), await self.parts.known()
            is_clean = len(keys) == 1 if self.referred else not keys and not known
            if rounds == 4 or (rounds >= 2 and is_clean):
                break
        assert is_clean, (keys, known)
        if self.referred:
            assert await self.parts.read(self.data) == self.data


class World:
    """A MongoDB and a folder, for many examples."""

    def __init__(self, uri: str, folder: Path, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.turnstiles: list[Turnstile] = []
        self._threads = Threads(2)
        self._client = mongo.connect(uri)
        self._folder = folder
        self.parts = runner.run(self._made())

    async def _made(self) -> Parts:
        clock = Ticking()
        parts = make_parts(self._client[f"test_{uuid.uuid4().hex[:16]}"], self._folder, self._threads, clock)
        await parts.collections.prepare()
        staging = Staging(self._folder / "staging", 64, 3_600)
        parts.artifacts = Artifacts(
            parts.collections, parts.blobs, staging, self._threads, max_bytes=1 << 20, clock=clock, kept_for=NO_TIME
        )
        parts.collector = Collector(parts.collections, parts.blobs, clock, NO_AGES)
        parts.registry = Registry(parts.collections, parts.artifacts, clock, 8 << 20)
        parts.references = References(parts.collections, parts.artifacts, clock)
        return parts

    async def close(self) -> None:
        await self._client.close()
        self._threads.__exit__()

    async def example(
        self, acts: Sequence[str], first: Sequence[str], order: Sequence[tuple[int, int]]
    ) -> Counter[int]:
        """Do `first`, one after the other, then `acts` side by side, in `order`; return the operations of each act."""
        story = Story(self.parts, uuid.uuid4().bytes)
        for name in first:
            await story.do(name)
        turnstile = Turnstile(order)
        self.turnstiles.append(turnstile)
        try:
            await turnstile.run(*(story.do(*act.split("+")) for act in acts))
        finally:
            self.turnstiles.clear()
        try:
            await story.check()
        finally:
            await self._emptied()
        return turnstile.passed

    def interrupt_everywhere(self, acts: tuple[str, str], first: Sequence[str]) -> None:
        """Interrupt either act before each of its operations, once, by all of the other act."""
        for interrupted in (0, 1):
            steps, took = 0, 0
            while steps <= took:
                order = [(interrupted, steps), (1 - interrupted, _FOR_EVER)]
                # Its own operations only: after the last of them there is nothing left to interrupt.
                took = self.runner.run(self.example(acts, first, order))[interrupted]
                steps += 1

    async def _emptied(self) -> None:
        found = self.parts.collections
        for collection in (found.artifacts, found.models, found.references, found.pending_deletions, found.usage):
            await collection.delete_many({})
        for key in await self.parts.keys():
            await self.parts.blobs.remove(key)


@pytest.fixture(scope="module")
def world(mongo_uri: str) -> Iterator[World]:
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        world = World(mongo_uri, Path(folder), runner)
        with stopped_at(world.turnstiles):
            yield world
        runner.run(world.close())


FIRST = {
    "in use": ("push",),
    "not needed": ("push", "let_go"),
    "condemned": ("claim", "let_go", "mark"),
}


# In the short form, each of `others` once, beside the rounds that it disturbs most.
RESCUES = [("condemned", ("push",)), ("condemned", ("claim",)), ("in use", ("let_go", "push"))]
OTHERS = [("push",), ("claim",), ("let_go", "push")]


@pytest.mark.parametrize(
    ("first", "others"),
    by_form(RESCUES, [*itertools.product(["in use", "condemned"], OTHERS)]),
    ids=lambda value: value if isinstance(value, str) else " then ".join(value),
)
def test_every_single_interruption(world: World, first: str, others: tuple[str, ...]) -> None:
    world.interrupt_everywhere(("collect_twice", "+".join(others)), FIRST[first])


# In the short form, each of them once.
ADDING_UP = ["claim+let_go", "count", "recount"]
COUNTED = by_form(
    [("claim", "recount"), ("let_go", "count"), ("claim", "claim+let_go")],
    [*itertools.product(["claim", "let_go", "claim+claim+let_go"], ADDING_UP)],
)


@pytest.mark.parametrize(("act", "other"), COUNTED)
def test_every_single_interruption_of_what_is_counted(world: World, act: str, other: str) -> None:
    """The same for those who change what a tenant has, beside those who add it up."""
    world.interrupt_everywhere((act, other), ("claim", "count", "claim"))


ACTS = st.sampled_from(["push", "claim", "let_go", "read", "stat", "collect", "count", "recount"])
TURNS = st.tuples(st.integers(0, 4), st.integers(1, 12))


@settings(max_examples=by_form(30, 200), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.sampled_from(sorted(FIRST)),
    acts=st.lists(ACTS, min_size=1, max_size=4),
    order=st.lists(TURNS, min_size=3, max_size=12),
)
def test_no_order_loses_what_is_referred_to(
    world: World, first: str, acts: list[str], order: list[tuple[int, int]]
) -> None:
    world.runner.run(world.example([*acts, "collect"], FIRST[first], order))
