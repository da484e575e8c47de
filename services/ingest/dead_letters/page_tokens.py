"""Page tokens of bulk operations on dead letters: the last id, and the time of the first page."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from services.ingest.job_store import DeadFilter
from services.ingest.ulid import is_ulid
from shoal.errors import InvalidArgument

_MOST_CHARS = 8_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class PagePosition:
    """Position of a page: it begins after the id `after`, and has dead letters that ended before `began`."""

    after: str
    began: datetime


def encode(position: PagePosition, filter_: DeadFilter) -> str:
    """Return the token of a position in the pages of `filter_`."""
    plain = [position.after, (position.began - _EPOCH) // _MILLISECOND, _plain(filter_)]
    return base64.urlsafe_b64encode(json.dumps(plain, separators=(",", ":")).encode()).decode()


def read(token: str, filter_: DeadFilter) -> PagePosition:
    """Return the position in a token.

    Raises:
        InvalidArgument: it is not a token of this filter.
    """
    bad = InvalidArgument("page_token: not the next_page_token of a page with this filter")
    if len(token) > _MOST_CHARS:
        raise bad
    try:
        after, began_ms, of_filter = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
        began = _EPOCH + began_ms * _MILLISECOND
    except (ValueError, TypeError, OverflowError, binascii.Error, RecursionError):
        raise bad from None
    if not isinstance(after, str) or not is_ulid(after) or of_filter != _plain(filter_):
        raise bad
    return PagePosition(after, began)


def _plain(filter_: DeadFilter) -> Any:
    return json.loads(json.dumps(filter_.query(), default=str))
