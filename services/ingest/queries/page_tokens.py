"""Page tokens: the position of the next page, and the filter that the token belongs to."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.errors import InvalidArgument

# The longest model name and tenant, with every character escaped, take less than half of it.
_MOST_CHARS = 8_000


def encode(position: Sequence[str | int], query: Mapping[str, Any]) -> str:
    """Return the token of a position in the pages of `query`."""
    plain = [*position, _plain(query)]
    return base64.urlsafe_b64encode(json.dumps(plain, separators=(",", ":")).encode()).decode()


def read(token: str, query: Mapping[str, Any]) -> list[Any]:
    """Return the position in a token, which any client may have made up: the caller checks its values.

    Raises:
        InvalidArgument: the token does not belong to `query`.
    """
    if len(token) > _MOST_CHARS:
        raise bad_token()
    try:
        position: list[Any]
        *position, of_query = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise bad_token() from None
    if of_query != _plain(query):
        raise bad_token()
    return position


def bad_token() -> InvalidArgument:
    """Return the error for a token that belongs to no page of the filter."""
    return InvalidArgument("page_token: not the next_page_token of a page with this filter")


def _plain(query: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(query, default=str))
