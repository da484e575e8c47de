"""Fetch of a small JSON document from an issuer of tokens: bounded in size and time, without redirects."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from shoal.errors import Unavailable

BYTES = 256 << 10
"""Size of a key set or of an OpenID Connect document. Real ones have a few kB."""
TIMEOUT_S = 5.0
"""Time for one document, from the resolution of the name to the last byte."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none: an issuer could send the request anywhere."""


class _Connections(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Connections that another thread can end. A socket's timeout is for each read: a slow sender has no limit."""

    def __init__(self) -> None:
        super().__init__()
        self._socket: socket.socket | None = None
        self._is_ended = False

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._kept(http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._kept(http.client.HTTPSConnection), req)

    def _kept(self, kind: type[http.client.HTTPConnection]) -> Any:
        handler = self

        class Connection(kind):  # type: ignore[misc, valid-type]
            def connect(self) -> None:
                super().connect()
                handler._socket = self.sock
                if handler._is_ended:
                    handler.end()

        return Connection

    def end(self) -> None:
        """End the reads in progress and all later ones."""
        self._is_ended = True
        if self._socket is not None:
            with suppress(OSError):
                # Not that of an SSLSocket, which changes the state of the reading thread.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def fetch_json(url: str) -> Any:
    """Return the document at `url`. Blocks: call it in a thread. The caller has checked the address.

    Raises:
        Unavailable: there is no such document in time, it is too large, or no JSON.
    """
    connections = _Connections()
    outcome: Future[Any] = Future()

    def fetch() -> None:
        try:
            outcome.set_result(_document(url, connections))
        except Exception as err:
            outcome.set_exception(err)

    # Nothing ends the resolution of a name: its thread stays until the resolver gives up, some 30 s.
    threading.Thread(target=fetch, name="fetch", daemon=True).start()
    try:
        return outcome.result(TIMEOUT_S)
    except TimeoutError:
        connections.end()
        raise Unavailable(f"{url} was not whole after {TIMEOUT_S:g} s") from None


def _document(url: str, connections: _Connections) -> Any:
    opener = urllib.request.build_opener(_NoRedirects, connections)
    request = urllib.request.Request(url, headers={"accept": "application/json", "user-agent": "shoal"})
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            data = b""
            while piece := response.read1(64 << 10):
                data += piece
                if len(data) > BYTES:
                    raise Unavailable(f"{url} has more than {BYTES} bytes")
        return json.loads(data)
    except urllib.error.HTTPError as err:
        raise Unavailable(f"{url} has the status {err.code}") from None
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as err:
        raise Unavailable(f"{url} cannot be fetched: {getattr(err, 'reason', err)}") from None
