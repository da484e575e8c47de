"""Configuration of a service: a frozen object, read from the environment once, at start.

Every service has a prefix, and every variable with that prefix must be a field: `SHOAL_STORE_LISTEN` is `listen` of the
store. The error names each variable that is invalid, missing or unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mesh.process.sockets import is_local


class ConfigError(Exception):
    """A variable of the environment is invalid. The message names each one, its value and the allowed values."""


Address = Annotated[str, Field(pattern=r"^(unix:.+|[^/:\s]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5})$")]
"""`unix:/path/to.sock` or `host:port`, in gRPC's form."""


class ServiceConfig(BaseModel):
    """Configuration that all services share. Units are in the names."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    instance: Annotated[str, Field(pattern=r"^[a-z]+-\d+$")]
    """`<service>-<n>`: name of the instance, unique on its node."""
    node: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")] = "local"
    """Name of the instance's node."""
    listen: Address
    """Address to listen at: a unix socket behind an Envoy, or TCP without one (port 0 is any free one)."""
    insecure: bool = False
    """Allow `listen` to be an address that other machines can reach. Requests are served without TLS and without the
    checks of an Envoy."""
    auth: bool = False
    """Every call needs a caller that the node's gateway has verified and that the policy in etcd allows. Needs `etcd`,
    and a unix socket as `listen`, to which only the node's own processes can connect."""
    mesh: Address | None = None
    """Outbound listener of the node's Envoy, through which the instance calls other services."""
    etcd: str | None = None
    """etcd's client addresses, `host:port[,host:port...]`. Unset: the instance does not register, and runs alone."""
    drain_ms: Annotated[int, Field(ge=0, le=600_000)] = 5_000
    """Longest time for calls in flight to finish at a stop, without its last fifth (at most 2 s), in which what is left
    is cut and the process ends."""
    notice_ms: Annotated[int, Field(ge=0, le=60_000)] = 300
    """Time that the instance continues to serve after it has deregistered, so that every Envoy learns of it."""
    body_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 30)] = 400 << 20
    """Most bytes that all connections hold for requests, unary ones until they are answered, with their headers and
    decompressed copies. One client gets at most two thirds, one tenant four fifths, and small requests find room beside
    them; beyond it, calls get RESOURCE_EXHAUSTED."""
    unread_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 30)] = 192 << 20
    """Most bytes that all connections hold of responses that clients do not read. One client gets at most two thirds,
    one tenant behind Envoy four fifths, and small responses find room beside them; beyond it, calls get
    RESOURCE_EXHAUSTED."""
    metrics: Address | None = None
    """Address of the page of metrics for Prometheus, `/metrics`: a unix socket or a loopback port. Unset: no page."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""
    log_levels: Path | None = None
    """File of levels that differ for a time; `shoal up` gives it, for `shoal logs --set-level`. Unset: none do."""


C = TypeVar("C", bound=ServiceConfig)


def load(cls: type[C], service: str, environ: Mapping[str, str]) -> C:
    """Read `SHOAL_<SERVICE>_<FIELD>` variables into a `cls`.

    Raises:
        ConfigError: variables are missing, invalid or unknown, and the message names them all; or other machines can
            reach `listen`, and `insecure` is not set.
    """
    prefix = f"SHOAL_{service.upper()}_"
    values = {key[len(prefix) :].lower(): value for key, value in environ.items() if key.startswith(prefix)}
    try:
        config = cls.model_validate(values)
    except ValidationError as err:
        lines = [
            _explain(prefix, str(e["loc"][0]) if e["loc"] else "", e["type"], e["msg"], e["input"])
            for e in err.errors()
        ]
        known = ", ".join(prefix + name.upper() for name in cls.model_fields)
        raise ConfigError("\n".join([*lines, f"known variables: {known}"])) from err
    if not config.insecure and not is_local(config.listen):
        raise ConfigError(
            f"{prefix}LISTEN={config.listen!r}: other machines can reach this address, and the service has no TLS: "
            "listen on a unix socket or on loopback behind an Envoy (`shoal serve` and `shoal up` start one), "
            f"or set {prefix}INSECURE=true"
        )
    if config.metrics is not None and not is_local(config.metrics):
        raise ConfigError(
            f"{prefix}METRICS={config.metrics!r}: other machines can reach this address, and metrics name tenants and "
            "models: listen on a unix socket or on loopback, behind what authenticates the reader"
        )
    if config.auth and (config.etcd is None or not config.listen.startswith("unix:")):
        raise ConfigError(
            f"{prefix}AUTH needs {prefix}ETCD, which has the policy, and a unix socket as {prefix}LISTEN: callers at "
            "another address could name themselves whoever they like"
        )
    return config


def _explain(prefix: str, field: str, kind: str, message: str, value: object) -> str:
    # The message of a rule about several fields names them.
    if not field:
        return re.sub(r"^Value error, ", "", message)
    name = prefix + field.upper()
    if kind == "missing":
        return f"{name} is required and not set"
    if kind == "extra_forbidden":
        return f"{name} is not a setting of this service"
    return f"{name}={value!r}: {re.sub(r'^Value error, ', '', message)}"
