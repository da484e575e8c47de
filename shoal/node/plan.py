"""Processes of a node in the order of their start, with the environment of each. This module starts nothing.

    etcd | mongod | envoy | coord-* | store-* | infer-* | ingest-*

All start at the same time: a service starts while its dependencies are unavailable, and retries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mesh.process import crash_journal
from mesh.process.sockets import is_local
from mesh.tenant_locations import TENANT
from shoal.node import folder, processes
from shoal.node.envoy_bootstrap import bootstrap
from shoal.node.envoy_overload import heap_bytes
from shoal.node.options import Options
from shoal.node.ports import HOST, callable_here, joined

DRAIN_MS = 20_000
"""Longest time for calls in flight to finish when the node stops. A second signal ends the node immediately."""
# Time beyond the drain, for the notice to Envoys, deregistration and closing of connections.
_MARGIN_S = 5.0
_WITH_MONGO = ("store", "ingest")

JOBS_NICE = 5
"""Nice value of the processes that keep jobs: store, ingest and mongod. On busy processors, each gets a third of the
time of another process of the node.

A call of a model waits for Envoy and infer alone, and jobs can wait. etcd and coord keep the usual priority: all
services depend on their elections and health checks."""

# For backups and batches of a gateway that only this machine can reach: its callers may use whatever its user may use.
_EVERYWHERE = "file:///,s3://,gs://,az://"
_BUCKETS = "s3://,gs://,az://"


@dataclass(frozen=True)
class Layout:
    """Ports and folders of a node."""

    run_dir: Path
    gateway_port: int
    admin_port: int
    gateway_host: str = HOST
    sds: Path | None = None
    """File of the gateway's certificate."""
    master_key: Path | None = None
    """File of the keyring's master key, for coord; with authentication."""
    master_key_source: str = ""

    @property
    def gateway(self) -> str:
        """Address that the gateway listens at."""
        return joined(self.gateway_host, self.gateway_port)

    @property
    def gateway_here(self) -> str:
        """Address of the gateway for processes of this machine."""
        return joined(callable_here(self.gateway_host), self.gateway_port)

    @property
    def admin(self) -> str:
        return f"{HOST}:{self.admin_port}"

    @property
    def etcd(self) -> str:
        """Address of the node's own etcd: a socket, since etcd has no password."""
        return f"unix:{self.run_dir}/etcd:0"

    @property
    def mongod(self) -> str:
        """Address of the node's own mongod: a socket, since mongod has no password."""
        return f"unix:{self.run_dir}/mongod.sock"

    @property
    def outbound(self) -> Path:
        return self.run_dir / "outbound.sock"

    def socket_of(self, instance: str) -> Path:
        return self.run_dir / f"{instance}.sock"

    @property
    def envoy_admin(self) -> Path:
        """Socket of Envoy's admin interface, which can stop Envoy: only the node's user can reach it."""
        return self.run_dir / "envoy-admin.sock"

    def metrics_of(self, instance: str) -> Path:
        """Return the path of the socket at which an instance has its metrics."""
        return self.run_dir / f"{instance}.metrics.sock"

    def crash_journal_of(self, instance: str) -> Path:
        """Return the path of an instance's crash journal, its record of work in progress."""
        return self.run_dir / f"{instance}{crash_journal.SUFFIX}"


def needs_mongo(options: Options) -> bool:
    """Return True when a service of this node keeps data in MongoDB."""
    return any(service in options.replicas for service in _WITH_MONGO)


def etcd_address(options: Options, layout: Layout) -> str:
    """Return etcd's addresses for the services."""
    return options.etcd or layout.etcd


def mongo_url(options: Options, layout: Layout) -> str:
    """Return MongoDB's URL for the services."""
    return options.mongo or f"{processes.mongo_uri(layout.mongod)}?replicaSet=rs0"


def groups(
    options: Options, layout: Layout, environ: Mapping[str, str], launcher: int
) -> list[list[processes.ProcessSpec]]:
    """Return the processes to start, group after group; groups stop in reverse order.

    `launcher` is the pid of the process that the services depend on.

    Raises:
        FailedPrecondition: a binary is missing.
        InvalidArgument: a setting of Envoy in `environ` is wrong.
    """
    found: list[list[processes.ProcessSpec]] = []
    if options.etcd is None:
        found.append([processes.etcd(options.data_dir / "etcd", layout.etcd, f"unix:{layout.run_dir}/etcd-peer:0")])
    if options.mongo is None and needs_mongo(options):
        found.append([replace(processes.mongod(options.data_dir / "mongo", layout.mongod), nice=JOBS_NICE)])
    threads = processes.envoy_threads(environ)
    found.append([processes.envoy(envoy_file(options), f"unix:{layout.envoy_admin}", threads)])
    for service, count in options.replicas.items():
        instances = [f"{service}-{number}" for number in range(count)]
        found.append([_service(service, name, options, layout, environ, launcher) for name in instances])
    return found


def envoy_file(options: Options) -> Path:
    """Return the path of Envoy's bootstrap file, which each restart of Envoy reads."""
    return options.data_dir / "envoy.json"


