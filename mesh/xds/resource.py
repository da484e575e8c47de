"""Resource in the form of the wire: packed once, with a version that is a hash of its content.

A content hash is equal in every coord replica and after every restart. An Envoy that reconnects lists its versions, and
coord sends only the resources that differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mesh.xds.messages import Packed, default_message_pool

_PREFIX = "type.googleapis.com/"
CLUSTER = _PREFIX + "envoy.config.cluster.v3.Cluster"
ENDPOINTS = _PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENER = _PREFIX + "envoy.config.listener.v3.Listener"
ROUTES = _PREFIX + "envoy.config.route.v3.RouteConfiguration"

EXTENSION = _PREFIX + "envoy.config.core.v3.TypedExtensionConfig"
"""Filter that a listener names, and that changes without the listener (ECDS)."""

TYPES = (CLUSTER, ENDPOINTS, LISTENER, ROUTES, EXTENSION)
"""All types in the order of sending: a cluster and its endpoints before the route that names the cluster."""


@dataclass(frozen=True)
class Resource:
    """One packed resource."""

    type_url: str
    name: str
    version: str
    """Hash of the content."""
    packed: Packed = field(compare=False, repr=False)
    needs: frozenset[str] = frozenset()
    """Clusters that the resource names. Envoy must have them before the resource, and lose them only after it."""


def pack(type_url: str, name: str, message: Any, needs: frozenset[str] = frozenset()) -> Resource:
    """Pack an Envoy message. Equal messages give equal versions."""
    return pack_serialized(type_url, name, bytes(message), needs)


def pack_serialized(type_url: str, name: str, value: bytes, needs: frozenset[str] = frozenset()) -> Resource:
    """Pack a serialized message.

    Serializing is expensive (0.5 ms per cluster or route), so hundreds of messages that differ by a name share the
    bytes of their common fields. In protobuf's wire format, two concatenated messages decode to the merge of both.
    """
    version = hashlib.sha256(value).hexdigest()[:16]
    return Resource(type_url, name, version, Packed(type_url=type_url, value=value), needs)


def nested(field: int, value: bytes) -> bytes:
    """Return the bytes of field `field` (1 to 15) of a message, whose value is the serialized message `value`."""
    size, length = bytearray(), len(value)
    while length > 0x7F:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([field << 3 | 2, *size, length]) + value


def typed(cls: type, fields: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return the fields of a message inside an Any, with the message's type, for `from_dict`."""
    return {"@type": default_message_pool.type_to_url[cls], **fields}


def short_type(type_url: str) -> str:
    """Return the last name of a type URL: `Cluster` of `type.googleapis.com/envoy.config.cluster.v3.Cluster`."""
    return type_url.rpartition(".")[2]
