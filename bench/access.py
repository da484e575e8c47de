"""Cost of authenticated calls through a node's gateway, beside open ones: `shoal up --auth` and `shoal up`.

    python bench/access.py [--parts calls,streams,tls,policy,limits] [--rounds 5] [--seconds 1]
    python bench/access.py --precedence --parts goal --modes open,named,authenticated,limited --rounds 9

goal      tiny with 64 in flight: each call has the next of 1,000 keys
calls     tiny with 64 and 1 in flight, mlp, bodies of 50 KB: each call has the next of 1,000 keys; "one key": all calls
          have the same. "first use": 1,000 calls, each the first of its key since the policy was applied.
streams   messages of one ModelStreamInfer
tls       64 connections in plaintext and with TLS; a new connection for each call (a full handshake)
policy    time until a change of the policy is in force, and memory by keys and grants
limits    tiny with 64 in flight, with no limit of requests, one (per tenant), and four that apply to each caller (two
          per key, so 1,000 buckets each); no call is refused

Modes of the parts that compare nodes: "open"; "named", open calls that name the hundred tenants in turn;
"authenticated"; and "limited", with limits per tenant of requests a second, counted by Envoy, and of requests in
flight, counted by infer. Refusals are audited in both.

The policy has 100 tenants and 200 grants. The time of the gateway (Envoy) and of the services (infer, coord, store,
ingest) counts, not that of etcd and MongoDB. Nodes run on processor 0 with one thread for models, the generator on
the other processors. While a node is measured, the processes of the others are stopped (SIGSTOP). The generator sends
whole headers with each call, so a token's 600 bytes, too. Rounds interleave the nodes; ratios are those of rounds.

Predicted: Envoy's whole chain of filters was seen at 68 us a call beside a bare 33 (with h2load). With about 100 us
for an open call, that is a ratio of 1.3 for tiny with 64 in flight, 1.1 with 1 in flight and for mlp. A first use adds
the check of a signature, 90 to 180 us. A policy is in force in 0.1 s. The goal is 1.3 with 64 in flight.
A limit of requests adds 10 us of Envoy, as a prototype took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import ssl
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
import onnx
import uvloop
from fronts import show
from infer import Measured
from infer_models import ROWS, Sample, save
from oip_load import Count, Load, Requests
from push import cpu_s
from rich.console import Console
from rich.table import Table
from siege.servers import here, node, resident_mib

from shoal.client import AsyncClient
from shoal.inference.v2 import inference_pb2 as oip
from shoal.node.processes import free_port

KEYS, TENANTS, GRANTS = 1_000, 100, 200
OPEN, NAMED, AUTHENTICATED, LIMITED = MODES = ("open", "named", "authenticated", "limited")
_WITH_KEYS = (AUTHENTICATED, LIMITED)
_ROLE = "caller"
_CHANGES = 10
# A policy has at most 1,000, with the one of administrators.
_MOST_GRANTS = 999
_SERVICE = "/inference.GRPCInferenceService"
_WARM_UP_S = 0.4
# Keys that are made at a time.
_AT_A_TIME = 16


@dataclass
class Node:
    """A running node."""

    address: str
    admin: str
    pids: Mapping[str, int]
    key: str
    """Of its user; empty: the node is open."""
    ca: str | None
    """File of the CA; None: plaintext."""
    keys: list[str] = field(default_factory=list)
    tenants: Sequence[str] = ()
    """Tenants that calls without a key name, in turn."""
    limits: Sequence[Mapping[str, Any]] = ()
    """Limits of its policy."""

    @property
    def envoy(self) -> int:
        return self.pids["envoy"]

    def cpu_s(self) -> np.ndarray:
        """Return the processor time so far: of the services with Envoy, and of Envoy."""
        services = (pid for name, pid in self.pids.items() if "-" in name)
        envoy = cpu_s(self.envoy)
        return np.array([envoy + sum(map(cpu_s, services)), envoy])

    def client(self) -> AsyncClient:
        return AsyncClient(("https://" if self.ca else "") + self.address, token=self.key, ca=self.ca)

    def load(self, requests: Requests, keys: Sequence[str]) -> KeyedLoad:
        tls = tls_of(self.ca) if self.ca else None
        return KeyedLoad(self.address, requests, keys=keys, tenants=self.tenants, tls=tls)

    async def set_up(self) -> None:
        """Apply the policy, and make the keys of the callers."""
        async with self.client() as client:
            await client.access.apply(document(GRANTS, limits=self.limits))
            places = asyncio.Semaphore(_AT_A_TIME)

            async def made(number: int) -> str:
                async with places:
                    return (await client.access.create_key(tenant=_tenant(number), role=_ROLE)).key

            self.keys = list(await asyncio.gather(*(made(number) for number in range(KEYS))))


def tls_of(ca: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    return context


def _tenant(number: int) -> str:
    return f"tenant-{number % TENANTS:03}"


def document(
    grants: int,
    groups: Sequence[str] = ("read", "infer"),
    clock_skew_s: int = 60,
    limits: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return a policy with so many grants for the tenants, and one for administrators. JSON is YAML, too."""
    issuer = {"issuer": "shoal", "audiences": ["shoal"], "token_prefix": "shoal_", "cluster": True}
    # Each tenant has grants of both kinds.
    models = (["tiny*", "mlp"], ["wide", "ocr*", "det*"])
    made = [
        {
            "name": f"grant-{number:04}",
            "tenants": [_tenant(number)],
            "roles": [_ROLE],
            "models": models[number // TENANTS % 2],
        }
        for number in range(grants)
    ]
    return json.dumps(
        {
            "version": 1,
            "issuers": [{**issuer, "clock_skew_s": clock_skew_s}],
            "roles": {_ROLE: list(groups)},
            "grants": [{"name": "admin", "roles": ["admin"], "models": ["*"]}, *made],
            "limits": [*limits],
        }
    )


# -- loads

Result = tuple[Count, np.ndarray]
"""Counts, and the processor time of `Timed.cpu_s` meanwhile."""


class Timed(Protocol):
    """A server whose processor time is read."""

    def cpu_s(self) -> np.ndarray:
        """Return the processor time so far: of all that counts, and of Envoy."""


class KeyedLoad(Load):
    """A closed loop of a number of calls, or with a connection for each call, beside the one of a duration."""

    _left = 0
    _answered: asyncio.Event | None = None

    def answered(self, number: int, sent: float, status: int, body: bytes) -> None:
        super().answered(number, sent, status, body)
        if self._answered is not None:
            self._left -= 1
            self.is_over = self._next >= KEYS
            if not self._left:
                self._answered.set()

    async def each_key_once(self, node: Timed, in_flight: int) -> Result:
        """Make KEYS calls."""
        self._is_counted, self._left, self._answered = True, KEYS, asyncio.Event()
        connections = await self.connect(8)
        before, began = node.cpu_s(), time.perf_counter()
        for n in range(in_flight):
            connections[n % len(connections)].ask()
        await self._answered.wait()
        self.count.seconds = time.perf_counter() - began
        for connection in connections:
            connection.close()
        return self.count, node.cpu_s() - before


async def closed(node: Timed, load: KeyedLoad, in_flight: int, seconds: float, connections: int = 0) -> Result:
    before: list[np.ndarray] = []
    asyncio.get_running_loop().call_later(_WARM_UP_S, lambda: before.append(node.cpu_s()))
    count = await load.closed(in_flight, seconds, _WARM_UP_S, connections)
    return count, node.cpu_s() - before[0]


async def one_call_each(node: Timed, make: Callable[[], KeyedLoad], in_flight: int, seconds: float) -> Result:
    """Run a closed loop in which each call has a connection of its own."""
    total, before, began = Count(), node.cpu_s(), time.perf_counter()

    async def caller() -> None:
        load = make()
        load.is_closed_loop, load._is_counted = False, True
        while time.perf_counter() - began < seconds:
            opened = time.perf_counter()
            load._left, load._answered = 1, asyncio.Event()
            [connection] = await load.connect(1)
            connection.ask()
            await load._answered.wait()
            connection.close()
            total.latencies_s.append(time.perf_counter() - opened)
        total.good += load.count.good
        total.wrong += load.count.wrong
        for status, count in load.count.by_status.items():
            total.by_status[status] = total.by_status.get(status, 0) + count

    await asyncio.gather(*(caller() for _ in range(in_flight)))
    total.seconds = time.perf_counter() - began
    return total, node.cpu_s() - before


async def stream(node: Node, requests: Requests, keys: Sequence[str], in_flight: int, seconds: float) -> Result:
    """Run a closed loop of messages on one ModelStreamInfer. Any failure or wrong answer counts as wrong."""
    count, sent, number = Count(), list[tuple[int, float]](), 0
    async with grpc.aio.insecure_channel(node.address) as channel:
        call: Any = channel.stream_stream(f"{_SERVICE}/ModelStreamInfer")(metadata=_metadata(keys))

        async def ask() -> None:
            nonlocal number
            sent.append((number % ROWS, time.perf_counter()))
            await call.write(requests.bodies[number % ROWS][5:])
            number += 1

        async def exchange(until: float) -> None:
            while time.perf_counter() < until:
                answer = oip.ModelStreamInferResponse.FromString(await call.read())
                row, at = sent.pop(0)
                framed = bytes(5) + answer.infer_response.SerializeToString()
                if answer.error_message or not requests.is_right(row, framed):
                    count.wrong += 1
                else:
                    count.good += 1
                count.latencies_s.append(time.perf_counter() - at)
                await ask()

        for _ in range(in_flight):
            await ask()
        await exchange(time.perf_counter() + _WARM_UP_S)
        count.good, before, began = 0, node.cpu_s(), time.perf_counter()
        count.latencies_s.clear()
        await exchange(began + seconds)
        count.seconds = time.perf_counter() - began
        used = node.cpu_s() - before
        call.cancel()
    return count, used


def _metadata(keys: Sequence[str]) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {keys[0]}")] if keys else []


@contextlib.contextmanager
def alone(node: Node, nodes: Iterable[Node]) -> Iterator[None]:
    """Stop the processes of all other nodes meanwhile. What they do by themselves took a third of the processor."""
    others = {pid for other in nodes for pid in other.pids.values()} - set(node.pids.values())
    try:
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


# -- cases


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    title: str
    in_flight: int
    model: str = "tiny"
    kind: str = "closed"
    keys: int = KEYS
    connections: int = 0
    has_tls: bool = False


PARTS: dict[str, Sequence[Case]] = {
    "calls": (
        Case("tiny, first use of a key", 64, kind="first use"),
        Case("tiny", 64),
        Case("tiny, one key", 64, keys=1),
        Case("tiny", 1),
        Case("mlp", 64, "mlp"),
        Case("50 KB", 64, "wide"),
    ),
    "streams": (Case("tiny, messages of one stream", 64, kind="stream", keys=1),),
    "tls": (
        Case("tiny, 64 connections", 64, connections=64),
        Case("tiny, 64 connections, TLS", 64, connections=64, has_tls=True),
        Case("tiny, new connections", 8, kind="new connections"),
        Case("tiny, new connections, TLS", 8, kind="new connections", has_tls=True),
    ),
    "policy": (),
    "limits": (),
    "goal": (Case("tiny", 64),),
}
_DEFAULT_PARTS = ("calls", "streams", "tls", "policy", "limits")


async def run(case: Case, node: Node, requests: Requests, seconds: float) -> Result:
    keys = node.keys[: case.keys]
    if case.kind == "stream":
        return await stream(node, requests, keys, case.in_flight, seconds)
    if case.kind == "new connections":
        return await one_call_each(node, lambda: node.load(requests, keys), case.in_flight, seconds)
    load = node.load(requests, keys)
    if case.kind == "first use":
        await forget_keys(node)
        return await load.each_key_once(node, case.in_flight)
    return await closed(node, load, case.in_flight, seconds, case.connections)


async def forget_keys(node: Node) -> None:
    """Apply another policy, with which Envoy and the services forget verified keys and decisions."""
    if node.key:
        async with node.client() as client:
            shown = json.loads((await client.access.policy()).document)
            skew = 121 - int(shown["issuers"][0]["clock_skew_s"])
            await client.access.apply(document(GRANTS, clock_skew_s=skew, limits=node.limits))
    await asyncio.sleep(0.5)


@dataclass
class Row:
    """A kind of node, with its measurements by case."""

    name: str
    loads: dict[tuple[str, int], Measured] = field(default_factory=dict)


def measure(
    nodes: Mapping[tuple[str, bool], Node], cases: Sequence[Case], samples: Mapping[str, Sample], arguments: Any
) -> None:
    """Run all cases in interleaved rounds, and print the tables."""
    requests = {name: Requests.of(name, each.inputs, each.outputs) for name, each in samples.items()}
    modes = arguments.modes
    whole, envoy = ([Row(mode) for mode in modes] for _ in range(2))
    for number in range(arguments.rounds):
        for case in cases:
            for place in range(len(modes)) if number % 2 else reversed(range(len(modes))):
                node = nodes[modes[place], case.has_tls]
                with alone(node, nodes.values()):
                    count, used = uvloop.run(run(case, node, requests[case.model], arguments.seconds))
                for rows, seconds in zip((whole, envoy), used, strict=True):
                    rows[place].loads.setdefault((case.title, case.in_flight), Measured()).add(count, float(seconds))
    loads = [(case.title, case.in_flight) for case in cases]
    console = Console(width=150)
    show("Envoy and services", whole, loads, console)
    show("Envoy alone", envoy, loads, console)


# -- limits

_MANY: Mapping[str, Any] = {"roles": [_ROLE], "requests_per_second": 1_000_000}
_OF_GOAL: Mapping[str, Any] = {"name": "a", **_MANY, "requests_in_flight": 1_000}
LIMITS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "no limit": (),
    "one, per tenant": ({"name": "a", **_MANY},),
    "four": [{"name": name, "per": per, **_MANY} for name, per in zip("abcd", ("tenant", "key") * 2, strict=True)],
}


