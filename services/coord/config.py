"""Configuration of the coord service: `SHOAL_COORD_<FIELD>`. An Envoy's node metadata defines its listeners."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

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
    master_key: Path | None = None
    """File of the master key of the keyring, which seals the cluster's secrets in etcd; only its owner can read it.
    Needed with `auth`."""
    master_key_source: str = ""
    """Source of the master key, as `shoal status` names it. Unset: the file."""
    policy_copy: Path | None = None
    """File for a copy of the applied policy, from which it is restored when etcd has lost it. Unset: none is kept."""
    admin: Annotated[str, Field(pattern=r"^[^/\s?#]+:\d{1,5}$")] | None = None
    """Admin address of the node, where the leading coord reads its metrics for the history. Unset: it has none."""
    issuer_refresh_ms: Annotated[int, Field(ge=1_000, le=86_400_000)] = 60_000
    """Interval at which the keys of the policy's issuers are fetched again. The last known ones stay in an outage."""
    settle_ms: Annotated[int, Field(ge=0, le=60_000)] = 5_000
    """After an outage of etcd longer than the leases, or after a service or model has lost all its leases, the time for
    instances to register again before Envoy removes them."""

    @model_validator(mode="after")
    def _has_a_keyring(self) -> CoordConfig:
        if self.auth and self.master_key is None:
            raise ValueError("SHOAL_COORD_AUTH needs SHOAL_COORD_MASTER_KEY: a file with 32 bytes in base64")
        return self
