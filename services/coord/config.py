"""Configuration of the coord service: `SHOAL_COORD_<FIELD>`. An Envoy's node metadata defines its listeners."""

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
    """Client addresses of etcd, `host:port[,host:port...]`; required."""
    settle_ms: Annotated[int, Field(ge=0, le=60_000)] = 5_000
    """After an outage of etcd longer than the leases, the time for instances to register again before Envoy removes
    them."""
