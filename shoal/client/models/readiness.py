"""Wait until a pushed model is ready on every infer instance that takes traffic.

One ready instance is not enough: a request may reach another one. A version that the model's version policy does not
serve is never ready anywhere; the wait then ends, and returns the version as not served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.deadline import Deadline, Timeout
from shoal.coord.v1 import coord_pb2 as coord
from shoal.errors import DeadlineExceeded, FailedPrecondition, PermissionDenied, ShoalError, Unavailable, Unimplemented
from shoal.inference.v2 import inference_pb2 as oip

T = TypeVar("T")

# Loading takes tenths of a second or more; the polls are served from memory.
POLL_S = 0.1

# Timeout of one poll: short, so that a poll that hangs does not use up the time of the next ones.
POLL_TIMEOUT_S = 5.0

# An instance learns of a new version within tenths of a second, and retries failed downloads. So a version that is
# missing from its index, or unavailable, for this long stays so.
SETTLED_S = 2.0


@dataclass(frozen=True)
class VersionReadiness:
    """Names of the infer instances in traffic that have a version ready, and of those that do not."""

    ready: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def everywhere(self) -> bool:
        """True when there are instances, and all have the version ready."""
        return bool(self.ready) and not self.missing

    def __str__(self) -> str:
        if not self.ready and not self.missing:
            return "no infer instance is ready: see `shoal status`"
        have = f"ready on {', '.join(self.ready)}; " if self.ready else ""
        return f"{have}not on {', '.join(self.missing)}"


Index = Mapping[str, Mapping[int, oip.RepositoryIndexResponse.ModelIndex]]
"""Repository index of one instance, by model and version."""

Serving = Mapping[str, Mapping[str, Sequence[int]]]
"""Ready versions by instance and model, of the infer instances that take traffic."""


def serving_of(instances: Iterable[coord.Instance]) -> Serving:
    """Return what the infer instances in traffic serve."""
    return {
        instance.name: {model.name: model.versions for model in instance.models}
        for instance in instances
        if instance.service == "infer" and instance.state == coord.INSTANCE_STATE_READY
    }


def readiness_of(serving: Serving, name: str, version: int | None) -> VersionReadiness:
    """Return the readiness of a version (None: any) of model `name` on the instances."""
    ready: list[str] = []
    missing: list[str] = []
    for instance, models in serving.items():
        versions = models.get(name, ())
        has = bool(versions) if version is None else version in versions
        (ready if has else missing).append(instance)
    return VersionReadiness(tuple(ready), tuple(missing))


@dataclass(frozen=True)
class Poll:
    """Responses of one poll."""

    readiness: Mapping[int | None, VersionReadiness]
    any_everywhere: bool
    """True when some version of the model is ready everywhere."""
    index: Mapping[int, oip.RepositoryIndexResponse.ModelIndex] | None
    """Repository index of any one instance, by version: all instances load the same files. None: no response."""


@dataclass
class ReadinessWait:
    """State of a wait: the versions (None: any) still waited for, according to the polls so far."""

    name: str
    waiting: set[int | None]
    not_served: set[int | None] = field(default_factory=set)
    """Versions that the model's version policy does not serve."""
    _unavailable_since: dict[int | None, float] = field(default_factory=dict)
    _unlisted_since: dict[int | None, float] = field(default_factory=dict)

    def add(self, poll: Poll, now: float) -> None:
        """Update the state from a poll.

        Raises:
            FailedPrecondition: a version cannot be loaded; the message has the reason.
        """
        for version in list(self.waiting):
            if poll.readiness[version].everywhere:
                self.waiting.discard(version)
            elif poll.index is not None:
                self._add_index(version, poll, poll.index, now)

    def _add_index(
        self,
        version: int | None,
        poll: Poll,
        index: Mapping[int, oip.RepositoryIndexResponse.ModelIndex],
        now: float,
    ) -> None:
        entries = [entry for number, entry in index.items() if version is None or number == version]
        unavailable = [entry for entry in entries if entry.state == "UNAVAILABLE"]
        if any(entry.state == "LOADING" for entry in entries):
            self._unavailable_since.pop(version, None)
        elif unavailable and now - self._unavailable_since.setdefault(version, now) >= SETTLED_S:
            last = unavailable[-1]
            raise FailedPrecondition(f"{self.name} version {last.version} cannot be loaded: {last.reason}")
        if entries or not poll.any_everywhere:
            self._unlisted_since.pop(version, None)
        elif now - self._unlisted_since.setdefault(version, now) >= SETTLED_S:
            self.waiting.discard(version)
            self.not_served.add(version)


