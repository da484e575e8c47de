"""All models of this instance: what is wanted is made so, one model at a time of its own, and calls find their version.

    want(...) ──> a task for each model: load what is missing ──> let go of what is not wanted
                                              |
                        calls: use(name, version)   index, readiness

A new version is loaded beside the old one. The old one goes only when a wanted one is ready in its place, and only
after the calls that hold it: nobody notices the change. A version that cannot be loaded does not take the old one away.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from mesh.latest import Latest
from services.infer.backoff import Backoff
from services.infer.version import Means, State, Version
from services.infer.wanted import WantedModel
from services.infer.wording import quoted
from shoal.errors import InvalidArgument, NotFound, Unavailable

log = logging.getLogger(__name__)

_RETRY_FIRST_S, _RETRY_MAX_S = 0.2, 10.0
# Files that could not be had are asked for again: soon, because the store may only be restarting; then at leisure.

_NUMBER = re.compile(r"[0-9]{1,19}")

ReadySet = tuple[tuple[str, tuple[int, ...]], ...]
"""Models with their ready versions, both ascending."""


@dataclass(frozen=True)
class IndexRow:
    """One line of the repository index."""

    name: str
    version: int | None
    state: State
    reason: str


def version_number(text: str) -> int | None:
    """The version that a call names; None for an empty text.

    Raises:
        InvalidArgument: it is not a number from 1 to 2**63 - 1.
    """
    if not text:
        return None
    if not _NUMBER.fullmatch(text) or not 0 < int(text) < 1 << 63:
        raise InvalidArgument(
            f"failed to get model version from specified version string {quoted(text)}: "
            "expected a whole number, 1 or more"
        )
    return int(text)


@dataclass(eq=False)
class Model:
    """One model with its versions, and the task that makes them what is wanted."""

    wanted: WantedModel
    means: Means
    on_change: asyncio.Event
    """Set whenever a state changes."""
    versions: Mapping[int, Version] = field(default_factory=dict)
    """Replaced whole, never changed: what calls see is always complete."""
    loading: tuple[Version, ...] = ()
    leaving: set[Version] = field(default_factory=set)
    is_settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Everything that is wanted has had its first attempt."""
    _rewanted: asyncio.Event = field(default_factory=asyncio.Event)
    _unloads: set[asyncio.Task[None]] = field(default_factory=set)

    def want(self, wanted: WantedModel) -> None:
        """Another wish. The same one again changes nothing, but tries at once what is to be tried again."""
        self.is_settled.clear()
        self.wanted = wanted
        self._rewanted.set()

    def ready(self) -> list[Version]:
        """Ascending."""
        return [version for _, version in sorted(self.versions.items()) if version.is_ready]

    def default(self) -> Version | None:
        """The version for calls that name none: the alias `stable` if it is ready, else the newest that is."""
        ready = self.ready()
        stable = [version for version in ready if version.number == self.wanted.stable]
        return (stable or ready)[-1] if ready else None

    def is_as_wanted(self) -> bool:
        """Whether it serves, and nothing that is wanted has failed."""
        failed = [version for version in self.versions.values() if version.state is State.UNAVAILABLE]
        return bool(self.ready()) and not failed

    def rows(self) -> Iterator[IndexRow]:
        """Its lines of the index: the state that counts for each version."""
        seen: dict[int, IndexRow] = {}
        for version in (*self.leaving, *self.loading, *self.versions.values()):
            seen[version.number] = IndexRow(self.wanted.name, version.number, version.state, version.reason)
        yield from (seen[number] for number in sorted(seen))
        if not seen and self.wanted.problem:
            yield IndexRow(self.wanted.name, None, State.UNAVAILABLE, self.wanted.problem)

    async def converge(self) -> None:
        """Makes it what is wanted, again and again, until it is cancelled."""
        backoff = Backoff(_RETRY_FIRST_S, _RETRY_MAX_S)
        while True:
            self._rewanted.clear()
            wanted = self.wanted
            await self._load_missing(wanted)
            if self.wanted is not wanted:
                continue
            self._let_go(wanted)
            self.is_settled.set()
            self.on_change.set()
            failed = any(version.may_retry for version in self.versions.values() if not version.is_ready)
            if not failed:
                backoff.reset()
            try:
                await asyncio.wait_for(self._rewanted.wait(), backoff.next_s() if failed else None)
            except TimeoutError:
                log.info("model %s: trying again to get its files", wanted.name)

    async def _load_missing(self, wanted: WantedModel) -> None:
        missing = [version for version in wanted.versions if not self._is_tried(version.version, version.digest)]
        self.loading = tuple(Version(wanted.name, version) for version in missing)
        if not self.loading:
            return
        self.on_change.set()
        try:
            # Newest first: it is the one that calls will want.
            await asyncio.gather(*(self._load(version) for version in reversed(self.loading)))
        finally:
            self.loading = ()

    async def _load(self, version: Version) -> None:
        await version.load(self.means)
        replaced = self.versions.get(version.number)
        self.loading = tuple(other for other in self.loading if other is not version)
        self.versions = {**self.versions, version.number: version}
        if replaced is not None:
            self._unload(replaced)
        self.on_change.set()

    def _is_tried(self, number: int, digest: str) -> bool:
        version = self.versions.get(number)
        return version is not None and version.wanted.digest == digest and (version.is_ready or not version.may_retry)

    def _let_go(self, wanted: WantedModel) -> None:
        numbers = {version.version for version in wanted.versions}
        has_taken_over = any(version.is_ready for number, version in self.versions.items() if number in numbers)
        for number, version in self.versions.items():
            is_needed = version.is_ready and number in wanted.available and not has_taken_over
            if number not in numbers and not is_needed:
                self.versions = {n: other for n, other in self.versions.items() if n != number}
                self._unload(version)

    def _unload(self, version: Version) -> None:
        if not version.is_ready:
            return
        version.state = State.UNLOADING
        self.leaving.add(version)
        task = asyncio.create_task(self._finish(version), name=f"unload-{version.name}-{version.number}")
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)

    async def _finish(self, version: Version) -> None:
        try:
            await version.unload()
        finally:
            self.leaving.discard(version)
            self.on_change.set()

    async def close(self) -> None:
        """Unloads all of it, after the calls that hold it."""
        for version in self.versions.values():
            self._unload(version)
        self.versions = {}
        await asyncio.gather(*self._unloads)


