"""Pages of a node's admin address, read from this machine."""

from __future__ import annotations

import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING

from shoal.errors import Unavailable

if TYPE_CHECKING:
    from shoal.rates import Page

PAGE_BYTES = 64 << 20
"""Bytes of a page that are read."""


def read(admin: str, target: str, *, timeout_s: float) -> str:
    """Return the first PAGE_BYTES of a page at the admin address `host:port`.

    Raises:
        Unavailable: the node does not answer in time, or not with this page.
    """
    # No HTTP proxy: the address is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{admin}{target}", timeout=timeout_s) as response:
            text: str = response.read(PAGE_BYTES).decode(errors="replace")
            return text
    except (OSError, ValueError, HTTPException) as err:
        # urllib's error has the one of the socket as its reason.
        cause = getattr(err, "reason", err)
        reason = getattr(cause, "strerror", None) or cause
        raise Unavailable(
            f"the admin address {admin} of the node does not answer {target.partition('?')[0]}: {reason}"
        ) from err


def metrics(admin: str, *, timeout_s: float) -> Page:
    """Return the page of metrics at the admin address.

    Raises:
        Unavailable: as `read`, or the page has no metrics.
    """
    from shoal.rates import parse

    text = read(admin, "/metrics", timeout_s=timeout_s)
    try:
        return parse(text)
    except ValueError as err:
        raise Unavailable(f"the admin address {admin} has no metrics: {err}") from err
