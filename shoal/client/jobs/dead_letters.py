"""`client.jobs.dead`: dead letters, that is jobs that ended without an answer."""

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
"""Timeout of one page: a thousand jobs are read and written in one call."""
_PAGE = 1_000


@dataclass(frozen=True)
class Handled:
    """Outcome of a requeue or purge of dead letters."""

    ids: tuple[str, ...] = ()
    """Jobs that were requeued or removed."""
    refused: dict[str, ShoalError] = field(default_factory=dict)
    """Error of each requested job that was not."""


class AsyncDeadLetters:
    """Dead letters: jobs that are dead (out of attempts) or failed (the request is at fault). Their inputs are kept."""

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
        timeout: float | None = TIMEOUT_S,
    ) -> builtins.list[Job]:
        """Return the newest `limit` dead letters.

        The arguments are filters: `model`, `tenant`, status `code` of the last attempt, end `before` a time.

        Raises:
            InvalidArgument: a state other than dead and failed, or an unknown code.
        """
        criteria = self._filter(state, model, tenant, code, before)
        found: builtins.list[Job] = []
        token, deadline = "", self._caller.deadline(timeout)
        while len(found) < limit:
            request = ingest.ListDeadLettersRequest(
                filter=criteria, page_size=min(limit - len(found), _PAGE), page_token=token
            )
            response = await self._caller.call(methods.LIST_DEAD_LETTERS, request, timeout_s=deadline)
            found += [of_job(job) for job in response.jobs]
            token = response.next_page_token
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
        timeout: float | None = TIMEOUT_S,
    ) -> Handled:
        """Requeue dead letters: the jobs of `ids`, or with `all` every one that matches the filters.

        A requeued job gets all its attempts and its whole deadline again; its result replaces the failure. `all` means
        every dead letter from before the call: a job that dies again meanwhile is not requeued twice.
        `timeout` applies to each thousand jobs.

        Raises:
            InvalidArgument: neither `ids` nor `all` is set, or both are.
        """
        handled = Handled()
        for chunk_ids, criteria in self._chunks(ids, all, self._filter(state, model, tenant, code, before)):
            token = ""
            while True:
                request = ingest.RequeueDeadLettersRequest(
                    ids=chunk_ids, filter=criteria, reason=reason, page_token=token
                )
                response = await self._caller.call(methods.REQUEUE_DEAD_LETTERS, request, timeout_s=timeout)
                handled, token = _joined(handled, response), response.next_page_token
                if not token:
                    break
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
        timeout: float | None = TIMEOUT_S,
    ) -> Handled:
        """Remove dead letters and their inputs: the jobs of `ids`, or with `all` every one that matches the filters.

        Their results in the store stay. `timeout` applies to each thousand jobs.

        Raises:
            InvalidArgument: neither `ids` nor `all` is set, or both are.
        """
        handled = Handled()
        for chunk_ids, criteria in self._chunks(ids, all, self._filter(state, model, tenant, code, before)):
            token = ""
            while True:
                request = ingest.PurgeDeadLettersRequest(ids=chunk_ids, filter=criteria, page_token=token)
                response = await self._caller.call(methods.PURGE_DEAD_LETTERS, request, timeout_s=timeout)
                handled, token = _joined(handled, response), response.next_page_token
                if not token:
                    break
        return handled

    def _chunks(
        self, ids: str | Iterable[str], all: bool, criteria: ingest.DeadLetterFilter
    ) -> Iterable[tuple[builtins.list[str], ingest.DeadLetterFilter | None]]:
        named = [ids] if isinstance(ids, str) else [*ids]
        if bool(named) == all:
            raise InvalidArgument("set either the ids of the jobs or all, not both")
        if all:
            return [([], criteria)]
        return [(named[first : first + _PAGE], None) for first in range(0, len(named), _PAGE)]

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


def _joined(handled: Handled, response: ingest.RequeueDeadLettersResponse | ingest.PurgeDeadLettersResponse) -> Handled:
    refused = {one.id: from_status(one.code, one.message) for one in response.refused}
    return Handled((*handled.ids, *response.ids), {**handled.refused, **refused})
