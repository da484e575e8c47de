"""Page tokens of QueryResults: the place of the last result of a page, and the filter that the page belongs to.

Results are ordered by (recorded_at, job id), newest first. The pair is unique, so a page starts exactly after the one
before, however many results share a millisecond, and whatever is recorded or removed meanwhile.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from shoal.errors import InvalidArgument
from shoal.store.v1.store_pb2 import QueryResultsRequest

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_CHARACTERS = 1_024
_LATEST_MS = 253402300799999  # The end of the year 9999.


@dataclass(frozen=True)
class Place:
    """After which result a page starts."""

    recorded_at: datetime
    job_id: str


def filter_digest(query: QueryResultsRequest) -> str:
    """A short digest of what `query` asks for, pages aside."""
    asked = QueryResultsRequest()
    asked.CopyFrom(query)
    for field in ("page_size", "page_token", "omit_response"):
        asked.ClearField(field)
    asked.job_ids[:] = sorted(set(asked.job_ids))
    asked.DiscardUnknownFields()
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()[:16]


def encode(place: Place, digest: str) -> str:
    """The token of a page that starts after `place`."""
    milliseconds = (place.recorded_at - _EPOCH) // timedelta(milliseconds=1)
    plain = json.dumps([1, milliseconds, place.job_id, digest], separators=(",", ":"))
    return base64.urlsafe_b64encode(plain.encode()).decode()


def decode(token: str, digest: str) -> Place:
    """Where the page of `token` starts.

    Raises:
        InvalidArgument: `token` is not one of ours, or one of another filter.
    """
    try:
        if len(token) > _MAX_CHARACTERS:
            raise ValueError("too long")
        plain = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        version, milliseconds, job_id, of = plain
        if version != 1 or type(milliseconds) is not int or not 0 <= milliseconds <= _LATEST_MS:
            raise ValueError("unknown form")
        if not isinstance(job_id, str) or not isinstance(of, str):
            raise ValueError("unknown form")
        job_id.encode()  # JSON can spell lone surrogates, MongoDB cannot.
    except (ValueError, TypeError, binascii.Error, RecursionError) as err:
        raise InvalidArgument("page_token: not a token of this service: leave it out for the first page") from err
    if of != digest:
        raise InvalidArgument("page_token: it belongs to another filter: a token goes on with the filter it came from")
    return Place(_EPOCH + timedelta(milliseconds=milliseconds), job_id)
