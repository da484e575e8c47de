"""A resource as it goes over the wire: packed once, its version taken from its content.

A version that comes from the content is the same in every coord replica and after every restart: an Envoy that
reconnects says which versions it has, and only what differs is sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from envoy_data_plane.google.protobuf import Any as Packed
from envoy_data_plane.message_pool import default_message_pool

_PREFIX = "type.googleapis.com/"
CLUSTER = _PREFIX + "envoy.config.cluster.v3.Cluster"
ENDPOINTS = _PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER = _PREFIX + "envoy.config.listener.v3.Listener"
ROUTES = _PREFIX + "envoy.config.route.v3.RouteConfiguration"

TYPES = (CLUSTER, ENDPOINTS, LISTENER, ROUTES)
"""In the order in which they must be sent: a cluster and its endpoints before the route that names it."""


@dataclass(frozen=True)
class Resource:
    """One packed resource."""

    type_url: str
    name: str
    version: str
    """From the content."""
    packed: Packed = field(compare=False, repr=False)
    needs: frozenset[str] = frozenset()
    """The clusters that it names: Envoy must have them first, and may lose them only after it."""


def pack(type_url: str, name: str, message: Any, needs: frozenset[str] = frozenset()) -> Resource:
    """Packs an Envoy message. Equal messages give equal versions."""
    return pack_serialized(type_url, name, bytes(message), needs)


def pack_serialized(type_url: str, name: str, value: bytes, needs: frozenset[str] = frozenset()) -> Resource:
    """Packs a message that is serialized already.

    Serializing is what costs (3 ms a cluster or a route): of hundreds that differ by a name, the common part is done
    once. The wire format makes it easy: serialized messages, one after the other, are the serialized merge of both.
    """
    version = hashlib.sha256(value).hexdigest()[:16]
    return Resource(type_url, name, version, Packed(type_url=type_url, value=value), needs)


def nested(field: int, value: bytes) -> bytes:
    """The message `value`, serialized, as field `field` (1 to 15) of another."""
    size, length = bytearray(), len(value)
    while length > 0x7F:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([field << 3 | 2, *size, length]) + value


def typed(cls: type, fields: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The fields of a message that goes into an Any, with its type; for `from_dict`."""
    return {"@type": default_message_pool.type_to_url[cls], **fields}


def short_type(type_url: str) -> str:
    """`Cluster` of `type.googleapis.com/envoy.config.cluster.v3.Cluster`."""
    return type_url.rpartition(".")[2]
