"""Pages of a node's admin address, read from this machine."""

from __future__ import annotations

import urllib.request
from http.client import HTTPException

from shoal.errors import Unavailable

PAGE_BYTES = 64 << 20
"""Bytes of a page that are read."""


def read(admin: str, target: str, *, timeout_s: float, most: int = PAGE_BYTES) -> str:
    """Return the first `most` bytes of a page at the admin address `host:port`.

    Raises:
        Unavailable: the node does not answer in time, or not with this page.
    """
    # No HTTP proxy: the address is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{admin}{target}", timeout=timeout_s) as response:
            text: str = response.read(most).decode(errors="replace")
            return text
    except (OSError, ValueError, HTTPException) as err:
        raise Unavailable(
            f"the admin address {admin} of the node does not answer {target.partition('?')[0]}: {err}"
        ) from err
