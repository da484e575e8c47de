"""Trial load of a model version on one infer instance, before the version is registered."""

from __future__ import annotations

from contextlib import aclosing, suppress

from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.deadline import Deadline
from shoal.coord.v1 import coord_pb2 as coord
from shoal.errors import FailedPrecondition, ResourceExhausted, ShoalError, Unavailable
from shoal.inference.v2 import trial_pb2 as pb
from shoal.store.v1 import store_pb2 as store

_MOST_ENDED = 2
_LIST_S = 5.0
# A process starts within seconds, and loads its models before it is ready. After this time, another one is tried.
_REPLACED_S = 30.0
_POLL_S = 0.2


async def run(caller: Caller, model: store.ModelVersion, deadline: Deadline) -> None:
    """Have one infer instance load and warm the version. Its files are stored.

    When the instance ends during the trial, the version is tried once more, after a new process has taken its place:
    a model that ends every process takes down one instance at a time.

    Raises:
        FailedPrecondition: the version cannot be loaded, or two instances ended during its trial.
        Unavailable: no infer instance is ready.
        DeadlineExceeded: the trial took too long.
    """
    title = f"{model.name} version {model.version}" if model.version else model.name
    ended: list[str] = []
    attempt = 0
    while True:
        begun: pb.TryModelResponse | None = None
        try:
            request = pb.TryModelRequest(model=model.SerializeToString())
            trial = caller.stream(methods.TRY_MODEL, request, timeout_s=deadline, doing=f"trial load of {title}")
            async with aclosing(trial) as responses:
                async for response in responses:
                    begun = response
                    if response.passed:
                        return
            error: ShoalError = Unavailable(f"trial load of {title}: it ended early")
        except FailedPrecondition as err:
            raise FailedPrecondition(f"{title} cannot be loaded: {err.message}") from err
        except (Unavailable, ResourceExhausted) as err:
            error = err
        if begun is not None:
            ended.append(begun.instance)
            attempt = 0
            if len(ended) == _MOST_ENDED:
                raise FailedPrecondition(
                    f"{title} is not registered, because the infer instances that loaded it on trial ended meanwhile: "
                    f"{', then '.join(ended)}. It probably ends any process that loads it: see their logs"
                ) from error
            await _until_replaced(caller, begun)
        attempt += 1
        wait = caller.stream_wait_s(error, attempt=attempt, begun=bool(ended), deadline=deadline)
        if wait is None:
            raise await _unavailable(caller, title, ended, error) from error
        await caller.pause(wait)


async def _until_replaced(caller: Caller, ended: pb.TryModelResponse) -> None:
    """Wait, for a while, until an instance that has ended is ready again."""
    until = caller.clock() + _REPLACED_S
    while caller.clock() < until:
        with suppress(ShoalError):
            if any(each.name == ended.instance and each.pid != ended.pid for each in await _ready_instances(caller)):
                return
        await caller.pause(_POLL_S)


async def _ready_instances(caller: Caller) -> list[coord.Instance]:
    """Return the infer instances that take traffic."""
    request = coord.ListInstancesRequest(service="infer")
    listed = await caller.call(methods.LIST_INSTANCES, request, timeout_s=_LIST_S)
    return [each for each in listed.instances if each.state == coord.INSTANCE_STATE_READY]


async def _unavailable(caller: Caller, title: str, ended: list[str], error: ShoalError) -> ShoalError:
    """Return the error of a trial that no instance takes."""
    if ended:
        return FailedPrecondition(f"{ended[0]} ended during the trial load of {title}, and no other took it: {error}")
    if await _ready_instances(caller):
        return error
    return Unavailable(
        f"no infer instance is ready to try {title}: start one, or register it untried (push with --no-check)"
    )