def measure_limits(node: Node, requests: Requests, arguments: Any) -> None:
    """Run the calls with each number of limits in interleaved rounds, and print the tables."""
    whole, envoy = ([Row(name) for name in LIMITS] for _ in range(2))
    case = Case("tiny", 64)
    for number in range(arguments.rounds):
        for place in range(len(LIMITS)) if number % 2 else reversed(range(len(LIMITS))):
            uvloop.run(apply_limits(node, requests, [*LIMITS.values()][place]))
            count, used = uvloop.run(run(case, node, requests, arguments.seconds))
            for rows, seconds in zip((whole, envoy), used, strict=True):
                rows[place].loads.setdefault((case.title, case.in_flight), Measured()).add(count, float(seconds))
    console = Console(width=150)
    show("Envoy and services", whole, [(case.title, case.in_flight)], console)
    show("Envoy alone", envoy, [(case.title, case.in_flight)], console)


async def apply_limits(node: Node, requests: Requests, limits: Sequence[Mapping[str, Any]]) -> None:
    async with node.client() as client:
        await client.access.apply(document(GRANTS, limits=limits))
    # Then every key has its buckets, and coord has measured their demand.
    await node.load(requests, node.keys).each_key_once(node, 64)
    await asyncio.sleep(1.5)


# -- policy


