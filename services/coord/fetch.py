"""Fetch of a small JSON document from an issuer of tokens: bounded in size and time, without redirects."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

from shoal.errors import Unavailable

BYTES = 256 << 10
"""Size of a key set or of an OpenID Connect document. Real ones have a few kB."""
TIMEOUT_S = 5.0
"""Time for one document, from the connect to the last byte."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none: an issuer could send the request anywhere."""


def fetch_json(url: str) -> Any:
    """Return the document at `url`. Blocks: call it in a thread. The caller has checked the address.

    Raises:
        Unavailable: there is no such document in time, it is too large, or no JSON.
    """
    deadline = time.monotonic() + TIMEOUT_S
    opener = urllib.request.build_opener(_NoRedirects)
    request = urllib.request.Request(url, headers={"accept": "application/json", "user-agent": "shoal"})
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            data = b""
            while piece := response.read1(64 << 10):
                data += piece
                if len(data) > BYTES:
                    raise Unavailable(f"{url} has more than {BYTES} bytes")
                if time.monotonic() > deadline:
                    raise Unavailable(f"{url} was not whole after {TIMEOUT_S:g} s")
        return json.loads(data)
    except urllib.error.HTTPError as err:
        raise Unavailable(f"{url} has the status {err.code}") from None
    except (OSError, ValueError, RecursionError) as err:
        raise Unavailable(f"{url} cannot be fetched: {getattr(err, 'reason', err)}") from None
