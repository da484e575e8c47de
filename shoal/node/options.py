"""Options of a node, validated once: each error names the option that caused it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import InvalidArgument
from shoal.node import exposure
from shoal.node.ports import HOST, joined, numeric

if TYPE_CHECKING:
    from shoal.node.tls.served import TlsOptions

SERVICES = ("coord", "store", "infer", "ingest")
"""Services in the order of their start: a service that others call starts earlier, and stops later."""
MAX_REPLICAS = 64
DEFAULT_GATEWAY_PORT = 8080
DEFAULT_ADMIN_PORT = 9901
_NODE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
_HOST_PORT = re.compile(r"^([^/:\s@,]+|\[[0-9a-fA-F:]+\]):([0-9]{1,5})$")


@dataclass(frozen=True)
class Options:
    """Validated options of a node."""

    data_dir: Path
    gateway_port: int = DEFAULT_GATEWAY_PORT
    """0: any free one."""
    admin_port: int = DEFAULT_ADMIN_PORT
    replicas: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SERVICES, 1))
    """Instances of each service, in the order of their start. A service without an entry is not started."""
    etcd: str | None = None
    """`host:port[,host:port...]` of an etcd that runs already; None: the node starts one."""
    mongo: str | None = None
    """URL of a MongoDB that runs already; None: the node starts one."""
    name: str = "local"
    connectors: Path | None = None
    """A file of connectors, for every instance of ingest."""
    model_control: str = ""
    """none or explicit; empty: the environment decides."""
    allow_code: bool = False
    """Models may run code although other machines can reach the gateway."""
    gateway_host: str = HOST
    """IP address of the gateway."""
    tls: TlsOptions | None = None
    """Certificate of the gateway; None: clients speak plaintext."""
    auth: bool = False
    """Callers need a key or a token, and the policy of the cluster decides."""


def checked(
    *,
    data_dir: Path,
    gateway_port: int | None = None,
    listen: str = "",
    tls: TlsOptions | None = None,
    is_insecure: bool = False,
    admin_port: int = DEFAULT_ADMIN_PORT,
    replicas: str = "",
    services: str = "",
    etcd: str | None = None,
    mongo: str | None = None,
    name: str = "local",
    connectors: Path | None = None,
    model_control: str = "",
    allow_code: bool = False,
    auth: bool = False,
) -> Options:
    """Return the options of a command line.

    Raises:
        InvalidArgument: an option is invalid; the message names it, its value and the allowed values.
    """
    if not _NODE_NAME.match(name):
        raise InvalidArgument(
            f"--node {name!r}: letters, digits, '_', '.' and '-', at most 63, a letter or digit first"
        )
    if listen and gateway_port is not None:
        raise InvalidArgument("--listen and --gateway-port are both given: --listen has the port already")
    gateway_host, gateway_port = (
        parse_listen(listen) if listen else (HOST, DEFAULT_GATEWAY_PORT if gateway_port is None else gateway_port)
    )
    exposure.check(
        "--listen",
        joined(gateway_host, gateway_port),
        has_tls=tls is not None,
        has_policy=auth,
        is_insecure=is_insecure,
        policy_option="--auth",
    )
    for option, port in (("--gateway-port", gateway_port), ("--admin-port", admin_port)):
        if not 0 <= port <= 65535:
            raise InvalidArgument(f"{option} {port}: a port is 1 to 65535, or 0 for any free one")
    if gateway_port == admin_port != 0:
        raise InvalidArgument(f"--gateway-port and --admin-port are both {gateway_port}: they must differ")
    chosen = parse_services(services)
    if connectors is not None and "ingest" not in chosen:
        raise InvalidArgument("--connectors is for ingest, which --services leaves out: add ingest to --services")
    for option, value in (("--model-control", model_control), ("--allow-code", allow_code)):
        if value and "infer" not in chosen:
            raise InvalidArgument(f"{option} is for infer, which --services leaves out: add infer to --services")
    return Options(
        data_dir=data_dir.expanduser().absolute(),
        gateway_port=gateway_port,
        admin_port=admin_port,
        replicas=_counted(chosen, parse_replicas(replicas)),
        etcd=parse_etcd(etcd) if etcd is not None else None,
        mongo=parse_mongo(mongo) if mongo is not None else None,
        name=name,
        connectors=connectors.expanduser().absolute() if connectors is not None else None,
        model_control=model_control,
        allow_code=allow_code,
        gateway_host=gateway_host,
        tls=tls,
        auth=auth,
    )


def parse_listen(text: str) -> tuple[str, int]:
    """Return the IP address and port of `HOST:PORT`."""
    match = _HOST_PORT.match(text.strip())
    if not match or int(match[2]) > 65535:
        raise InvalidArgument(f"--listen {text!r}: expected HOST:PORT, such as 0.0.0.0:8443 or [::]:8443")
    try:
        return numeric(match[1].strip("[]")), int(match[2])
    except OSError as err:
        raise InvalidArgument(f"--listen {text!r}: no address has this name ({err.strerror or err})") from err


def parse_services(text: str) -> tuple[str, ...]:
    """Return the services of `infer,store`, in the order of their start; all for an empty text.

    coord is always included: the node's Envoy takes its configuration from coord.
    """
    if not text.strip():
        return SERVICES
    names = [name.strip() for name in text.split(",")]
    for name in names:
        _known(name, "--services", text)
    return tuple(service for service in SERVICES if service in names or service == "coord")


def parse_replicas(text: str) -> dict[str, int]:
    """Return the counts of `infer=2,coord=3`."""
    counts: dict[str, int] = {}
    for item in text.split(",") if text.strip() else ():
        name, equals, count = (part.strip() for part in item.partition("="))
        if not equals:
            raise InvalidArgument(f"--replicas {text!r}: expected SERVICE=COUNT[,SERVICE=COUNT...], such as infer=2")
        _known(name, "--replicas", text)
        if name in counts:
            raise InvalidArgument(f"--replicas {text!r}: {name} occurs twice")
        if not re.fullmatch(r"[0-9]{1,4}", count) or not 1 <= int(count) <= MAX_REPLICAS:
            advice = "to leave a service out, list the others with --services" if count == "0" else "a whole number"
            raise InvalidArgument(f"--replicas {text!r}: {name}={count or '?'} is not 1 to {MAX_REPLICAS}: {advice}")
        counts[name] = int(count)
    return counts


def parse_etcd(text: str) -> str:
    """Return `a:2379,b:2379` for `http://a:2379,b:2379`."""
    addresses = []
    for item in text.split(","):
        address = item.strip().removeprefix("http://").rstrip("/")
        if address.startswith("https://"):
            raise InvalidArgument(f"--etcd {text!r}: TLS to etcd is not supported: put a local proxy in front of it")
        match = _HOST_PORT.match(address)
        if not address.startswith("unix:/") and (not match or not 0 < int(match[2]) < 65536):
            raise InvalidArgument(f"--etcd {text!r}: expected http://HOST:PORT[,http://HOST:PORT...] or unix:/PATH")
        addresses.append(address)
    return ",".join(addresses)


def parse_mongo(text: str) -> str:
    """Return a MongoDB URL unchanged. Raises InvalidArgument for a text that is no MongoDB URL."""
    if not re.match(r"^mongodb(\+srv)?://[^/\s]+", text.strip()):
        raise InvalidArgument(f"--mongo {text!r}: expected mongodb://HOST:PORT/?replicaSet=NAME")
    return text.strip()


def _known(name: str, option: str, text: str) -> None:
    if name not in SERVICES:
        known = ", ".join(SERVICES)
        raise InvalidArgument(f"{option} {text!r}: no service is called {name!r}: there are {known}")


def _counted(services: Sequence[str], counts: Mapping[str, int]) -> dict[str, int]:
    for name in counts:
        if name not in services:
            raise InvalidArgument(
                f"--replicas names {name}, which --services leaves out: list it in both or in neither"
            )
    return {service: counts.get(service, 1) for service in services}
