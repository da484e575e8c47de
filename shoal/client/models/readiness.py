"""Wait until a pushed model is ready on every infer instance that takes traffic.

One ready instance is not enough: a request may reach another one. A version that the model's version policy does not
serve is never ready anywhere; the wait then ends, and returns the version as not served.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.deadline import Deadline, Timeout
from shoal.coord.v1 import coord_pb2 as coord
from shoal.errors import DeadlineExceeded, FailedPrecondition, ShoalError, Unavailable, Unimplemented
from shoal.inference.v2 import inference_pb2 as oip

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


def readiness_of(instances: Iterable[coord.Instance], name: str, version: int | None) -> VersionReadiness:
    """Return the readiness of a version (None: any) of model `name` on the instances."""
    ready: list[str] = []
    missing: list[str] = []
    for instance in instances:
        if instance.service != "infer" or instance.state != coord.INSTANCE_STATE_READY:
            continue
        versions = {v for model in instance.models if model.name == name for v in model.versions}
        has = bool(versions) if version is None else version in versions
        (ready if has else missing).append(instance.name)
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
    caller: Caller, name: str, versions: Collection[int | None], timeout_s: Timeout
) -> set[int | None]:
    """Wait until every infer instance in traffic has the versions ready. Return the versions that are not served.

    Raises:
        FailedPrecondition: an instance cannot load a version; the message has the reason.
        DeadlineExceeded: an instance was not ready in time; the message names it.
    """
    deadline = caller.deadline(timeout_s)
    state = ReadinessWait(name, set(versions))
    progress = ""
    while state.waiting:
        left_s = deadline.left_s(caller.clock())
        # A last poll at the deadline has a moment, so that the error can say what is missing.
        poll_s = POLL_TIMEOUT_S if left_s is None else min(POLL_TIMEOUT_S, max(left_s, POLL_S))
        try:
            poll = await _poll(caller, name, state.waiting, caller.deadline(poll_s))
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


async def _poll(caller: Caller, name: str, versions: Collection[int | None], timeout_s: Deadline) -> Poll:
    try:
        listed = await caller.call(
            methods.LIST_INSTANCES, coord.ListInstancesRequest(service="infer"), timeout_s=timeout_s
        )
    except Unimplemented:
        return await _poll_server(caller, name, versions, timeout_s)
    readiness = {version: readiness_of(listed.instances, name, version) for version in versions}
    served = {number for each in listed.instances for model in each.models for number in model.versions}
    any_everywhere = any(readiness_of(listed.instances, name, number).everywhere for number in served)
    waiting = not all(each.everywhere for each in readiness.values())
    return Poll(readiness, any_everywhere, await _index(caller, name, timeout_s) if waiting else None)


async def _poll_server(caller: Caller, name: str, versions: Collection[int | None], timeout_s: Deadline) -> Poll:
    """Poll a standalone inference server (`shoal serve`), which is the only instance."""

    async def ready(version: int | None) -> bool:
        request = oip.ModelReadyRequest(name=name, version="" if version is None else str(version))
        return (await caller.call(methods.MODEL_READY, request, timeout_s=timeout_s)).ready

    server = (f"the server at {caller.address}",)
    readiness = {
        version: VersionReadiness(server, ()) if await ready(version) else VersionReadiness((), server)
        for version in versions
    }
    if all(each.everywhere for each in readiness.values()):
        return Poll(readiness, True, None)
    return Poll(readiness, await ready(None), await _index(caller, name, timeout_s))


async def _index(
    caller: Caller, name: str, timeout_s: Deadline
) -> Mapping[int, oip.RepositoryIndexResponse.ModelIndex] | None:
    try:
        index = await caller.call(methods.REPOSITORY_INDEX, oip.RepositoryIndexRequest(), timeout_s=timeout_s)
    except ShoalError:
        # The index only explains why a version is not ready: the wait can continue without it.
        return None
    return {
        int(entry.version) if entry.version.isdecimal() else 0: entry for entry in index.models if entry.name == name
    }