class Models:
    """The models of this instance. Use as `async with`: leaving unloads everything."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._models: dict[str, Model] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._is_told = asyncio.Event()
        self.ready_set: Latest[ReadySet] = Latest(())
        """What is ready now, for those who follow it."""

    async def __aenter__(self) -> Models:
        self._publisher = asyncio.create_task(self._publish(), name="ready-set")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        tasks = [*self._tasks.values(), self._publisher]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(model.close() for model in self._models.values()))

    def want(self, wanted: Sequence[WantedModel]) -> None:
        """These models should be served, and no others. Returns at once; `settled` waits for what comes of it."""
        by_name = {model.name: model for model in wanted}
        for name in self._models.keys() - by_name.keys():
            by_name[name] = WantedModel(name, ())
        for name, model in by_name.items():
            if name not in self._models:
                self._models[name] = Model(model, self._means, self._changed)
                self._tasks[name] = asyncio.create_task(self._models[name].converge(), name=f"model-{name}")
            elif self._models[name].wanted != model:
                self._models[name].want(model)
        self._is_told.set()
        self._changed.set()

    @property
    def is_told(self) -> bool:
        """Whether it was ever said what should be served."""
        return self._is_told.is_set()

    async def settled(self) -> None:
        """Waits until everything that is wanted has had its first attempt, successful or not."""
        await self._is_told.wait()
        while waiting := [model for model in self._models.values() if not model.is_settled.is_set()]:
            await asyncio.gather(*(model.is_settled.wait() for model in waiting))

    def is_ready(self) -> bool:
        """Whether it is known what to serve, every model of that serves, and no version of it has failed."""
        return self.is_told and all(model.is_as_wanted() for model in self._wanted())

    def index(self) -> list[IndexRow]:
        """Every version of every model, sorted by name and version."""
        return [row for name in sorted(self._models) for row in self._models[name].rows()]

    def versions(self, name: str) -> list[Version]:
        """The ready versions of one model, ascending; none for a model that is not here."""
        model = self._models.get(name)
        return model.ready() if model else []

    def names(self) -> list[str]:
        """Models with a ready version, sorted."""
        return [name for name, _ in self.ready_set.value]

    def find(self, name: str, version: str) -> Version:
        """The version of a model that a call means; an empty `version` leaves the choice to us.

        Raises:
            InvalidArgument: `version` is no number.
            NotFound: there is no such model or version.
            Unavailable: there is, but it is not ready.
        """
        number = version_number(version)
        model = self._models.get(name)
        if model is None or not self._is_wanted(model):
            raise NotFound(f"Request for unknown model: {quoted(name)} is not found")
        if number is None:
            chosen = model.default()
            if chosen is None:
                raise Unavailable(f"Request for unknown model: '{name}' has no version that is ready{_why(model)}")
            return chosen
        found = model.versions.get(number)
        if found is not None and found.is_ready:
            return found
        if found is None and number not in {loading.number for loading in model.loading}:
            raise NotFound(f"Request for unknown model: '{name}' version {number} is not found")
        raise Unavailable(f"Request for unknown model: '{name}' version {number} is not ready{_why(model, number)}")

    @contextmanager
    def use(self, name: str, version: str) -> Iterator[Version]:
        """The version that `find` finds, which stays loaded until the block ends. Raises what `find` does."""
        with self.find(name, version).in_use() as found:
            yield found

    def _is_wanted(self, model: Model) -> bool:
        return bool(model.wanted.versions or model.wanted.problem)

    def _wanted(self) -> list[Model]:
        return [model for model in self._models.values() if self._is_wanted(model)]

    async def _publish(self) -> None:
        """Tells followers what is ready, and forgets models of which nothing is left."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            for name, model in list(self._models.items()):
                if not self._is_wanted(model) and not model.versions and not model.leaving and not model.loading:
                    del self._models[name]
                    self._tasks.pop(name).cancel()
            ready = ((name, tuple(v.number for v in self._models[name].ready())) for name in sorted(self._models))
            self.ready_set.set(tuple((name, versions) for name, versions in ready if versions))


def _why(model: Model, number: int | None = None) -> str:
    rows = [row for row in model.rows() if number in (None, row.version)]
    if not rows:
        return ""
    newest = rows[-1]
    return f" ({newest.state}{': ' if newest.reason else ''}{newest.reason})"
