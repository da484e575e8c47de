"""Two checkouts of `shoal serve` side by side, and Triton: on loopback, and from another network namespace.

    python bench/fronts.py --before FOLDER [--after FOLDER] [--triton COMMAND] [--rounds 5] [--starts 5] [--seconds 1.5]
    python bench/fronts.py --before FOLDER --loopback --loads tiny@1,tiny@64 --rounds 20
    python bench/fronts.py --before FOLDER --namespace --loads tiny@1,tiny@64 --rounds 20
    python bench/fronts.py --before . --metrics --loopback --loads tiny@64 --rounds 20 --starts 1

loopback     both checkouts with `--host 127.0.0.1`
namespace    both checkouts, and Triton, at one end of a veth pair, with the clients at the other end. Both ends are in
             namespaces of this run. Each checkout uses its default front for that address.

With --loopback or --namespace only that one. Needs root, for the namespaces. Each checkout has its own .venv. With
--metrics the second checkout has `--metrics-port`, and its page is read once a second meanwhile: with one checkout as
both, the ratio is what metrics cost.

A shell runs COMMAND, which starts a Triton with the models tiny, mlp and cnn at $HOST:$PORT; $MODELS is the folder of
their ONNX files. Servers run on processor 0 with one thread for the model, the generator on the other processors.
Rounds interleave the servers; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import uvloop
from infer import ROOT, Measured, Server, answers, loaded, process_tree
from infer_models import Sample, save
from oip_load import Requests
from rich.console import Console
from rich.table import Table

from shoal.node.processes import free_port

Load = tuple[str, int]
"""A model, and the number of calls in flight."""

LOADS: tuple[Load, ...] = tuple((model, in_flight) for model in ("tiny", "mlp", "cnn") for in_flight in (1, 8, 64))
SERVER_IP, CLIENT_IP = "10.77.31.1", "10.77.31.2"
_CLONE_NEWNET = 0x4000_0000
_READY_S = 60.0
_SCRAPED_EVERY_S = 1.0
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Network:
    """Network namespaces of servers and clients; None is the namespace of this process."""

    host: str
    servers: str | None = None
    clients: str | None = None

    @contextlib.contextmanager
    def client_side(self) -> Iterator[None]:
        """Open the sockets of the block in the clients' namespace."""
        if self.clients is None:
            yield
            return
        with open("/proc/self/ns/net") as home, open(f"/run/netns/{self.clients}") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def command(self, command: Sequence[str]) -> list[str]:
        """Return `command` as run on processor 0 in the servers' namespace."""
        inside = ["ip", "netns", "exec", self.servers] if self.servers else []
        return [*inside, "taskset", "-c", "0", *command]


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@contextlib.contextmanager
def namespaces() -> Iterator[Network]:
    """Create two namespaces with a veth pair between them, for the duration of the block."""
    servers, clients = (f"shoal-bench-{side}-{os.getpid()}" for side in ("s", "c"))
    ends = {servers: (f"sbs{os.getpid()}", SERVER_IP), clients: (f"sbc{os.getpid()}", CLIENT_IP)}
    try:
        for name in ends:
            _ip("netns", "add", name)
        (one, _), (other, _) = ends.values()
        _ip("link", "add", one, "netns", servers, "type", "veth", "peer", "name", other, "netns", clients)
        for name, (link, address) in ends.items():
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for up in (link, "lo"):
                _ip("-n", name, "link", "set", up, "up")
        yield Network(SERVER_IP, servers, clients)
    finally:
        for name in ends:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@dataclass
