"""`client.jobs.retention`: retention of ended jobs and batches."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal

from shoal.client.jobs.job import JobState, of_state, to_duration, to_state
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import InvalidArgument
from shoal.ingest.v1 import ingest_pb2 as ingest

TIMEOUT_S = 10.0
EVERYONE = "*"
BATCHES: Final = "batches"


@dataclass(frozen=True)
class JobRetention:
    """Retention rule for a tenant's jobs that ended in one state, or for its batches."""

    tenant: str
    """`*`: every tenant without a rule of its own."""
    state: JobState | Literal["batches"]
    keep: timedelta | None
    """Time from the end to the removal; None keeps for ever."""
    inherited: bool = False
    """True when the tenant has no rule of its own: the value comes from `*` or from the node's setting."""


class AsyncJobRetention:
    """Client of the retention rules."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def list(self, *, timeout: float | None = TIMEOUT_S) -> builtins.list[JobRetention]:
        """Return the rules of every tenant (`*`), and of tenants with their own."""
        response = await self._caller.call(
            methods.LIST_JOB_RETENTION, ingest.ListJobRetentionRequest(), timeout_s=timeout
        )
        return [_rule(one) for one in response.rules]

    async def set(
        self,
        state: JobState | str,
        keep: float | timedelta | None,
        *,
        tenant: str = EVERYONE,
        timeout: float | None = TIMEOUT_S,
    ) -> JobRetention:
        """Set a rule: jobs that ended in `state` are kept for `keep` seconds, at least 60; None keeps for ever.

        `state` may be "batches": the rule then covers batches, whatever their end. Their output is never removed.

        Raises:
            InvalidArgument: `state` is not a final state, or `keep` is too short.
        """
        request = _request(state, tenant)
        if keep is None:
            request.for_ever = True
        else:
            request.keep.CopyFrom(to_duration("keep", keep))
        return _rule((await self._caller.call(methods.SET_JOB_RETENTION, request, timeout_s=timeout)).rule)

    async def inherit(
        self, state: JobState | str, *, tenant: str = EVERYONE, timeout: float | None = TIMEOUT_S
    ) -> JobRetention:
        """Remove a rule; the rule of `*`, or the node's setting, applies again."""
        request = _request(state, tenant)
        request.inherit = True
        return _rule((await self._caller.call(methods.SET_JOB_RETENTION, request, timeout_s=timeout)).rule)


def _request(state: JobState | str, tenant: str) -> ingest.SetJobRetentionRequest:
    if state == BATCHES:
        return ingest.SetJobRetentionRequest(tenant=tenant, batches=True)
    try:
        return ingest.SetJobRetentionRequest(tenant=tenant, state=to_state(state))
    except ValueError:
        known = ", ".join(one for one in JobState if one.ended)
        raise InvalidArgument(f"state {state!r}: use one of {known}, or {BATCHES}") from None


def _rule(message: ingest.JobRetention) -> JobRetention:
    keep = message.keep.ToTimedelta() if message.HasField("keep") else None
    state: JobState | Literal["batches"] = BATCHES if message.batches else of_state(message.state)
    return JobRetention(message.tenant, state, keep, message.inherited)
