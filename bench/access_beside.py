"""Verified callers and TLS, beside what one would build otherwise: Envoy's filters written by hand, and Triton.

    python bench/access_beside.py [--parts filters,tls] [--rounds 5] [--seconds 1] [--precedence]

filters   tiny with 64 in flight, the next of 1,000 keys with each call. A node of Shoal, open and with keys and limits
          (as `goal` of bench/access.py); and an Envoy in front of Triton, which only routes, or has filters written by
          hand: jwt_authn with a cache for all keys, rbac by role and RPC, a local limit by tenant, and a log of
          refusals. A ratio is to the open one of the pair.
tls       tiny from another network namespace with TLS 1.3, on 8 connections, and with a new connection for each call:
          Triton, which verifies nobody, and `shoal serve`, open (`--insecure`) and with keys (`--policy`).

Triton is the binary of the wheel nvidia-pytriton (`make .venv-triton/.installed`). It has its python backend only, so
tiny is a NumPy product there, with dynamic batching: compare what verification and TLS add, not the models.

Servers run on processor 0 with one thread for models, the generator on the other processors. Processor time is that of
all processes of a server; of a node, without etcd and MongoDB. Rounds interleave the servers. Needs root, for the
namespaces.

Predicted: filters by hand add 30 to 40 us a call, as those of Shoal do: both are the same Envoy's. In the namespace,
64 in flight cost `shoal serve` half of Triton's processor time, and a new connection costs both about a millisecond.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import uvloop
from access import KEYS, LIMITED, OPEN, TENANTS, KeyedLoad, Row, Timed, closed, one_call_each, running, tls_of
from fronts import Network, namespaces, show
from infer import ROOT, Measured, process_tree
from infer_models import Sample, save
from oip_load import Requests
from push import cpu_s
from rich.console import Console
from siege.servers import take_precedence

from shoal.access import tokens
from shoal.access.tokens import Signer
from shoal.node.processes import find_binary, free_port
from tests.infer.triton import triton_process

_READY_S = 60.0
_TRITON = ROOT / ".venv-triton"
_FILTERS = "type.googleapis.com/envoy.extensions.filters"
_RPCS = ("ModelInfer", "ModelStreamInfer", "ModelMetadata", "ModelReady", "ServerReady", "ServerLive")
_MODEL = """
import triton_python_backend_utils as pb_utils
import numpy as np


class TritonPythonModel:
    def initialize(self, args):
        self.weights = np.load(%r)
        self.bias = np.load(%r)

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        outputs = np.concatenate(inputs) @ self.weights + self.bias
        ends = np.cumsum([len(each) for each in inputs])[:-1]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("output", rows)]) for rows in np.split(outputs, ends)]
