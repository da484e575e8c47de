"""RPC methods for retention rules: translation between messages and `RetentionRepository`."""

from __future__ import annotations

from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from mesh.rpc.interceptors import Context
from services.ingest.limits import ms_of
from services.ingest.messages import STATES, state_of
from services.ingest.retention.retention_repository import RetentionRepository
from services.ingest.retention.rules import BATCHES, LONGEST, Keep, Rules, What, checked
from services.ingest.tenants.settings import EVERYONE
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as pb


class JobRetentionRpc:
    """Mixin of the servicer with the methods for retention rules."""

    def __init__(self, retention: RetentionRepository) -> None:
        self._retention = retention

    async def SetJobRetention(self, request: pb.SetJobRetentionRequest, context: Context) -> pb.SetJobRetentionResponse:
        rule = checked(request.tenant, _what(request), _keep(request))
        if request.inherit:
            await self._retention.inherit(rule.tenant, rule.what)
        else:
            await self._retention.set(rule)
        return pb.SetJobRetentionResponse(rule=_message(await self._retention.read(), rule.tenant, rule.what))

    async def ListJobRetention(
        self, request: pb.ListJobRetentionRequest, context: Context
    ) -> pb.ListJobRetentionResponse:
        rules = await self._retention.read()
        keys = {(EVERYONE, what) for what in rules.defaults} | {*rules.own}
        return pb.ListJobRetentionResponse(rules=[_message(rules, tenant, what) for tenant, what in sorted(keys)])


def _what(request: pb.SetJobRetentionRequest) -> What | None:
    state = state_of(request.state)
    if not request.batches:
        return state
    if state is not None:
        raise InvalidArgument("batches: not together with state: the rule of batches applies to all ended ones")
    return BATCHES


def _keep(request: pb.SetJobRetentionRequest) -> Keep:
    how = request.WhichOneof("how")
    if how is None or (how != "keep" and not getattr(request, how)):
        raise InvalidArgument("keep, for_ever, inherit: set one of them")
    if how != "keep":
        return None
    return timedelta(milliseconds=ms_of("keep", request.keep, LONGEST))


def _message(rules: Rules, tenant: str, what: What) -> pb.JobRetention:
    state = None if what == BATCHES else STATES[what]
    message = pb.JobRetention(
        tenant=tenant, state=state, batches=what == BATCHES, inherited=(tenant, what) not in rules.own
    )
    if (keep := rules.keep(tenant, what)) is not None:
        duration = Duration()
        duration.FromTimedelta(keep)
        message.keep.CopyFrom(duration)
    return message
