"""Selection of dead letters by a filter or by ids, and its validation. Errors name the field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from services.ingest.job import DEAD_LETTERS, State
from services.ingest.job_store import DeadFilter
from services.ingest.ulid import is_ulid
from shoal.errors import Code, InvalidArgument

MOST = 1_000
"""Maximum dead letters of one call: each is one document read and one written, so a call takes at most a second."""


@dataclass(frozen=True, slots=True)
class DeadLetterSelection:
    """Selection of up to `limit` dead letters that match `filter`, or of the dead letters in `ids`."""

    ids: tuple[str, ...] = ()
    filter: DeadFilter | None = None
    limit: int = MOST
    page_token: str = ""
    """Token of the page before; empty: the first page."""


def checked_filter(state: State | None, model_name: str, tenant: str, code: int, before: datetime | None) -> DeadFilter:
    """Return a valid filter.

    Raises:
        InvalidArgument: a field is invalid; the message names it.
    """
    state = state or State.DEAD
    if state not in DEAD_LETTERS:
        raise InvalidArgument(f"filter.state: dead letters are dead or failed, not {state}")
    if code and code not in set(Code):
        raise InvalidArgument(f"filter.code: expected a gRPC status code, 1 to 16, got {code}")
    return DeadFilter(state, model_name, tenant, code, before)


def checked_selection(
    ids: Sequence[str], filter_: DeadFilter | None, limit: int, page_token: str
) -> DeadLetterSelection:
    """Return the selection by `ids` or by `filter_`.

    Raises:
        InvalidArgument: neither or both are set, there are too many ids, one is invalid, or ids have a page token.
    """
    if bool(ids) == (filter_ is not None):
        raise InvalidArgument("ids, filter: give one of them; an empty filter means every dead letter")
    if not 0 <= limit <= MOST:
        raise InvalidArgument(f"limit: 1 to {MOST}, or 0 for {MOST}; got {limit}")
    if len(ids) > MOST:
        raise InvalidArgument(f"ids: at most {MOST}, got {len(ids)}")
    if ids and page_token:
        raise InvalidArgument("page_token: only a filter has pages")
    for at, job_id in enumerate(ids):
        if not is_ulid(job_id):
            raise InvalidArgument(f"ids[{at}]: not a job's id: {job_id[:64]!r}")
    return DeadLetterSelection(tuple(dict.fromkeys(ids)), filter_, limit or MOST, page_token)