async def wait_ready(
    caller: Caller, name: str, versions: Collection[int | None], timeout_s: Timeout, polls: Polls | None = None
) -> set[int | None]:
    """Wait until every infer instance in traffic has the versions ready. Return the versions that are not served.

    Waits of several models at a time share one `polls`.

    Raises:
        FailedPrecondition: an instance cannot load a version; the message has the reason.
        DeadlineExceeded: an instance was not ready in time; the message names it.
    """
    deadline = caller.deadline(timeout_s)
    state, polls = ReadinessWait(name, set(versions)), polls or Polls(caller)
    progress = ""
    while state.waiting:
        left_s = deadline.left_s(caller.clock())
        # A last poll at the deadline has a moment, so that the error can say what is missing.
        poll_s = POLL_TIMEOUT_S if left_s is None else min(POLL_TIMEOUT_S, max(left_s, POLL_S))
        try:
            poll = await polls.poll(name, state.waiting, caller.deadline(poll_s))
            state.add(poll, caller.clock())
            progress = "; ".join(f"{_named(name, v)}: {poll.readiness[v]}" for v in state.waiting)
        except (Unavailable, DeadlineExceeded) as err:
            progress = err.message
        left_s = deadline.left_s(caller.clock())
        if state.waiting and left_s is not None and left_s <= 0:
            raise DeadlineExceeded(f"not ready everywhere after {deadline.timeout_s:g} s: {progress}")
        if state.waiting:
            await caller.pause(POLL_S if left_s is None else min(POLL_S, left_s))
    return state.not_served


def not_served(name: str, version: int | None) -> FailedPrecondition:
    """Return the error of a version that is registered and not served."""
    return FailedPrecondition(
        f"{_named(name, version)} is registered but not served: the model's version policy excludes it. "
        "Unless config.pbtxt says otherwise, the newest version and the one aliased `stable` are served"
    )


def _named(name: str, version: int | None) -> str:
    return name if version is None else f"{name} version {version}"


class Polls:
    """Reads the instances and the index of a node, once for all waits that poll at a time."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._serving = _Shared[Serving](caller.clock)
        self._index = _Shared[Index | None](caller.clock)

    async def poll(self, name: str, versions: Collection[int | None], timeout_s: Deadline) -> Poll:
        """Poll for versions of a model. Raises as a call."""
        try:
            serving = await self._serving.get(lambda: self._fetch_serving(timeout_s))
        # A server with a policy refuses the RPCs that it lacks.
        except (Unimplemented, PermissionDenied):
            return await _poll_server(self._caller, name, versions, timeout_s)
        readiness = {version: readiness_of(serving, name, version) for version in versions}
        served = {number for models in serving.values() for number in models.get(name, ())}
        any_everywhere = any(readiness_of(serving, name, number).everywhere for number in served)
        if all(each.everywhere for each in readiness.values()):
            return Poll(readiness, any_everywhere, None)
        index = await self._index.get(lambda: _fetch_index(self._caller, timeout_s))
        return Poll(readiness, any_everywhere, None if index is None else index.get(name, {}))

    async def _fetch_serving(self, timeout_s: Deadline) -> Serving:
        request = coord.ListInstancesRequest(service="infer")
        return serving_of((await self._caller.call(methods.LIST_INSTANCES, request, timeout_s=timeout_s)).instances)


class _Shared(Generic[T]):
    """Value that is fetched again when it is old; callers that need it at one time share the fetch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._fetching: asyncio.Task[T] | None = None
        self._fresh_until = 0.0

    async def get(self, fetch: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the value, fetched now or a moment ago."""
        fetching = self._fetching
        is_failed = fetching is not None and fetching.done() and (fetching.cancelled() or fetching.exception())
        if fetching is None or is_failed or (fetching.done() and self._clock() >= self._fresh_until):
            fetching = self._fetching = asyncio.create_task(self._timed(fetch))
        return await asyncio.shield(fetching)

    async def _timed(self, fetch: Callable[[], Coroutine[Any, Any, T]]) -> T:
        start = self._clock()
        value = await fetch()
        # A view of many models takes long to read: at most a quarter of the time goes into it. The view of a small node
        # is old at the next poll.
        now = self._clock()
        self._fresh_until = now + min(3 * (now - start), POLL_TIMEOUT_S)
        return value


async def _poll_server(caller: Caller, name: str, versions: Collection[int | None], timeout_s: Deadline) -> Poll:
    """Poll a standalone inference server (`shoal serve`), which is the only instance."""

    async def ready(version: int | None) -> bool:
        request = oip.ModelReadyRequest(name=name, version="" if version is None else str(version))
        return (await caller.call(methods.MODEL_READY, request, timeout_s=timeout_s)).ready

    server = (f"the server at {caller.url}",)
    readiness = {
        version: VersionReadiness(server, ()) if await ready(version) else VersionReadiness((), server)
        for version in versions
    }
    if all(each.everywhere for each in readiness.values()):
        return Poll(readiness, True, None)
    index = await _fetch_index(caller, timeout_s)
    return Poll(readiness, await ready(None), None if index is None else index.get(name, {}))


async def _fetch_index(caller: Caller, timeout_s: Deadline) -> Index | None:
    try:
        index = await caller.call(methods.REPOSITORY_INDEX, oip.RepositoryIndexRequest(), timeout_s=timeout_s)
    except ShoalError:
        # The index only explains why a version is not ready: the wait can continue without it.
        return None
    found: dict[str, dict[int, oip.RepositoryIndexResponse.ModelIndex]] = {}
    for entry in index.models:
        found.setdefault(entry.name, {})[int(entry.version) if entry.version.isdecimal() else 0] = entry
    return found