def envoy_bootstrap(options: Options, layout: Layout, environ: Mapping[str, str]) -> str:
    """Return the bootstrap configuration of the node's Envoy, as JSON."""
    coords = [str(layout.socket_of(f"coord-{number}")) for number in range(options.replicas["coord"])]
    return bootstrap(
        node=options.name,
        gateway=layout.gateway,
        outbound=str(layout.outbound),
        admin=str(layout.envoy_admin),
        coords=coords,
        heap=heap_bytes(environ),
        sds="" if layout.sds is None else str(layout.sds),
    )


def _service(
    service: str, instance: str, options: Options, layout: Layout, environ: Mapping[str, str], launcher: int
) -> processes.ProcessSpec:
    prefix = f"SHOAL_{service.upper()}_"
    path = layout.socket_of(instance)
    settings = {
        "INSTANCE": instance,
        "NODE": options.name,
        "LISTEN": f"unix:{path}",
        "METRICS": f"unix:{layout.metrics_of(instance)}",
        "MESH": f"unix:{layout.outbound}",
        "ETCD": etcd_address(options, layout),
        "LOG_LEVELS": str(options.data_dir / folder.LOG_LEVELS),
        **({"AUTH": "true"} if options.auth else {}),
        **_own_settings(service, instance, options, layout),
    }
    # The user's environment overrides these defaults: services inherit it.
    defaults = {"DRAIN_MS": str(DRAIN_MS), **_own_defaults(service, options, layout, environ)}
    settings = {key: value for key, value in defaults.items() if prefix + key not in environ} | settings
    env = {prefix + key: value for key, value in settings.items()} | {"SHOAL_PARENT_PID": str(launcher)}
    journal = layout.crash_journal_of(instance) if service == "infer" else None
    grace_s = _grace_s(environ.get(prefix + "DRAIN_MS", ""))
    spec = processes.service(service, instance, path, env, grace_s, journal)
    return replace(spec, nice=JOBS_NICE) if service in _WITH_MONGO else spec


def _own_settings(service: str, instance: str, options: Options, layout: Layout) -> dict[str, str]:
    if service == "coord":
        keys = {}
        if layout.master_key is not None:
            keys = {"MASTER_KEY": str(layout.master_key), "MASTER_KEY_SOURCE": layout.master_key_source}
            keys["POLICY_COPY"] = str(options.data_dir / folder.POLICY_COPY)
        return {"ADMIN": layout.admin, **keys}
    if service in _WITH_MONGO:
        connectors = {"CONNECTORS": str(options.connectors)} if service == "ingest" and options.connectors else {}
        return {"MONGO": mongo_url(options, layout), **connectors}
    if service == "infer":
        cache = options.data_dir / "cache" / "models"
        # Several instances share models on a GPU: otherwise each would load the weights there.
        shared = {"SHARED_DIR": str(layout.run_dir)} if options.replicas["infer"] > 1 else {}
        control = {"MODEL_CONTROL": options.model_control} if options.model_control else {}
        code = {"ALLOW_CODE": "true"} if options.allow_code else {}
        journal = str(layout.crash_journal_of(instance))
        return {"CACHE_DIR": str(cache), "CRASH_JOURNAL": journal, **shared, **control, **code}
    return {}


def _own_defaults(service: str, options: Options, layout: Layout, environ: Mapping[str, str]) -> dict[str, str]:
    # With verified callers: a folder for each tenant, and no bucket until the operator names one.
    is_private = is_local(layout.gateway)
    if service == "infer":
        control = options.model_control or environ.get("SHOAL_INFER_MODEL_CONTROL")
        # A model that is pushed is served in explicit mode, too: the push is the request.
        pushed = {"LOAD_MODELS": "*"} if control == "explicit" else {}
        # An instance listens on a unix socket; its callers use the gateway.
        return {**pushed, "ALLOW_CODE": str(is_private).lower()}
    if service == "store":
        exports = (options.data_dir / "exports").as_uri()
        backups = (options.data_dir / "backups").as_uri()
        if options.auth:
            places = {"EXPORTS": f"{exports}/{TENANT}", "BACKUPS": backups}
        else:
            # Any bucket that the user's credentials open. On this machine, only the node's own folder.
            places = {
                "EXPORTS": f"{exports},{_BUCKETS}",
                "BACKUPS": _EVERYWHERE if is_private else f"{backups},{_BUCKETS}",
            }
        return {"DATABASE": "shoal", "BLOBS": (options.data_dir / "blobs").as_uri(), **places}
    if service == "ingest":
        batches = (options.data_dir / "batches").as_uri()
        open_urls = _EVERYWHERE if is_private else f"{batches},{_BUCKETS}"
        urls = f"{batches}/{TENANT}" if options.auth else open_urls
        return {"DATABASE": "shoal", "BATCH_URLS": urls}
    return {}


def _grace_s(drain_ms: str) -> float:
    """Return a grace period longer than the service's own drain. The service itself reports an invalid DRAIN_MS."""
    return (int(drain_ms) if drain_ms.isdecimal() else DRAIN_MS) / 1000 + _MARGIN_S