async def in_force_ms(node: Node, requests: Requests) -> tuple[list[float], list[float]]:
    """Return the ms from the start of `apply` until the first call that Envoy refuses, and those until its end."""
    refused, returned = list[float](), list[float]()
    async with node.client() as client, grpc.aio.insecure_channel(node.address) as channel:
        call: Any = channel.unary_unary(f"{_SERVICE}/ModelInfer")

        async def until(is_refused: bool) -> float:
            while True:
                text = ""
                try:
                    await call(requests.bodies[0][5:], metadata=_metadata(node.keys))
                except grpc.aio.AioRpcError as err:
                    text = err.details() or ""
                if ("RBAC" in text) if is_refused else not text:
                    return time.perf_counter()

        for _ in range(_CHANGES):
            await until(is_refused=False)
            waiting = asyncio.create_task(until(is_refused=True))
            began = time.perf_counter()
            await client.access.apply(document(GRANTS, ["read"]))
            returned.append(1e3 * (time.perf_counter() - began))
            refused.append(1e3 * (await waiting - began))
            await client.access.apply(document(GRANTS))
        await until(is_refused=False)
    return refused, returned


def allocated_mb(node: Node) -> float:
    """Return the memory that Envoy has allocated."""
    with urllib.request.urlopen(f"http://{node.admin}/memory", timeout=10) as answer:
        return int(json.load(answer)["allocated"]) / 2**20


