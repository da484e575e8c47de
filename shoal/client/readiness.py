"""When a model that was pushed can be asked: once every infer instance that takes traffic has it ready.

One instance that has it is not enough: until all have it, a request may reach one that has not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shoal.client import methods
from shoal.client.calls import Caller
from shoal.client.failures import bounded
from shoal.coord.v1 import coord_pb2 as coord
from shoal.errors import DeadlineExceeded, FailedPrecondition, ShoalError, Unavailable, Unimplemented
from shoal.inference.v2 import inference_pb2 as oip

POLL_S = 0.1
# Loading takes tenths of a second or more; the answer comes from the memory of coord.

ASK_S = 5.0
# Each look is short: one that hangs must not eat the time of the next.


@dataclass(frozen=True)
class Standing:
    """Which of the infer instances that take traffic have the model."""

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
    """Where `name` stands among the instances; `version` None is any version."""
    ready: list[str] = []
    missing: list[str] = []
    for instance in instances:
        if instance.service != "infer" or instance.state != coord.INSTANCE_STATE_READY:
            continue
        versions = {v for model in instance.models if model.name == name for v in model.versions}
        has = bool(versions) if version is None else version in versions
        (ready if has else missing).append(instance.name)
    return Standing(tuple(ready), tuple(missing))


async def wait_ready(caller: Caller, name: str, version: int | None, timeout_s: float) -> None:
    """Waits until every infer instance that takes traffic has the model ready.

    Raises:
        FailedPrecondition: an instance cannot load it; the message says why.
        DeadlineExceeded: not everywhere in time; the message says where not.
    """
    timeout_s = bounded(timeout_s)
    deadline = caller.clock() + timeout_s
    what = name if version is None else f"{name} version {version}"
    while True:
        left = deadline - caller.clock()
        try:
            state = await _look(caller, name, version, min(ASK_S, max(left, POLL_S)))
            if state is None:
                return
        except (Unavailable, DeadlineExceeded) as err:
            state = err.message
        if caller.clock() >= deadline:
            raise DeadlineExceeded(f"{what} is not ready everywhere after {timeout_s:g} s: {state}")
        await caller.pause(min(POLL_S, max(deadline - caller.clock(), 0)))


async def _look(caller: Caller, name: str, version: int | None, timeout_s: float) -> str | None:
    """None when the model is ready everywhere, else how it stands. Raises FailedPrecondition when it cannot be."""
    try:
        answer = await caller.call(
            methods.LIST_INSTANCES, coord.ListInstancesRequest(service="infer"), timeout_s=timeout_s
        )
    except Unimplemented:
        return await _look_at_server(caller, name, version, timeout_s)
    state = standing(answer.instances, name, version)
    if state.everywhere:
        return None
    await _raise_if_refused(caller, name, version, timeout_s)
    return str(state)


async def _look_at_server(caller: Caller, name: str, version: int | None, timeout_s: float) -> str | None:
    """The same for an inference server that stands alone (`shoal serve`): there is nobody to ask but itself."""
    request = oip.ModelReadyRequest(name=name, version="" if version is None else str(version))
    if (await caller.call(methods.MODEL_READY, request, timeout_s=timeout_s)).ready:
        return None
    await _raise_if_refused(caller, name, version, timeout_s)
    return f"the server at {caller.address} does not have it ready"


async def _raise_if_refused(caller: Caller, name: str, version: int | None, timeout_s: float) -> None:
    # Whichever instance answers: all try to load the same files.
    try:
        index = await caller.call(methods.REPOSITORY_INDEX, oip.RepositoryIndexRequest(), timeout_s=timeout_s)
    except ShoalError:
        return  # How it stands is known; why not is not worth failing for.
    for entry in index.models:
        mine = entry.name == name and (version is None or entry.version == str(version))
        if mine and entry.state == "UNAVAILABLE" and entry.reason:
            raise FailedPrecondition(f"{name} version {entry.version} cannot be loaded: {entry.reason}")