class Contender:
    """Server command, with its measurements."""

    name: str
    network: Network
    port: int
    command: Sequence[str]
    environ: dict[str, str]
    folder: Path
    starts_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    pss_mb: list[float] = field(default_factory=list)
    loads: dict[tuple[str, int], Measured] = field(default_factory=dict)
    page: str = ""
    """URL of its metrics; empty: they are not read."""

    @contextlib.contextmanager
    def running(self, sample: Sample) -> Iterator[Server]:
        """Run the server during the block; record the time until the first correct answer, and the memory then."""
        began = time.perf_counter()
        process = subprocess.Popen(
            self.network.command(self.command), env={**os.environ, **self.environ}, cwd=self.folder, stdout=sys.stderr
        )
        server = Server(self.name, f"{self.network.host}:{self.port}", process.pid, process)
        try:
            while not self._answers(server, sample):
                if process.poll() is not None or time.perf_counter() - began > _READY_S:
                    sys.exit(f"{self.name} does not answer (exit {process.poll()})")
                time.sleep(0.005)
            self.starts_s.append(time.perf_counter() - began)
            self.rss_mb.append(server.memory_mb())
            self.pss_mb.append(sum(_pss_mb(pid) for pid in process_tree(process.pid)))
            yield server
        finally:
            process.terminate()
            process.wait(60)

    def _answers(self, server: Server, sample: Sample) -> bool:
        with self.network.client_side():
            return uvloop.run(answers(server, sample))


def _pss_mb(pid: int) -> float:
    """Return the proportional set size of a process, which counts shared pages in parts."""
    with contextlib.suppress(OSError):
        return int(re.findall(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[0]) / 1024
    return 0.0


def shoal(name: str, folder: Path, models: Path, network: Network, *, has_metrics: bool = False) -> Contender:
    """Return the contender `shoal serve` of the checkout `folder`, and with `has_metrics` one with a page of them."""
    port = free_port()
    python = str(folder / ".venv/bin/python")
    command = [python, "-m", "shoal.cli.main", "serve", str(models), "--host", network.host, "--port", str(port)]
    command += [] if network.servers is None else ["--insecure"]
    metrics = free_port() if has_metrics else None
    command += [] if metrics is None else ["--metrics-port", str(metrics)]
    page = "" if metrics is None else f"http://127.0.0.1:{metrics}/metrics"
    # The checkout's modules take precedence, even if its environment was built for another checkout.
    environ = {"PYTHONPATH": str(folder), "SHOAL_INFER_THREADS": "1"}
    return Contender(name, network, port, command, environ, folder, page=page)


@contextlib.contextmanager
def scraped(pages: Sequence[str]) -> Iterator[None]:
    """Read pages of metrics once a second during the block. At its end, raise what a read has raised."""
    is_over = threading.Event()

    def scrape() -> None:
        while not is_over.wait(_SCRAPED_EVERY_S):
            for page in pages:
                with urllib.request.urlopen(page, timeout=_READY_S) as response:
                    response.read()

    with ThreadPoolExecutor(1) as pool:
        scraping = pool.submit(scrape)
        try:
            yield
        finally:
            is_over.set()
        scraping.result()


def triton(command: str, models: Path, network: Network) -> Contender:
    port = free_port()
    environ = {"HOST": network.host, "PORT": str(port), "MODELS": str(models)}
    return Contender("Triton", network, port, ["sh", "-c", f"exec {command}"], environ, models)


def measure(
    contenders: Sequence[Contender], samples: dict[str, Sample], loads: Sequence[Load], rounds: int, seconds: float
) -> None:
    """Load all contenders in interleaved rounds."""
    requests = {name: Requests.of(name, sample.inputs, sample.outputs) for name, sample in samples.items()}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(contender.running(samples["tiny"])) for contender in contenders]
        stack.enter_context(scraped([contender.page for contender in contenders if contender.page]))
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for load in loads:
                for contender, server in zip(contenders, servers, strict=True):
                    with contender.network.client_side():
                        count, cpu_s = uvloop.run(loaded(server, requests[load[0]], load[1], seconds))
                    contender.loads.setdefault(load, Measured()).add(count, cpu_s)


class Row(Protocol):
    """Measurements of a server, a row for each load."""

    name: str
    loads: dict[Load, Measured]