def show_policy(node: Node, requests: Requests) -> None:
    """Measure changes and memory, and print them."""
    table = Table("change of a policy, ms", "median", "worst", title=f"{_CHANGES} changes, {GRANTS} grants")
    refused, returned = uvloop.run(in_force_ms(node, requests))
    for name, values in (("until Envoy refuses", refused), ("until `apply` returns", returned)):
        table.add_row(name, f"{statistics.median(values):.0f}", f"{max(values):.0f}")
    console = Console(width=120)
    console.print(table)
    table = Table("memory", "Envoy allocated, MB", "Envoy resident, MB", "infer resident, MB")

    def note(name: str) -> None:
        # Freed configurations are counted for a moment.
        time.sleep(2)
        resident = (resident_mib(pid) for pid in (node.envoy, node.pids["infer-0"]))
        table.add_row(name, f"{allocated_mb(node):.2f}", *(f"{size:.1f}" for size in resident))

    async def apply(grants: int) -> None:
        async with node.client() as client:
            await client.access.apply(document(grants))

    uvloop.run(forget_keys(node))
    note(f"{GRANTS} grants, no key used")
    uvloop.run(node.load(requests, node.keys).each_key_once(node, 64))
    note(f"{GRANTS} grants, {KEYS:,} keys used")
    uvloop.run(apply(_MOST_GRANTS))
    uvloop.run(node.load(requests, node.keys).each_key_once(node, 64))
    note(f"{_MOST_GRANTS:,} grants, {KEYS:,} keys used")
    console.print(table)


