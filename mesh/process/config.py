"""Configuration of a service: a frozen object, read from the environment once, at start.

Every service has a prefix, and every variable with that prefix must be a field: `SHOAL_STORE_LISTEN` is `listen` of the
store. A key that is wrong, missing or unknown is named in the error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mesh.process.sockets import is_local


class ConfigError(Exception):
    """A variable of the environment is wrong. The message names each one, what is allowed and what came."""


Address = Annotated[str, Field(pattern=r"^(unix:.+|[^/:\s]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5})$")]
"""`unix:/path/to.sock` or `host:port`, as gRPC writes it."""


class ServiceConfig(BaseModel):
    """What every service is told. Units are in the names."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    instance: Annotated[str, Field(pattern=r"^[a-z]+-\d+$")]
    """`<service>-<n>`: unique on its node."""
    node: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")] = "local"
    """The node it runs on."""
    listen: Address
    """Where it serves: a unix socket beside its Envoy; TCP where it stands alone (port 0 is any free one)."""
    insecure: bool = False
    """Allow `listen` to be an address that other machines can reach. Requests are served without TLS and without the
    checks of an Envoy."""
    mesh: Address | None = None
    """Its Envoy's outbound listener, through which it calls other services."""
    etcd: str | None = None
    """etcd's client addresses, `host:port[,host:port...]`. Unset: it stands alone and registers nowhere."""
    drain_ms: Annotated[int, Field(ge=0, le=600_000)] = 5_000
    """How long calls in flight may take to finish at a stop."""
    notice_ms: Annotated[int, Field(ge=0, le=60_000)] = 300
    """How long it goes on serving after it has said that it is leaving, so that every Envoy has heard."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level of what is logged."""


C = TypeVar("C", bound=ServiceConfig)


def load(cls: type[C], service: str, environ: Mapping[str, str]) -> C:
    """Reads `SHOAL_<SERVICE>_<FIELD>` variables into a `cls`.

    Raises:
        ConfigError: a variable is missing, wrong or unknown; every such variable is named. Or other machines can reach
            `listen`, and `insecure` is not set.
    """
    prefix = f"SHOAL_{service.upper()}_"
    given = {key[len(prefix) :].lower(): value for key, value in environ.items() if key.startswith(prefix)}
    try:
        config = cls.model_validate(given)
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
    return config


def _explain(prefix: str, field: str, kind: str, message: str, value: object) -> str:
    if not field:  # A rule about several fields: its message names them.
        return re.sub(r"^Value error, ", "", message)
    name = prefix + field.upper()
    if kind == "missing":
        return f"{name} is required and not set"
    if kind == "extra_forbidden":
        return f"{name} is not a setting of this service"
    return f"{name}={value!r}: {re.sub(r'^Value error, ', '', message)}"
