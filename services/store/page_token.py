"""Page tokens of QueryResults and cursors of StreamResults: positions in the result order, and a digest of the filter.

    page token   [1, milliseconds, job id, digest]                          last result of the page
    cursor       [2, milliseconds, job id, milliseconds, job id, digest]    last result sent, last result of the stream

Results are ordered by (recorded_at, job id). The pair is unique. So a page starts exactly after the page before, even
when results share a millisecond, and even when results are recorded or removed between the two requests.
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
# The end of the year 9999.
_LATEST_MS = 253402300799999


@dataclass(frozen=True, order=True)
class Position:
    """Position of a result in the result order."""

    recorded_at: datetime
    job_id: str


START = Position(_EPOCH, "")
"""Position before every result."""


@dataclass(frozen=True)
class Cursor:
    """Progress of a stream: the position of the last result sent, and the position of the stream's last result."""

    after: Position
    last: Position


def filter_digest(result_filter: ResultFilter) -> str:
    """Return a short digest of the filter, the same for equal filters."""
    normalized = ResultFilter()
    normalized.CopyFrom(result_filter)
    normalized.job_ids[:] = sorted(set(normalized.job_ids))
    normalized.DiscardUnknownFields()
    return hashlib.sha256(normalized.SerializeToString(deterministic=True)).hexdigest()[:16]


def encode(position: Position, digest: str) -> str:
    """Return the token of the page that starts after `position`."""
    return _encoded([1, *_plain(position), digest])


def decode(token: str, digest: str) -> Position:
    """Return the position after which the page of `token` starts.

    Raises:
        InvalidArgument: `token` is malformed, or belongs to another filter.
    """
    (position,) = _positions(token, digest, 1, "page_token", "the first page")
    return position


def encode_cursor(cursor: Cursor, digest: str) -> str:
    """Return the token of a stream that resumes at `cursor`."""
    return _encoded([2, *_plain(cursor.after), *_plain(cursor.last), digest])


def decode_cursor(token: str, digest: str) -> Cursor:
    """Return the cursor at which the stream of `token` resumes.

    Raises:
        InvalidArgument: `token` is malformed, or belongs to another filter.
    """
    after, last = _positions(token, digest, 2, "cursor", "all of them")
    return Cursor(after, last)


def _plain(position: Position) -> list[Any]:
    return [(position.recorded_at - _EPOCH) // timedelta(milliseconds=1), position.job_id]


def _encoded(parts: list[Any]) -> str:
    # Without ensure_ascii: escaped, two long job ids would exceed the length of a token.
    return base64.urlsafe_b64encode(json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()).decode()


def _positions(token: str, digest: str, number: int, field: str, without: str) -> list[Position]:
    """Return the `number` positions of a token. `number` is also the version of the token's format."""
    try:
        if len(token) > _MAX_CHARACTERS:
            raise ValueError("too long")
        version, *plain, of = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        if version != number or len(plain) != 2 * number or not isinstance(of, str):
            raise ValueError("unknown form")
        positions = [_position(ms, job_id) for ms, job_id in zip(plain[::2], plain[1::2], strict=True)]
    except (ValueError, TypeError, binascii.Error, RecursionError) as err:
        raise InvalidArgument(f"{field}: not a token of this service: leave it out for {without}") from err
    if of != digest:
        raise InvalidArgument(f"{field}: it belongs to another filter: send the filter that it was returned for")
    return positions


def _position(milliseconds: Any, job_id: Any) -> Position:
    if type(milliseconds) is not int or not 0 <= milliseconds <= _LATEST_MS or not isinstance(job_id, str):
        raise ValueError("unknown form")
    # JSON can contain lone surrogates, MongoDB cannot.
    job_id.encode()
    return Position(_EPOCH + timedelta(milliseconds=milliseconds), job_id)
