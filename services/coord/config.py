"""What the coord service is told: `SHOAL_COORD_<FIELD>`. The listeners of an Envoy come from its own node metadata."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from mesh.cluster.etcd import addresses_of
from mesh.process.config import ServiceConfig
from shoal.errors import InvalidArgument


def _checked(addresses: str) -> str:
    try:
        addresses_of(addresses)
    except InvalidArgument as err:
        raise ValueError(err.message) from err
    return addresses


class CoordConfig(ServiceConfig):
    """Configuration of the coord service. Units are in the names."""

    etcd: Annotated[str, AfterValidator(_checked)]
    """etcd's client addresses, `host:port[,host:port...]`. Coord has nothing to do without it."""
    settle_ms: Annotated[int, Field(ge=0, le=60_000)] = 5_000
    """After an outage of etcd longer than their leases, instances have so long to register again before Envoy loses
    them."""
