"""Keys of issuers with an address: fetched by the leader, kept in etcd. An outage of an issuer keeps the last ones.

policy ──> issuers with jwks_url or discovery ──fetch, each minute──> valid? ──changed──> etcd ──> Envoy
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from mesh.cluster.election import Election, Term
from mesh.cluster.etcd import Etcd, Put
from mesh.cluster.mirror import Mirror
from mesh.process.tasks import Background
from mesh.rpc.cluster_access import values_of
from services.coord.fetch import fetch_json
from shoal.access import cluster
from shoal.access.policy import Issuer, check_url, usable_keys
from shoal.errors import InvalidArgument, ShoalError, Unavailable

log = logging.getLogger(__name__)

# A new key of an issuer is known after so long. Issuers publish one before they use it.
REFRESH_S = 60.0
# After a failed fetch.
RETRY_S = 5.0
# Longest wait of one round: another policy may name another issuer.
_ROUND_S = 1.0
# Unusable keys of one issuer that are named.
_REASONS = 4


class IssuerKeys(Background):
    """Fetches the keys while `election` makes this replica the leader, in the `async with` block."""

    def __init__(
        self,
        etcd: Etcd,
        mirror: Mirror,
        election: Election,
        *,
        refresh_s: float = REFRESH_S,
        retry_s: float = RETRY_S,
        fetch: Callable[[str], Any] = fetch_json,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._election = election
        self._refresh_s = refresh_s
        self._retry_s = retry_s
        self._fetch = fetch
        self._clock = clock
        # The policy's value in etcd that was read last, and its issuers: reading one of 200 grants takes milliseconds.
        self._read: bytes | None = None
        self._known: list[Issuer] = []

    async def _run(self) -> None:
        async for term in self._election.terms():
            due: dict[tuple[str, str | None], float] = {}
            while term.is_current():
                copy = self._mirror.copy
                for issuer in () if copy.stale else self._issuers():
                    if self._clock() >= due.get(_place(issuer), 0.0):
                        is_fetched = await self._refresh(issuer, term)
                        due[_place(issuer)] = self._clock() + (self._refresh_s if is_fetched else self._retry_s)
                await self._mirror.after(copy, _ROUND_S)

    def _issuers(self) -> list[Issuer]:
        values = values_of(self._mirror.copy)[0]
        if (value := values.get(cluster.POLICY)) == self._read:
            return self._known
        self._read, self._known = value, []
        try:
            policy = cluster.applied(values)
        except (ValueError, KeyError, TypeError):
            log.exception("the policy in etcd cannot be read", {"event": "policy.unreadable"})
        else:
            self._known = [] if policy is None else [issuer for issuer in policy.issuers if issuer.is_fetched]
        return self._known

    async def _refresh(self, issuer: Issuer, term: Term) -> bool:
        """Fetch the keys of an issuer, and write them if they have changed. Return False when that fails."""
        try:
            jwks = await asyncio.to_thread(fetched_keys, issuer, self._fetch)
            key, value = cluster.fetched_key(issuer.issuer), json.dumps(jwks, sort_keys=True).encode()
            entry = self._mirror.copy.entries.get(key)
            if entry is None or entry.value != value:
                await self._etcd.transact([term.fence], [Put(key, value)])
                log.info(
                    "the issuer %(issuer)s has other keys: %(key_ids)s",
                    {
                        "event": "issuer.keys_changed",
                        "issuer": issuer.issuer,
                        "key_ids": [one["kid"] for one in jwks["keys"]],
                    },
                )
                for reason in jwks.get("skipped", ()):
                    log.warning(
                        "a key of the issuer %(issuer)s is not used: %(reason)s",
                        {"event": "issuer.key_unused", "issuer": issuer.issuer, "reason": reason},
                    )
        except ShoalError as err:
            log.warning(
                "the keys of the issuer %(issuer)s stay the last known ones: %(error)s",
                {"event": "issuer.keys_stale", "issuer": issuer.issuer, "error": err.message},
            )
            return False
        # A bug must not end the refresh of the others.
        except Exception:
            log.exception(
                "the keys of the issuer %(issuer)s cannot be fetched",
                {"event": "issuer.fetch_failed", "issuer": issuer.issuer},
            )
            return False
        return True


def _place(issuer: Issuer) -> tuple[str, str | None]:
    return issuer.issuer, issuer.jwks_url


def fetched_keys(issuer: Issuer, fetch: Callable[[str], Any] = fetch_json) -> dict[str, Any]:
    """Return the key set of an issuer, without its keys for other purposes.

    One key that a gateway cannot use does not keep the others from being known: `skipped` in the set has the reasons.

    Raises:
        Unavailable: a document cannot be fetched.
        InvalidArgument: the issuer's documents are not what a gateway can use.
    """
    url = issuer.jwks_url
    if url is None:
        document = fetch(f"{issuer.issuer.rstrip('/')}/.well-known/openid-configuration")
        if not isinstance(document, dict) or document.get("issuer") != issuer.issuer:
            raise InvalidArgument(f"the OpenID Connect document of {issuer.issuer} names another issuer")
        url = str(document.get("jwks_uri", ""))
        try:
            check_url(url)
        except ValueError as err:
            raise InvalidArgument(f"the OpenID Connect document of {issuer.issuer}: jwks_uri: {err}") from err
    jwks = fetch(url)
    keys = jwks.get("keys") if isinstance(jwks, dict) else None
    if not isinstance(keys, list):
        raise Unavailable(f"{url} has no key set")
    signing = [_named(key) for key in keys if isinstance(key, dict) and key.get("use", "sig") == "sig"]
    usable, skipped = usable_keys(signing)
    if not usable:
        raise InvalidArgument(
            f"{url} has no key that can be used{': ' if skipped else ''}{'; '.join(skipped[:_REASONS])}"
        )
    return {"keys": usable, **({"skipped": skipped[:_REASONS]} if skipped else {})}


def _named(key: dict[str, Any]) -> dict[str, Any]:
    """Return a key with its algorithm: many issuers leave it out for RSA."""
    return {"alg": "RS256", **key} if key.get("kty") == "RSA" else key