def show(title: str, contenders: Sequence[Row], loads: Sequence[Load], console: Console) -> None:
    table = Table(title=f"{title}: medians; ratios to {contenders[0].name}, least and most", title_justify="left")
    for column in ("model", "in flight", "server", "requests/s", "ratio", "CPU us/request", "ratio", "p99 ms", "wrong"):
        table.add_column(column, justify="left" if column in ("model", "server") else "right")
    for model, in_flight in loads:
        first = contenders[0].loads[model, in_flight]
        for contender in contenders:
            one = contender.loads[model, in_flight]
            table.add_row(
                model,
                str(in_flight),
                contender.name,
                f"{statistics.median(one.rates):,.0f}",
                _ratio(one.rates, first.rates),
                f"{statistics.median(one.cpu_us):,.0f}",
                _ratio(one.cpu_us, first.cpu_us),
                f"{statistics.median(one.p99_ms):.2f}",
                str(one.wrong + one.refused),
            )
        table.add_section()
    console.print(table)


def _ratio(values: Sequence[float], firsts: Sequence[float]) -> str:
    ratios = [value / max(first, 1e-9) for value, first in zip(values, firsts, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def show_starts(contenders: Sequence[Contender], console: Console) -> None:
    table = Table(title="start to the first correct answer, and memory of all processes then", title_justify="left")
    for column in ("server", "start s", "least", "most", "RSS MB", "PSS MB", "starts"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for one in contenders:
        seconds = (statistics.median(one.starts_s), min(one.starts_s), max(one.starts_s))
        memory = (statistics.median(one.rss_mb), statistics.median(one.pss_mb))
        table.add_row(
            f"{one.name} at {one.network.host}",
            *(f"{value:.2f}" for value in seconds),
            *(f"{value:.0f}" for value in memory),
            str(len(one.starts_s)),
        )
    console.print(table)


def _loads(text: str) -> list[Load]:
    """Return the loads of `tiny@1,cnn@64`. Raises ValueError, which argparse reports, when there is no such load."""
    loads = [(model, int(in_flight)) for model, _, in_flight in (part.partition("@") for part in text.split(","))]
    if not set(loads) <= set(LOADS):
        raise ValueError(text)
    return loads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="FOLDER", help="a checkout with its .venv")
    parser.add_argument("--after", type=Path, default=ROOT, metavar="FOLDER", help="another; default: this one")
    parser.add_argument("--triton", metavar="COMMAND", help="starts a Triton at $HOST:$PORT with the models of $MODELS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=5, help="of each server, to measure start and memory")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--loads", type=_loads, default=LOADS, metavar="MODEL@N,...", help="default: all nine")
    parser.add_argument("--metrics", action="store_true", help="the second one has metrics, with --loopback")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--loopback", action="store_true", help="only on loopback")
    only.add_argument("--namespace", action="store_true", help="only from another network namespace")
    args = parser.parse_args()
    if args.metrics and not args.loopback:
        parser.error("--metrics needs --loopback: the page is at 127.0.0.1")
    console = Console(width=140)
    if len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {0})
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        models = Path(scratch)
        samples = save(models)
        networks = {} if args.namespace else {"on loopback": Network("127.0.0.1")}
        if not args.loopback:
            networks["from another namespace"] = elsewhere = stack.enter_context(namespaces())
        groups: dict[str, list[Contender]] = {}
        for title, network in networks.items():
            groups[title] = [
                shoal("before", args.before.resolve(), models, network),
                shoal("after", args.after.resolve(), models, network, has_metrics=args.metrics),
            ]
        if args.triton and not args.loopback:
            groups["from another namespace"].append(triton(args.triton, models, elsewhere))
        contenders = [contender for group in groups.values() for contender in group]
        for _ in range(args.starts):
            for contender in contenders:
                with contender.running(samples["tiny"]):
                    pass
        if args.starts:
            show_starts(contenders, console)
        for title, group in groups.items():
            measure(group, samples, args.loads, args.rounds, args.seconds)
            show(title, group, args.loads, console)


if __name__ == "__main__":
    main()
