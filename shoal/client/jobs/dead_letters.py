"""`client.jobs.dead`: jobs that ended without an answer."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from shoal.client.jobs.job import Job, JobState, of_job, to_code, to_state
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import Code, InvalidArgument, ShoalError, from_status
from shoal.ingest.v1 import ingest_pb2 as ingest

TIMEOUT_S = 30.0
"""A thousand jobs are read and written in one call."""
_AT_ONCE = 1_000


@dataclass(frozen=True)
class Handled:
    """What became of dead letters."""

    ids: tuple[str, ...] = ()
    """Those that were requeued, or removed."""
    refused: dict[str, ShoalError] = field(default_factory=dict)
    """Those of the ids asked for that were not, and why."""


class AsyncDeadLetters:
    """Jobs that are dead (out of attempts) or failed (the request is at fault); the node keeps their inputs."""

    def __init__(self, caller: Caller, tenant: str) -> None:
        self._caller = caller
        self._tenant = tenant

    async def list(
        self,
        *,
        state: JobState | str = JobState.DEAD,
        model: str = "",
        tenant: str = "",
        code: Code | str | None = None,
        before: datetime | None = None,
        limit: int = 100,
        timeout: float = TIMEOUT_S,
    ) -> builtins.list[Job]:
        """The newest `limit` dead letters. Each argument narrows: of `model`, of `tenant`, whose last attempt ended
        with `code`, that ended `before` a time.

        Raises:
            InvalidArgument: a state other than dead and failed, or no such code.
        """
        among = self._filter(state, model, tenant, code, before)
        found: builtins.list[Job] = []
        token = ""
        while len(found) < limit:
            request = ingest.ListDeadLettersRequest(
                filter=among, page_size=min(limit - len(found), _AT_ONCE), page_token=token
            )
            answer = await self._caller.call(methods.LIST_DEAD_LETTERS, request, timeout_s=timeout)
            found += [of_job(job) for job in answer.jobs]
            token = answer.next_page_token
            if not token:
                break
        return found[:limit]

    async def requeue(
        self,
        ids: str | Iterable[str] = (),
        *,
        all: bool = False,
        state: JobState | str = JobState.DEAD,
        model: str = "",
        tenant: str = "",
        code: Code | str | None = None,
        before: datetime | None = None,
        reason: str = "",
        timeout: float = TIMEOUT_S,
    ) -> Handled:
        """Puts dead letters back into the queue: `ids`, or with `all` those that the other arguments describe.

        Each runs again with all its attempts and its deadline anew, and its result takes the place of the failure.
        `timeout` is for each thousand.

        Raises:
            InvalidArgument: neither ids nor `all`, or both.
        """
        handled = Handled()
        for part, among in self._parts(ids, all, self._filter(state, model, tenant, code, before)):
            more = True
            while more:
                request = ingest.RequeueDeadLettersRequest(ids=part, filter=among, reason=reason)
                answer = await self._caller.call(methods.REQUEUE_DEAD_LETTERS, request, timeout_s=timeout)
                # One that came back dead meanwhile is not requeued a second time.
                more = answer.more and not {*answer.ids} & {*handled.ids}
                handled = _joined(handled, answer)
        return handled

    async def purge(
        self,
        ids: str | Iterable[str] = (),
        *,
        all: bool = False,
        state: JobState | str = JobState.DEAD,
        model: str = "",
        tenant: str = "",
        code: Code | str | None = None,
        before: datetime | None = None,
        timeout: float = TIMEOUT_S,
    ) -> Handled:
        """Removes dead letters and their inputs for good: `ids`, or with `all` those that the other arguments say.
        What the store says of them stays. `timeout` is for each thousand.

        Raises:
            InvalidArgument: neither ids nor `all`, or both.
        """
        handled = Handled()
        for part, among in self._parts(ids, all, self._filter(state, model, tenant, code, before)):
            more = True
            while more:
                request = ingest.PurgeDeadLettersRequest(ids=part, filter=among)
                answer = await self._caller.call(methods.PURGE_DEAD_LETTERS, request, timeout_s=timeout)
                handled, more = _joined(handled, answer), answer.more
        return handled

    def _parts(
        self, ids: str | Iterable[str], all: bool, among: ingest.DeadLetterFilter
    ) -> Iterable[tuple[builtins.list[str], ingest.DeadLetterFilter | None]]:
        named = [ids] if isinstance(ids, str) else [*ids]
        if bool(named) == all:
            raise InvalidArgument("name the jobs, or say all: one of the two")
        if all:
            return [([], among)]
        return [(named[first : first + _AT_ONCE], None) for first in range(0, len(named), _AT_ONCE)]

    def _filter(
        self, state: JobState | str, model: str, tenant: str, code: Code | str | None, before: datetime | None
    ) -> ingest.DeadLetterFilter:
        if state not in (JobState.DEAD, JobState.FAILED):
            raise InvalidArgument(f"state {str(state)!r}: dead letters are dead or failed")
        message = ingest.DeadLetterFilter(
            state=to_state(state),
            model_name=model,
            tenant=tenant or self._tenant,
            code=0 if code is None else to_code(code),
        )
        if before is not None:
            message.before.FromDatetime(before.astimezone(UTC))
        return message


def _joined(handled: Handled, answer: ingest.RequeueDeadLettersResponse | ingest.PurgeDeadLettersResponse) -> Handled:
    refused = {one.id: from_status(one.code, one.message) for one in answer.refused}
    return Handled((*handled.ids, *answer.ids), {**handled.refused, **refused})
