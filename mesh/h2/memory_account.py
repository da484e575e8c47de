"""Account of the bytes that the calls of one server hold, with a limit: of requests, or of unread responses.

    MemoryAccount (a server) <── Share (a tenant behind Envoy) <── ClientShare (one of its clients)
                             <── Share (a connection, or a tenant on a direct one)

A request counts from its first frame to its end, with the copies that are made of it.

Shares are bounded by what is free (dynamic thresholds, as in the buffers of switches): the more is held, the less a
holder may add, so newcomers find room. A connection, or a tenant on a direct one, may hold twice what the account has
free. A tenant behind Envoy may hold four times that, and one of its clients five times what the tenant may still add.
A connection or a client that is alone gets two thirds of the limit; the clients of a tenant together get four fifths.

New requests, with their headers and small bodies, and small responses find room beside large ones: each of these
factors is eight for them. A connection, or the clients of a tenant together, then get eight ninths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

Holder: TypeAlias = Callable[[], Iterable[tuple[str, int]]]
"""Returns the bytes of an account that it holds, by tenant: "" for requests that name none. A tenant may come twice."""

BODY_BYTES = 400 << 20
"""Default limit for requests. One client's share is 266 MiB: the pieces of one message of the maximal size, and the
whole message."""

UNREAD_BYTES = 192 << 20
"""Default limit for responses. One client's share is 128 MiB: one message of the maximal size."""

FREE_FACTOR = 2
"""A share may hold so many times what is free."""

# The same for a tenant behind Envoy, and for a client of what its tenant may still add: 4/5 of 5/6 is two thirds.
_TENANT_FACTOR, _CLIENT_FACTOR = 4, 5

# A request begins, and a small response waits, while its share holds at most so many times what is free: they find room
# beside large ones.
_BEGIN_FACTOR = 8

QUICK_FACTOR = 4
"""A request begins, without a look at its client, while its share and it take at most this part (a quarter) of what is
free then: `has_room_beside_large` is true there, whatever part of the share is its client's."""


# Shares of tenants that hold nothing are dropped beyond this number. Each takes 0.2 kB and its name, and an Envoy
# carries the calls of all tenants.
_MAX_IDLE_SHARES = 1024

# Tenants with longer names have one share together: without a policy, a client may send any name.
_MAX_NAME, _LONG_NAMES = 256, b"(long names)"


def leaves_room(held: int, size: int, free: int) -> bool:
    """Return True when a holder of `held` units that takes `size` of the `free` ones leaves enough to others."""
    return held + size <= FREE_FACTOR * (free - size)


class MemoryAccount:
    """Bytes held, and their limit."""

    __slots__ = ("held", "limit", "refused")

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.refused = 0
        """Requests that were rejected at their begin, since there was no room."""
        self.limit = limit

    def share(self) -> Share:
        """Open a share."""
        return Share(self)


class Share:
    """Bytes of one holder. Everything that is added is removed once.

    Args:
        has_clients: the holder is a tenant whose clients divide the share: bytes are added in the share of a client.
    """

    __slots__ = ("_account", "by_client", "held", "unfinished")

    def __init__(self, account: MemoryAccount, *, has_clients: bool = False) -> None:
        self._account = account
        self.held = 0
        self.unfinished = 0
        """Requests of a tenant behind Envoy whose bodies have not ended."""
        self.by_client: dict[bytes, int] | None = {} if has_clients else None
        """Bytes of the clients that hold some, which are `held` together."""

    def has_room(self, size: int) -> bool:
        """Return True when `size` bytes more may be held. Nothing always fits: errors and ends carry no bytes."""
        return not size or leaves_room(self.held, size, self.free)

    def has_room_beside_large(self, size: int) -> bool:
        """Return True when a request that begins, or a small response, finds room, though large ones leave none."""
        return self.held + size <= _BEGIN_FACTOR * (self.free - size)

    def fits(self, size: int) -> bool:
        """Return True when the account's limit allows `size` bytes more, whatever this share holds; as `has_room`."""
        account = self._account
        return not size or account.held + size <= account.limit

    @property
    def free(self) -> int:
        """Bytes of the account that nobody holds."""
        return self._account.limit - self._account.held

    def of_client(self, client: bytes) -> Share | ClientShare:
        """Return the share of a client, b"" for all services; this one, when it is not divided."""
        return self if self.by_client is None else ClientShare(self, self.by_client, client)

    def add(self, size: int) -> None:
        """Add bytes, whether or not there is room for them."""
        self.held += size
        self._account.held += size

    def remove(self, size: int) -> None:
        """Remove bytes that were added."""
        self.held -= size
        self._account.held -= size


class ClientShare:
    """Bytes of one client of a tenant; methods as those of `Share`."""

    __slots__ = ("_by_client", "_client", "_tenant")

    def __init__(self, tenant: Share, by_client: dict[bytes, int], client: bytes) -> None:
        self._tenant = tenant
        self._by_client = by_client
        self._client = client

    def has_room(self, size: int) -> bool:
        return not size or self._has_room(size, _TENANT_FACTOR, _CLIENT_FACTOR)

    def has_room_beside_large(self, size: int) -> bool:
        return self._has_room(size, _BEGIN_FACTOR, _BEGIN_FACTOR)

    def _has_room(self, size: int, of_free: int, of_room: int) -> bool:
        tenant, held = self._tenant, self._by_client.get(self._client, 0)
        # What the tenant may add while it holds at most `of_free` times what is free, times `of_free + 1`.
        room = of_free * tenant.free - tenant.held
        return (of_free + 1) * (held + size) <= of_room * (room - (of_free + 1) * size)

    def fits(self, size: int) -> bool:
        return self._tenant.fits(size)

    def add(self, size: int) -> None:
        by_client = self._by_client
        by_client[self._client] = held = by_client.get(self._client, 0) + size
        if not held:
            del by_client[self._client]
        self._tenant.add(size)

    def remove(self, size: int) -> None:
        self.add(-size)


class TenantShares:
    """Shares of one account, by tenant.

    Args:
        have_clients: the tenants have several clients, which divide their share.
    """

    __slots__ = ("_account", "_have_clients", "_most", "by_tenant")

    def __init__(self, account: MemoryAccount, *, have_clients: bool = False) -> None:
        self._account = account
        self._have_clients = have_clients
        self._most = _MAX_IDLE_SHARES
        self.by_tenant: dict[bytes, Share] = {}
        """Shares that hold something, and others."""

    def of(self, tenant: bytes) -> Share:
        """Return the share of a tenant, which is opened when it has none."""
        return self.by_tenant.get(tenant) or self.open(tenant)

    def open(self, tenant: bytes) -> Share:
        """Open the share of a tenant that has none."""
        shares = self.by_tenant
        if len(tenant) > _MAX_NAME:
            return self.of(_LONG_NAMES)
        if len(shares) >= self._most:
            for idle in [name for name, share in shares.items() if not share.held]:
                del shares[idle]
            self._most = max(_MAX_IDLE_SHARES, 2 * len(shares))
        share = shares[tenant] = Share(self._account, has_clients=self._have_clients)
        return share

    def held_by_tenant(self) -> Iterable[tuple[str, int]]:
        """Yield the bytes that tenants hold; "" is those that name none."""
        for tenant, share in self.by_tenant.items():
            if share.held:
                yield tenant.decode("latin-1"), share.held


def unlimited() -> Share:
    """Return a share of an account of its own, for a client: its callers bound what it sends."""
    return MemoryAccount(1 << 62).share()
