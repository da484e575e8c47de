"""Which dead letters a client means: a filter, or ids. Whatever is wrong is named by its field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from services.ingest.job import DEAD_LETTERS, State
from services.ingest.job_store import DeadFilter
from services.ingest.ulid import is_ulid
from shoal.errors import Code, InvalidArgument

MOST = 1_000
"""Dead letters of one call: each is a document read and one written, so a call takes a second at most."""


@dataclass(frozen=True, slots=True)
class DeadLetterFilter:
    """Up to `limit` of those that match `filter`, or those of `ids`."""

    ids: tuple[str, ...] = ()
    filter: DeadFilter | None = None
    limit: int = MOST


def checked_filter(state: State | None, model_name: str, tenant: str, code: int, before: datetime | None) -> DeadFilter:
    """A filter, or InvalidArgument."""
    state = state or State.DEAD
    if state not in DEAD_LETTERS:
        raise InvalidArgument(f"filter.state: dead letters are dead or failed, not {state}")
    if code and code not in set(Code):
        raise InvalidArgument(f"filter.code: expected a gRPC status code, 1 to 16, got {code}")
    return DeadFilter(state, model_name, tenant, code, before)


def selected(ids: Sequence[str], among: DeadFilter | None, limit: int) -> DeadLetterFilter:
    """Ids or a filter, whichever is given.

    Raises:
        InvalidArgument: neither or both, too many, or something that is no id.
    """
    if bool(ids) == (among is not None):
        raise InvalidArgument("ids, filter: give one of them; an empty filter means every dead letter")
    if not 0 <= limit <= MOST:
        raise InvalidArgument(f"limit: 1 to {MOST}, or 0 for {MOST}; got {limit}")
    if len(ids) > MOST:
        raise InvalidArgument(f"ids: at most {MOST}, got {len(ids)}")
    for at, job_id in enumerate(ids):
        if not is_ulid(job_id):
            raise InvalidArgument(f"ids[{at}]: not a job's id: {job_id[:64]!r}")
    return DeadLetterFilter(tuple(dict.fromkeys(ids)), among, limit or MOST)
