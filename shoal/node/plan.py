"""Which processes a node is made of, in the order of their start, and what each is told. Starts nothing.

    etcd | mongod | envoy | coord-* | store-* | infer-* | ingest-*

All start at once: a service comes up while what it needs is away, and retries.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mesh.process import crash_journal
from shoal.node import processes
from shoal.node.envoy_bootstrap import bootstrap
from shoal.node.options import Options
from shoal.node.ports import HOST

DRAIN_MS = 20_000
"""How long calls in flight may take to finish when the node stops. Who cannot wait signals twice."""
_MARGIN_S = 5.0
# On top of the drain: the notice, deregistering, closing what the calls needed.
_WITH_MONGO = ("store", "ingest")
_EVERYWHERE = "file:///,s3://,gs://,az://"
# For backups and batches: whoever reaches the gateway, which listens on this machine only, may use what its user may.


@dataclass(frozen=True)
class Layout:
    """The ports and folders of a node. A port of a part that is given by URL is 0."""

    run_dir: Path
    gateway_port: int
    admin_port: int
    etcd_port: int = 0
    etcd_peer_port: int = 0
    mongod_port: int = 0

    @property
    def gateway(self) -> str:
        return f"{HOST}:{self.gateway_port}"

    @property
    def admin(self) -> str:
        return f"{HOST}:{self.admin_port}"

    @property
    def outbound(self) -> Path:
        return self.run_dir / "outbound.sock"

    def socket_of(self, instance: str) -> Path:
        return self.run_dir / f"{instance}.sock"

    def flights_of(self, instance: str) -> Path:
        """Where an instance says what it is executing."""
        return self.run_dir / f"{instance}{crash_journal.SUFFIX}"


def wants_mongo(options: Options) -> bool:
    """Whether a service of this node keeps something in MongoDB."""
    return any(service in options.replicas for service in _WITH_MONGO)


def etcd_of(options: Options, layout: Layout) -> str:
    """etcd's addresses, as services are told them."""
    return options.etcd or f"{HOST}:{layout.etcd_port}"


def mongo_of(options: Options, layout: Layout) -> str:
    """MongoDB's URL, as services are told it."""
    return options.mongo or f"mongodb://{HOST}:{layout.mongod_port}/?replicaSet=rs0"


def groups(
    options: Options, layout: Layout, environ: Mapping[str, str], launcher: int
) -> list[list[processes.ProcessSpec]]:
    """The processes to start, group after group; they stop in reverse. `launcher` is the pid that they depend on.

    Raises:
        FailedPrecondition: a binary is missing.
    """
    found: list[list[processes.ProcessSpec]] = []
    if options.etcd is None:
        found.append([processes.etcd(options.data_dir / "etcd", layout.etcd_port, layout.etcd_peer_port)])
    if options.mongo is None and wants_mongo(options):
        found.append([processes.mongod(options.data_dir / "mongo", layout.mongod_port)])
    found.append([processes.envoy(layout.run_dir / "envoy.json", layout.admin, workers(os.cpu_count() or 1))])
    for service, count in options.replicas.items():
        instances = [f"{service}-{number}" for number in range(count)]
        found.append([_service(service, name, options, layout, environ, launcher) for name in instances])
    return found


def envoy_bootstrap(options: Options, layout: Layout) -> str:
    """What the node's Envoy starts from, as JSON."""
    coords = [str(layout.socket_of(f"coord-{number}")) for number in range(options.replicas["coord"])]
    return bootstrap(
        node=options.name, gateway=layout.gateway, outbound=str(layout.outbound), admin=layout.admin, coords=coords
    )


def workers(cores: int) -> int:
    """Envoy's worker threads on a machine with so many cores: the rest is for the models."""
    return max(1, min(4, cores // 2))


def _service(
    service: str, instance: str, options: Options, layout: Layout, environ: Mapping[str, str], launcher: int
) -> processes.ProcessSpec:
    prefix = f"SHOAL_{service.upper()}_"
    path = layout.socket_of(instance)
    told = {
        "INSTANCE": instance,
        "NODE": options.name,
        "LISTEN": f"unix:{path}",
        "MESH": f"unix:{layout.outbound}",
        "ETCD": etcd_of(options, layout),
        **_own_settings(service, instance, options, layout),
    }
    # The user's environment decides over these: it passes through.
    defaults = {"DRAIN_MS": str(DRAIN_MS), **_own_defaults(service, options)}
    told |= {key: value for key, value in defaults.items() if prefix + key not in environ}
    env = {prefix + key: value for key, value in told.items()} | {"SHOAL_PARENT_PID": str(launcher)}
    told_in = layout.flights_of(instance) if service == "infer" else None
    return processes.service(service, instance, path, env, _grace_s(environ.get(prefix + "DRAIN_MS", "")), told_in)


def _own_settings(service: str, instance: str, options: Options, layout: Layout) -> dict[str, str]:
    if service in _WITH_MONGO:
        streams = {"CONNECTORS": str(options.connectors)} if service == "ingest" and options.connectors else {}
        return {"MONGO": mongo_of(options, layout), **streams}
    if service == "infer":
        cache = options.data_dir / "cache" / "models"
        # Of several, those on a GPU would each bring the weights there.
        shared = {"SHARED_DIR": str(layout.run_dir)} if options.replicas["infer"] > 1 else {}
        return {"CACHE_DIR": str(cache), "CRASH_JOURNAL": str(layout.flights_of(instance)), **shared}
    return {}


def _own_defaults(service: str, options: Options) -> dict[str, str]:
    if service == "store":
        exports = (options.data_dir / "exports").as_uri()
        return {
            "DATABASE": "shoal",
            "BLOBS": (options.data_dir / "blobs").as_uri(),
            # Buckets are open to whom the user's credentials are; of this machine only the node's own folder.
            "EXPORTS": f"{exports},s3://,gs://,az://",
            "BACKUPS": _EVERYWHERE,
        }
    return {"DATABASE": "shoal", "BATCH_URLS": _EVERYWHERE} if service == "ingest" else {}


def _grace_s(drain_ms: str) -> float:
    """Longer than the service's own drain; what it was told may be no number, which it says itself."""
    return (int(drain_ms) if drain_ms.isdecimal() else DRAIN_MS) / 1000 + _MARGIN_S