# -- nodes


@contextlib.contextmanager
def running(models: Path, folder: Path, mode: str, *, has_tls: bool, precedence: bool) -> Iterator[Node]:
    folder.mkdir()
    options = ["--auth"] if mode in _WITH_KEYS else []
    if has_tls:
        options += ["--listen", f"127.0.0.1:{free_port()}", "--tls", "auto"]
    with node(here(), models, folder, *options) as server:
        if precedence:
            server.take_precedence()
        ready = json.loads((folder / "ready.json").read_text())
        key = Path(ready["key_file"]).read_text().strip() if ready["key_file"] else ""
        started = Node(
            ready["gateway"],
            ready["admin"],
            ready["pids"],
            key,
            ready["tls"] and ready["tls"]["ca"],
            limits=(_OF_GOAL,) if mode == LIMITED else (),
        )
        if key:
            uvloop.run(started.set_up())
        yield started


def save_wide(folder: Path) -> Sample:
    """Write a model with an input of 50 KB and little work: the first four numbers."""
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    ends = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in (("s", [0]), ("e", [4]), ("a", [1]))]
    graph = make.make_graph(
        [make.make_node("Slice", ["input", "s", "e", "a"], ["output"])],
        "wide",
        [make.make_tensor_value_info("input", kind, ["N", 12_800])],
        [make.make_tensor_value_info("output", kind, ["N", 4])],
        ends,
    )
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), folder / "wide.onnx")
    inputs = np.random.default_rng(7).standard_normal((ROWS, 12_800)).astype(np.float32)
    return Sample("wide", inputs, inputs[:, :4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(_DEFAULT_PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--modes", default=f"{OPEN},{AUTHENTICATED}", help=f"of {', '.join(MODES)}; the first is 1.00")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--precedence", action="store_true", help="run before other work of the machine; needs root")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts is of {', '.join(PARTS)}")
    arguments.modes = arguments.modes.split(",")
    if not set(arguments.modes) <= set(MODES) or (NAMED in arguments.modes and OPEN not in arguments.modes):
        parser.error(f"--modes is of {', '.join(MODES)}; {NAMED} needs {OPEN}")
    if AUTHENTICATED not in arguments.modes and not {"policy", "limits"}.isdisjoint(parts):
        parser.error(f"the parts policy and limits need the mode {AUTHENTICATED}")
    if len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {0})
    with tempfile.TemporaryDirectory(prefix="shoal-bench-access-") as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        samples, models = {**save(folder), "wide": save_wide(folder)}, folder / "models"
        for name in {case.model for cases in PARTS.values() for case in cases}:
            version = models / name / "1"
            version.mkdir(parents=True)
            (folder / f"{name}.onnx").rename(version / "model.onnx")
        nodes = {
            (mode, has_tls): stack.enter_context(
                running(models, folder / f"{mode}-{has_tls}", mode, has_tls=has_tls, precedence=arguments.precedence)
            )
            for has_tls in ((False, True) if "tls" in parts else (False,))
            for mode in arguments.modes
            if mode != NAMED
        }
        if NAMED in arguments.modes:
            tenants = [_tenant(number) for number in range(TENANTS)]
            nodes |= {
                (NAMED, tls): replace(node, tenants=tenants) for (mode, tls), node in nodes.items() if mode == OPEN
            }
        cases = [case for part in parts for case in PARTS[part]]
        if cases:
            measure(nodes, cases, samples, arguments)
        tiny = Requests.of("tiny", samples["tiny"].inputs, samples["tiny"].outputs)
        if "policy" in parts:
            show_policy(nodes[AUTHENTICATED, False], tiny)
        if "limits" in parts:
            measure_limits(nodes[AUTHENTICATED, False], tiny, arguments)


if __name__ == "__main__":
    main()
