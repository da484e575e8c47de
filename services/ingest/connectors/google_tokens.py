"""Access tokens for Google's APIs, from the application's default credentials, refreshed when they expire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from shoal.errors import FailedPrecondition, Unavailable

_SCOPES = ("https://www.googleapis.com/auth/pubsub",)


class Credentials(Protocol):
    """Interface of google-auth's credentials, as far as it is used here."""

    token: str | None

    @property
    def valid(self) -> bool: ...

    def refresh(self, request: Any) -> None: ...


class Tokens:
    """Authorization header of calls. `find` returns credentials; it and the refresh block, so both run in a thread."""

    def __init__(self, find: Callable[[], Credentials], request: Callable[[], Any]) -> None:
        self._find = find
        self._request = request
        self._credentials: Credentials | None = None
        self._refreshing = asyncio.Lock()

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of one call.

        Raises:
            FailedPrecondition: there are no credentials. Unavailable: the token cannot be refreshed now.
        """
        async with self._refreshing:
            if self._credentials is None or not self._credentials.valid:
                await asyncio.to_thread(self._refresh)
            assert self._credentials is not None
            return (("authorization", f"Bearer {self._credentials.token}"),)

    def _refresh(self) -> None:
        from google.auth import exceptions

        try:
            self._credentials = self._credentials or self._find()
            self._credentials.refresh(self._request())
        except exceptions.DefaultCredentialsError as err:
            raise FailedPrecondition(
                f"no Google credentials were found ({err}): set GOOGLE_APPLICATION_CREDENTIALS"
            ) from err
        except exceptions.GoogleAuthError as err:
            raise Unavailable(f"no access token from Google: {err}") from err


def tokens() -> Tokens:
    """Return the tokens of the application's default credentials."""
    return Tokens(_default, _http)


def _default() -> Any:
    import google.auth

    return google.auth.default(scopes=_SCOPES)[0]


def _http() -> Any:
    from google.auth.transport.requests import Request

    return Request()
