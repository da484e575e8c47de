"""When a model that was pushed can be asked: once every infer instance that takes traffic has it ready.

One instance that has it is not enough: until all have it, a request may reach one that has not. A version that the
model's version policy leaves out is never ready anywhere: then the wait ends too, and says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.failures import bounded
from shoal.coord.v1 import coord_pb2 as coord
from shoal.errors import DeadlineExceeded, FailedPrecondition, ShoalError, Unavailable, Unimplemented
from shoal.inference.v2 import inference_pb2 as oip

POLL_S = 0.1
# Loading takes tenths of a second or more; the answers come from memory.

ASK_S = 5.0
# Each look is short: one that hangs must not eat the time of the next.

SETTLED_S = 2.0
# An instance hears of a new version within tenths of a second, and tries again to get files that it could not have:
# what it leaves out, or calls unavailable, for so long, is meant so.


@dataclass(frozen=True)
class Standing:
    """Which of the infer instances that take traffic have a version."""

    ready: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def everywhere(self) -> bool:
        """All have it, and there are some."""
        return bool(self.ready) and not self.missing

    def __str__(self) -> str:
        if not self.ready and not self.missing:
            return "no infer instance is ready: look at `shoal status`"
        have = f"ready on {', '.join(self.ready)}; " if self.ready else ""
        return f"{have}not on {', '.join(self.missing)}"


def standing(instances: Iterable[coord.Instance], name: str, version: int | None) -> Standing:
    """Where a version (None: any) of `name` stands among the instances."""
    ready: list[str] = []
    missing: list[str] = []
    for instance in instances:
        if instance.service != "infer" or instance.state != coord.INSTANCE_STATE_READY:
            continue
        versions = {v for model in instance.models if model.name == name for v in model.versions}
        has = bool(versions) if version is None else version in versions
        (ready if has else missing).append(instance.name)
    return Standing(tuple(ready), tuple(missing))


@dataclass(frozen=True)
class Seen:
    """One look: where each version stands, whether any version is ready everywhere, and an instance's own index."""

    standing: Mapping[int | None, Standing]
    any_everywhere: bool
    index: Mapping[int, oip.RepositoryIndexResponse.ModelIndex] | None
    """Of one instance, whichever answered: all try to load the same files. None: it could not be asked."""


@dataclass
class Verdict:
    """What the looks so far amount to, for each version that is waited for (None: any)."""

    name: str
    waiting: set[int | None]
    left_out: set[int | None] = field(default_factory=set)
    """The version policy does not serve these."""
    _refused: dict[int | None, float] = field(default_factory=dict)
    _unlisted: dict[int | None, float] = field(default_factory=dict)

    def add(self, seen: Seen, now: float) -> None:
        """Takes a look into account.

        Raises:
            FailedPrecondition: a version cannot be loaded; the message says why.
        """
        for version in list(self.waiting):
            if seen.standing[version].everywhere:
                self.waiting.discard(version)
            elif seen.index is not None:
                self._judge(version, seen, seen.index, now)

    def _judge(
        self,
        version: int | None,
        seen: Seen,
        index: Mapping[int, oip.RepositoryIndexResponse.ModelIndex],
        now: float,
    ) -> None:
        entries = [entry for number, entry in index.items() if version is None or number == version]
        refused = [entry for entry in entries if entry.state == "UNAVAILABLE"]
        if any(entry.state == "LOADING" for entry in entries):
            self._refused.pop(version, None)
        elif refused and now - self._refused.setdefault(version, now) >= SETTLED_S:
            worst = refused[-1]
            raise FailedPrecondition(f"{self.name} version {worst.version} cannot be loaded: {worst.reason}")
        if entries or not seen.any_everywhere:
            self._unlisted.pop(version, None)
        elif now - self._unlisted.setdefault(version, now) >= SETTLED_S:
            self.waiting.discard(version)
            self.left_out.add(version)


async def wait_ready(caller: Caller, name: str, versions: Collection[int | None], timeout_s: float) -> set[int | None]:
    """Waits until every infer instance that takes traffic has the versions ready. Returns those that are not served.

    Raises:
        FailedPrecondition: an instance cannot load one; the message says why.
        DeadlineExceeded: not everywhere in time; the message says where not.
    """
    deadline = caller.clock() + bounded(timeout_s)
    verdict = Verdict(name, set(versions))
    how = ""
    while verdict.waiting:
        left = deadline - caller.clock()
        try:
            seen = await _look(caller, name, verdict.waiting, min(ASK_S, max(left, POLL_S)))
            verdict.add(seen, caller.clock())
            how = "; ".join(f"{_named(name, v)}: {seen.standing[v]}" for v in verdict.waiting)
        except (Unavailable, DeadlineExceeded) as err:
            how = err.message
        if verdict.waiting and caller.clock() >= deadline:
            raise DeadlineExceeded(f"not ready everywhere after {timeout_s:g} s: {how}")
        if verdict.waiting:
            await caller.pause(min(POLL_S, max(deadline - caller.clock(), 0)))
    return verdict.left_out


def left_out(name: str, version: int | None) -> FailedPrecondition:
    """The error of a version that is registered and not served."""
    return FailedPrecondition(
        f"{_named(name, version)} is registered and not served: the model's version policy leaves it out. "
        "Unless config.pbtxt says otherwise, the newest version and the one aliased `stable` are served"
    )


def _named(name: str, version: int | None) -> str:
    return name if version is None else f"{name} version {version}"


async def _look(caller: Caller, name: str, versions: Collection[int | None], timeout_s: float) -> Seen:
    try:
        listed = await caller.call(
            methods.LIST_INSTANCES, coord.ListInstancesRequest(service="infer"), timeout_s=timeout_s
        )
    except Unimplemented:
        return await _look_at_server(caller, name, versions, timeout_s)
    standings = {version: standing(listed.instances, name, version) for version in versions}
    served = {number for each in listed.instances for model in each.models for number in model.versions}
    somewhere = any(standing(listed.instances, name, number).everywhere for number in served)
    waiting = not all(each.everywhere for each in standings.values())
    return Seen(standings, somewhere, await _index(caller, name, timeout_s) if waiting else None)


async def _look_at_server(caller: Caller, name: str, versions: Collection[int | None], timeout_s: float) -> Seen:
    """The same for an inference server that stands alone (`shoal serve`): there is nobody to ask but itself."""

    async def ready(version: int | None) -> bool:
        request = oip.ModelReadyRequest(name=name, version="" if version is None else str(version))
        return (await caller.call(methods.MODEL_READY, request, timeout_s=timeout_s)).ready

    here = (f"the server at {caller.address}",)
    standings = {version: Standing(here, ()) if await ready(version) else Standing((), here) for version in versions}
    if all(each.everywhere for each in standings.values()):
        return Seen(standings, True, None)
    return Seen(standings, await ready(None), await _index(caller, name, timeout_s))


async def _index(
    caller: Caller, name: str, timeout_s: float
) -> Mapping[int, oip.RepositoryIndexResponse.ModelIndex] | None:
    try:
        index = await caller.call(methods.REPOSITORY_INDEX, oip.RepositoryIndexRequest(), timeout_s=timeout_s)
    except ShoalError:
        return None  # Where it stands is known; why not is not worth failing for.
    return {
        int(entry.version) if entry.version.isdecimal() else 0: entry for entry in index.models if entry.name == name
    }