"""
_CONFIG = """backend: "python"
max_batch_size: 64
input [ { name: "input" data_type: TYPE_FP32 dims: [ 16 ] } ]
output [ { name: "output" data_type: TYPE_FP32 dims: [ 4 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
dynamic_batching { }
"""


@dataclass
class Peer:
    """A running server whose processes are those of `pids` and what they have started."""

    address: str
    pids: Sequence[int]
    envoy: int | None = None
    keys: Sequence[str] = ()
    ca: str | None = None
    """File of the certificate; None: plaintext."""

    def cpu_s(self) -> np.ndarray:
        """Return the processor time so far: of all processes, and of Envoy."""
        envoy = cpu_s(self.envoy) if self.envoy else 0.0
        return np.array([sum(cpu_s(pid) for root in self.pids for pid in process_tree(root)), envoy])

    def load(self, requests: Requests) -> KeyedLoad:
        return KeyedLoad(self.address, requests, keys=self.keys, tls=tls_of(self.ca) if self.ca else None)


# -- servers


def write_for_triton(folder: Path, tiny: Path) -> Path:
    """Write the model tiny for Triton's python backend, and return the repository."""
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tiny).graph.initializer}
    version = folder / "triton-models/tiny/1"
    version.mkdir(parents=True)
    for name, values in weights.items():
        np.save(version / f"{name}.npy", values)
    source = _MODEL % (str(version / "output.w.npy"), str(version / "output.b.npy"))
    (version / "model.py").write_text(source)
    (version.parent / "config.pbtxt").write_text(_CONFIG)
    return version.parent.parent


@contextlib.contextmanager
def triton(models: Path, folder: Path, network: Network, *options: str) -> Iterator[triton_process.Triton]:
    folder.mkdir()
    within = network.command([])
    with triton_process.started(_TRITON, models, folder, host=network.host, within=within, options=options) as server:
        yield server


def envoy_document(port: int, upstream: str, filters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the static configuration of an Envoy that routes all calls to a gRPC server."""
    host, _, upstream_port = upstream.rpartition(":")
    router = {"name": "router", "typed_config": {"@type": f"{_FILTERS}.http.router.v3.Router"}}
    manager = {
        "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "beside",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "triton", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [*filters, router],
    }
    if filters:
        manager["access_log"] = [_refusals()]
    http = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    cluster = {
        "name": "triton",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": "triton",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(host, int(upstream_port))}}]}],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": http,
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
    }
    listener = {
        "name": "beside",
        "address": _address("127.0.0.1", port),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _refusals() -> dict[str, Any]:
    file = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"
    above = {"comparison": {"op": "GE", "value": {"default_value": 400, "runtime_key": "refusals"}}}
    return {
        "name": "refusals",
        "filter": {"status_code_filter": above},
        "typed_config": {"@type": file, "path": "/dev/null"},
    }


def filters_by_hand(signer: Signer) -> list[dict[str, Any]]:
    """Return the filters: the token, then the role and the RPC, then the limit of the tenant."""
    claims = {"x-tenant": "tenant", "x-role": "role"}
    provider = {
        "issuer": signer.issuer,
        "audiences": [tokens.AUDIENCE],
        "local_jwks": {"inline_string": json.dumps(signer.jwks())},
        "from_headers": [{"name": "authorization", "value_prefix": f"Bearer {tokens.PREFIX}"}],
        "claim_to_headers": [{"header_name": header, "claim_name": claim} for header, claim in claims.items()],
        "jwt_cache_config": {"jwt_cache_size": 2 * KEYS},
    }
    token = {
        "@type": f"{_FILTERS}.http.jwt_authn.v3.JwtAuthentication",
        "providers": {"keys": provider},
        "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "keys"}}],
    }
    paths = [{"url_path": {"path": {"exact": f"/inference.GRPCInferenceService/{rpc}"}}} for rpc in _RPCS]
    rule = {
        "permissions": [{"or_rules": {"rules": paths}}],
        "principals": [{"header": {"name": "x-role", "string_match": {"exact": "user"}}}],
    }
    role = {"@type": f"{_FILTERS}.http.rbac.v3.RBAC", "rules": {"action": "ALLOW", "policies": {"users": rule}}}
    bucket = {"max_tokens": 1_000_000, "tokens_per_fill": 1_000_000, "fill_interval": "1s"}
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    action = {"request_headers": {"header_name": "x-tenant", "descriptor_key": "tenant"}}
    limit = {
        "@type": f"{_FILTERS}.http.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "tenants",
        "token_bucket": {**bucket, "max_tokens": 4_000_000_000},
        "filter_enabled": always,
        "filter_enforced": always,
        "descriptors": [{"entries": [{"key": "tenant"}], "token_bucket": bucket}],
        "max_dynamic_descriptors": 2 * TENANTS,
        "rate_limits": [{"actions": [action]}],
    }
    made = {"jwt_authn": token, "rbac": role, "local_ratelimit": limit}
    return [{"name": f"envoy.filters.http.{name}", "typed_config": each} for name, each in made.items()]


@contextlib.contextmanager
def envoy(document: Mapping[str, Any], file: Path) -> Iterator[int]:
    """Run an Envoy with one worker; give its pid."""
    file.write_text(json.dumps(document))
    command = [str(find_binary("envoy")), "--config-path", str(file), "--concurrency", "1", "--log-level", "error"]
    process = subprocess.Popen(["taskset", "-c", "0", *command, "--disable-hot-restart"], stdout=sys.stderr)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def serve(models: Path, network: Network, *options: str) -> Iterator[tuple[str, int]]:
    """Run `shoal serve`; give its address and its pid."""
    port = free_port()
    command = [sys.executable, "-m", "shoal.cli.main", "serve", str(models)]
    command += ["--host", network.host, "--port", str(port), *options]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "SHOAL_INFER_THREADS": "1"}
    process = subprocess.Popen(network.command(command), env=environ, stdout=sys.stderr)
    try:
        yield f"{network.host}:{port}", process.pid
    finally:
        process.terminate()
        process.wait(60)


def made_keys(signer: Signer) -> list[str]:
    now = time.time()
    tenants = [f"tenant-{number % TENANTS:03}" for number in range(KEYS)]
    return [tokens.create_key(signer, tenant=tenant, role="user", now=now).text for tenant in tenants]


def wait_for(peer: Peer, requests: Requests) -> None:
    """Return when the server has answered rightly."""
    deadline = time.monotonic() + _READY_S
    while True:
        with contextlib.suppress(OSError):
            if uvloop.run(peer.load(requests).closed(1, 0.1, 0.0)).good:
                return
        if time.monotonic() > deadline:
            sys.exit(f"{peer.address} does not answer")
        time.sleep(0.2)


# -- parts


def measure(rows: Sequence[tuple[Row, Timed, Any]], rounds: int, how: Mapping[tuple[str, int], Any]) -> None:
    """Measure servers in interleaved rounds. `how` has by load a function of a server and what makes its load."""
    # The first use of a key is not part of it.
    for _, server, make in rows:
        uvloop.run(make().each_key_once(server, 64))
    for number in range(rounds):
        for load, run in how.items():
            for row, server, make in rows if number % 2 else reversed(rows):
                try:
                    count, used = uvloop.run(run(server, make))
                except OSError as err:
                    sys.exit(f"{row.name}: {err}")
                row.loads.setdefault(load, Measured()).add(count, float(used[0]))


def filters(folder: Path, samples: Mapping[str, Sample], arguments: argparse.Namespace, console: Console) -> None:
    requests = Requests.of("tiny", samples["tiny"].inputs, samples["tiny"].outputs)
    models, loopback, signer = folder / "models", Network("127.0.0.1"), tokens.new_signer()
    keys = made_keys(signer)
    with contextlib.ExitStack() as stack:
        rows: list[tuple[Row, Timed, Any]] = []
        for mode, name in ((OPEN, "Shoal, open"), (LIMITED, "Shoal, keys and limits")):
            started = running(models, folder / mode, mode, has_tls=False, precedence=arguments.precedence)
            node = stack.enter_context(started)
            rows.append((Row(name), node, lambda node=node: node.load(requests, node.keys)))
        server = stack.enter_context(triton(write_for_triton(folder, folder / "tiny.onnx"), folder / "t", loopback))
        pid = server.process.pid
        peers = {"Triton alone": Peer(server.grpc, [pid])}
        for name, made in (("Envoy and Triton, open", []), ("Envoy's filters and Triton", filters_by_hand(signer))):
            port = free_port()
            document = envoy_document(port, server.grpc, made)
            front = stack.enter_context(envoy(document, folder / f"envoy-{len(made)}.json"))
            peers[name] = Peer(f"127.0.0.1:{port}", [pid, front], front, keys if made else ())
        for name, peer in peers.items():
            wait_for(peer, requests)
            rows.append((Row(name), peer, lambda peer=peer: peer.load(requests)))
        if arguments.precedence:
            for root in {pid for peer in peers.values() for pid in peer.pids}:
                take_precedence(process_tree(root))
        load = ("tiny", 64)
        measure(rows, arguments.rounds, {load: lambda server, make: closed(server, make(), 64, arguments.seconds)})
    shown = [row for row, _, _ in rows]
    show("A node of Shoal", shown[:2], [load], console)
    show("Envoy in front of Triton", [shown[3], shown[4], shown[2]], [load], console)


def tls(folder: Path, samples: Mapping[str, Sample], arguments: argparse.Namespace, console: Console) -> None:
    requests = Requests.of("tiny", samples["tiny"].inputs, samples["tiny"].outputs)
    models, signer = folder / "models", tokens.new_signer()
    issuer = {"issuer": signer.issuer, "audiences": [tokens.AUDIENCE], "token_prefix": tokens.PREFIX}
    policy = {
        "version": 1,
        "issuers": [{**issuer, "jwks": signer.jwks()}],
        "grants": [{"name": "roles", "models": ["*"]}],
    }
    (folder / "policy.yaml").write_text(json.dumps(policy))
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(namespaces())
        cert, key = folder / "cert.pem", folder / "key.pem"
        made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        made += ["-subj", "/CN=bench", "-addext", f"subjectAltName=IP:{network.host}", "-days", "2"]
        subprocess.run([*made, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
        options = ("--grpc-use-ssl=1", f"--grpc-server-cert={cert}", f"--grpc-server-key={key}")
        repository = write_for_triton(folder / "tls", folder / "tiny.onnx")
        server = stack.enter_context(triton(repository, folder / "triton-tls", network, *options))
        peers = {"Triton": Peer(server.grpc, [server.process.pid], ca=str(cert))}
        pair = ("--tls-cert", str(cert), "--tls-key", str(key))
        ways = {"shoal serve": ("--insecure",), "shoal serve, keys": ("--policy", str(folder / "policy.yaml"))}
        for name, way in ways.items():
            address, pid = stack.enter_context(serve(models, network, *pair, *way))
            peers[name] = Peer(address, [pid], keys=made_keys(signer) if "--policy" in way else (), ca=str(cert))
        with network.client_side():
            for peer in peers.values():
                wait_for(peer, requests)
            rows = [(Row(name), peer, lambda peer=peer: peer.load(requests)) for name, peer in peers.items()]
            loads = {
                ("tiny", 64): lambda server, make: closed(server, make(), 64, arguments.seconds),
                ("tiny, new connections", 8): lambda server, make: one_call_each(server, make, 8, arguments.seconds),
            }
            measure(rows, arguments.rounds, loads)
    show("TLS, from another namespace", [row for row, _, _ in rows], [*loads], console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="filters,tls")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--precedence", action="store_true", help="run before other work of the machine; needs root")
    arguments = parser.parse_args()
    parts = {"filters": filters, "tls": tls}
    chosen = arguments.parts.split(",")
    if not set(chosen) <= set(parts):
        parser.error(f"--parts is of {', '.join(parts)}")
    if len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {0})
    for part in chosen:
        with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
            folder = Path(scratch)
            samples, version = save(folder), folder / "models/tiny/1"
            version.mkdir(parents=True)
            (version / "model.onnx").write_bytes((folder / "tiny.onnx").read_bytes())
            parts[part](folder, samples, arguments, Console(width=150))


if __name__ == "__main__":
    main()
