"""Page tokens of QueryResults and cursors of StreamResults: places among results, and the filter that they belong to.

    page token   [1, milliseconds, job id, digest]                          the last result of the page
    cursor       [2, milliseconds, job id, milliseconds, job id, digest]    the last one sent, and the last one of all

Results are ordered by (recorded_at, job id). The pair is unique, so a page starts exactly after the one before, however
many results share a millisecond, and whatever is recorded or removed meanwhile.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from shoal.errors import InvalidArgument
from shoal.store.v1.store_pb2 import ResultFilter

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_CHARACTERS = 1_024
_LATEST_MS = 253402300799999  # The end of the year 9999.


@dataclass(frozen=True, order=True)
class Position:
    """Where a result stands among the others."""

    recorded_at: datetime
    job_id: str


START = Position(_EPOCH, "")
"""Before every result."""


@dataclass(frozen=True)
class Cursor:
    """How far a stream has come, and how far it goes."""

    after: Position
    last: Position


def filter_digest(wanted: ResultFilter) -> str:
    """A short digest of what `wanted` asks for."""
    asked = ResultFilter()
    asked.CopyFrom(wanted)
    asked.job_ids[:] = sorted(set(asked.job_ids))
    asked.DiscardUnknownFields()
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()[:16]


def encode(place: Position, digest: str) -> str:
    """The token of a page that starts after `place`."""
    return _written([1, *_plain(place), digest])


def decode(token: str, digest: str) -> Position:
    """Where the page of `token` starts.

    Raises:
        InvalidArgument: `token` is not one of ours, or one of another filter.
    """
    (place,) = _places(token, digest, 1, "page_token", "the first page")
    return place


def encode_cursor(cursor: Cursor, digest: str) -> str:
    """The token of a stream that goes on where `cursor` says."""
    return _written([2, *_plain(cursor.after), *_plain(cursor.last), digest])


def decode_cursor(token: str, digest: str) -> Cursor:
    """Where the stream of `token` goes on.

    Raises:
        InvalidArgument: `token` is not one of ours, or one of another filter.
    """
    after, last = _places(token, digest, 2, "cursor", "all of them")
    return Cursor(after, last)


def _plain(place: Position) -> list[Any]:
    return [(place.recorded_at - _EPOCH) // timedelta(milliseconds=1), place.job_id]


def _written(parts: list[Any]) -> str:
    # With letters as they are: spelled out, those of two long job ids would be more than a token may have.
    return base64.urlsafe_b64encode(json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()).decode()


def _places(token: str, digest: str, number: int, field: str, without: str) -> list[Position]:
    """The places in a token that holds `number` of them, which is its version, too."""
    try:
        if len(token) > _MAX_CHARACTERS:
            raise ValueError("too long")
        version, *plain, of = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        if version != number or len(plain) != 2 * number or not isinstance(of, str):
            raise ValueError("unknown form")
        places = [_place(milliseconds, job_id) for milliseconds, job_id in zip(plain[::2], plain[1::2], strict=True)]
    except (ValueError, TypeError, binascii.Error, RecursionError) as err:
        raise InvalidArgument(f"{field}: not a token of this service: leave it out for {without}") from err
    if of != digest:
        raise InvalidArgument(f"{field}: it belongs to another filter: a token goes on with the filter it came from")
    return places


def _place(milliseconds: Any, job_id: Any) -> Position:
    if type(milliseconds) is not int or not 0 <= milliseconds <= _LATEST_MS or not isinstance(job_id, str):
        raise ValueError("unknown form")
    job_id.encode()  # JSON can spell lone surrogates, MongoDB cannot.
    return Position(_EPOCH + timedelta(milliseconds=milliseconds), job_id)
