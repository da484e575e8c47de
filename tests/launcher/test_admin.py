"""The admin address of a node: reads of Envoy's pages and the metrics of all processes; nothing is changed there."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mesh.metrics.endpoint import OPENMETRICS, Endpoint, Request, Response
from mesh.metrics.exposition import metrics_endpoint
from mesh.metrics.families import Family, Kind, Reading
from shoal.node import admin, processes
from shoal.node.admin import ENVOY_PAGES, REDACTED, Scraped, endpoint, envoy_process, merge, node_page, secrets_of
from shoal.node.envoy_bootstrap import bootstrap
from shoal.node.ports import HOST, Ports
from tests.breakable import Process, until
from tests.launcher.test_envoy_bootstrap import Coord

SECRET = 'key-<"4711">'
WRITES = (
    "/quitquitquit",
    "/logging?level=debug",
    "/drain_listeners",
    "/healthcheck/fail",
    "/reset_counters",
    "/runtime_modify?a=b",
    "/config_dump",
    "/stats",
    "/metrics",
)
ELSEWHERE = ("/quitquitquit", "/help", "/logging", "/stats/", "//stats", "/stats/../quitquitquit", "/%71uitquitquit")
JOBS = Family("shoal.test.jobs", Kind.COUNTER, "{job}", "Jobs.", ("tenant",))


async def ask(address: str, method: str, target: str, host: str = "127.0.0.1") -> tuple[int, str]:
    """Return status and body of a request at `unix:/path` or `host:port`."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    else:
        name, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(name, int(port))
    length = "content-length: 0\r\n" if method != "GET" else ""
    writer.write(f"{method} {target} HTTP/1.1\r\nhost: {host}\r\n{length}connection: close\r\n\r\n".encode())
    async with asyncio.timeout(30):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body.decode()


@asynccontextmanager
async def envoy() -> AsyncIterator[tuple[Path, Process]]:
    """Yield the admin socket of a running Envoy, whose configuration has a secret in a header."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    with Ports() as ports:
        gateway, coord, socket = ports.reserve(), folder / "coord-0.sock", folder / "admin.sock"
        text = bootstrap(
            node="n",
            gateway=f"{HOST}:{gateway}",
            outbound=str(folder / "outbound.sock"),
            admin=str(socket),
            coords=[str(coord)],
        )
        document = json.loads(text)
        grpc = document["dynamic_resources"]["ads_config"]["grpc_services"][0]
        grpc["initial_metadata"].append({"key": "authorization", "value": f"Bearer {SECRET}"})
        (folder / "envoy.json").write_text(json.dumps(document))
        spec = processes.envoy(folder / "envoy.json", f"unix:{socket}", 1)
        async with Coord(coord, gateway):
            with Process(spec.argv, folder / "envoy.log") as process:
                await until(spec.ready, "Envoy ready")
                yield socket, process
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.envoy
async def test_operators_read_envoys_pages_and_nobody_writes() -> None:
    async with envoy() as (socket, process), endpoint(f"{HOST}:0", list, socket, [f"Bearer {SECRET}"]) as served:
        directly, address = f"unix:{socket}", served.address
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        levels = await ask(directly, "POST", "/logging")
        for path in ENVOY_PAGES:
            assert (await ask(address, "GET", path))[0] == 200, path
        assert "server.live: 1" in (await ask(address, "GET", "/stats?filter=server.live"))[1]
        assert "cluster_statuses" in (await ask(address, "GET", "/clusters?format=json"))[1]

        for path in WRITES:
            for method in ("POST", "PUT", "DELETE", "OPTIONS"):
                assert (await ask(address, method, path))[0] == 405, (method, path)
        for path in ELSEWHERE:
            status, text = await ask(address, "GET", path)
            assert status == 404, path
            assert "/stats/prometheus" in text
        # Pages whose host name was pointed at this machine.
        for name in ("attacker.example", "attacker.example:9901", "localhost.attacker.example", "127.0.0.1.nip.io"):
            assert (await ask(address, "GET", "/stats", name))[0] == 403, name
        for name in ("localhost", "127.0.0.1", "localhost:9901"):
            assert (await ask(address, "GET", "/ready", name)) == (200, "LIVE\n")

        # The headers of the traces' collector are configuration, too.
        assert "4711" in (await ask(directly, "GET", "/config_dump"))[1]
        for target in ("/config_dump", "/config_dump?include_eds", "/config_dump?resource=bootstrap"):
            status, dump = await ask(address, "GET", target)
            assert "4711" not in dump, target
        assert REDACTED in (await ask(address, "GET", "/config_dump"))[1]

        page = (await ask(address, "GET", "/metrics"))[1]
        assert page == ""
        assert (await node_page([envoy_process(socket, None)])).body.count(b"\nenvoy_server_live{") == 1
        assert process.is_running()
        assert await ask(directly, "POST", "/logging") == levels


def test_the_headers_and_the_password_of_the_collector_are_secrets() -> None:
    assert secrets_of({}) == ()
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://shoal:word@127.0.0.1:4317",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-team=blue",
    }
    assert secrets_of(environ) == ("blue", "Basic c2hvYWw6d29yZA==")


def source(tenant: str) -> Iterable[Reading]:
    yield JOBS, (tenant,), 7


async def test_one_process_that_does_not_answer_fails_no_scrape(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "READ_S", 3.0)
    monkeypatch.setattr(admin, "PAGE_BYTES", 64 << 10)

    async def large(request: Request) -> Response:
        return Response(200, "text/plain", b"shoal_large 1\n" * 10_000)

    async def failing(request: Request) -> Response:
        raise RuntimeError("a fault of a process")

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    def at(name: str) -> str:
        return f"unix:{run_dir}/{name}"

    pages = [Endpoint(at("large"), {"/metrics": large}), Endpoint(at("failing"), {"/metrics": failing})]
    async with AsyncExitStack() as stack:
        for served in (*pages, *(metrics_endpoint(at(name), [lambda: source("acme")]) for name in ("one", "two"))):
            await stack.enter_async_context(served)
        slow = await asyncio.start_unix_server(silent, run_dir / "silent")
        stack.callback(slow.close)
        asked = [Scraped("s", name, run_dir / name) for name in ("one", "dead", "silent", "large", "failing", "two")]
        served = await stack.enter_async_context(endpoint(f"{HOST}:0", lambda: asked, None))
        status, text = await ask(served.address, "GET", "/metrics")
    assert status == 200
    lines = text.splitlines()
    for name in ("one", "two"):
        assert f'shoal_process_up{{service="s",instance="{name}"}} 1.0' in lines
        assert f'shoal_test_jobs_total{{service="s",instance="{name}",tenant="acme"}} 7.0' in lines
    for name in ("dead", "silent", "large", "failing"):
        assert f'shoal_process_up{{service="s",instance="{name}"}} 0.0' in lines
    assert not any(line.startswith("shoal_large") for line in lines)
    assert lines.count("# TYPE shoal_test_jobs_total counter") == 1


async def test_a_reader_names_the_families_and_the_node_that_it_means(run_dir: Path) -> None:
    async with (
        metrics_endpoint(f"unix:{run_dir}/one", [lambda: source("acme")]),
        endpoint(f"{HOST}:0", lambda: [Scraped("s", "one", run_dir / "one")], None, node="mine") as served,
    ):
        both = (await ask(served.address, "GET", "/metrics?node=mine&name[]=shoal_test_*&name[]=shoal_process_up"))[1]
        one = (await ask(served.address, "GET", "/metrics?name[]=shoal_test_jobs_total"))[1]
        alone = (await ask(f"unix:{run_dir}/one", "GET", "/metrics?name[]=shoal_test_other"))[1]
        status, _ = await ask(served.address, "GET", "/metrics?node=other")
    series = 'shoal_test_jobs_total{service="s",instance="one",tenant="acme"} 7.0'
    assert [line for line in both.splitlines() if not line.startswith("#")] == [
        'shoal_process_up{service="s",instance="one"} 1.0',
        series,
    ]
    assert [line for line in one.splitlines() if not line.startswith("#")] == [series]
    assert (alone, status) == ("", 404)


async def test_a_reader_of_openmetrics_names_a_counter_as_its_series(run_dir: Path) -> None:
    async with metrics_endpoint(f"unix:{run_dir}/one", [lambda: source("acme")]):
        asked = "name[]=shoal_test_jobs_total&name[]=shoal_process_restarts_total"
        response = await node_page([Scraped("s", "one", run_dir / "one")], OPENMETRICS, asked)
    assert [line for line in response.body.decode().splitlines() if not line.startswith("# HELP")] == [
        "# TYPE shoal_process_restarts counter",
        'shoal_process_restarts_total{service="s",instance="one"} 0.0',
        "# TYPE shoal_test_jobs counter",
        'shoal_test_jobs_total{service="s",instance="one",tenant="acme"} 7.0',
        "# EOF",
    ]


async def test_a_reader_in_a_hurry_gets_the_others_of_a_process_that_stands_still(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "READ_S", 600.0)
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    async with metrics_endpoint(f"unix:{run_dir}/one", [lambda: source("acme")]):
        slow = await asyncio.start_unix_server(silent, run_dir / "silent")
        both = [Scraped("s", name, run_dir / name) for name in ("one", "silent")]
        # Without `within`, the page would take READ_S.
        async with asyncio.timeout(60):
            text = (await node_page(both, query="within=3")).body.decode()
        slow.close()
    assert asked.is_set()
    assert 'shoal_process_up{service="s",instance="silent"} 0.0' in text
    assert "shoal_test_jobs_total{" in text


async def test_names_that_callers_choose_do_not_break_the_page(run_dir: Path) -> None:
    names = ["a\nb", 'c"d', "e\u2028f", "g\x85h", "i\x0cj", "k\\l", "}"]

    def read() -> Iterable[Reading]:
        for name in names:
            yield JOBS, (name,), 1

    async with metrics_endpoint(f"unix:{run_dir}/one", [read]):
        body = (await node_page([Scraped("s", "one", run_dir / "one")])).body.decode()
    lines = [line for line in body.split("\n") if line.startswith("shoal_test_jobs_total")]
    assert len(lines) == len(names)
    assert all(line.startswith('shoal_test_jobs_total{service="s",instance="one",tenant="') for line in lines)
    assert all(line.endswith('"} 1.0') for line in lines)


async def test_the_page_has_memory_and_processor_time_of_processes_of_other_projects(run_dir: Path) -> None:
    async with metrics_endpoint(f"unix:{run_dir}/one", [lambda: source("acme")]):
        asked = [
            Scraped("s", "one", run_dir / "one", pid=os.getpid()),
            Scraped("etcd", "etcd", None, pid=os.getpid(), restarts=2),
            Scraped("mongod", "mongod", None, pid=None),
            # No process has this id: it is above the kernel's limit.
            Scraped("envoy", "envoy", None, pid=1 << 23),
        ]
        body = (await node_page(asked)).body.decode()
    samples = {
        (sample.name, sample.labels["instance"], sample.labels.get("mode", "")): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }
    assert [samples["shoal_process_up", name, ""] for name in ("one", "etcd", "mongod", "envoy")] == [1, 1, 0, 0]
    assert samples["shoal_process_restarts_total", "etcd", ""] == 2
    for name in ("one", "etcd"):
        assert samples["process_memory_usage_bytes", name, ""] > 1 << 20
        assert samples["process_cpu_time_seconds_total", name, "user"] > 0
    assert not any(
        name == "mongod"
        for _, name, _ in samples.keys()
        - {("shoal_process_up", "mongod", ""), ("shoal_process_restarts_total", "mongod", "")}
    )
    assert body.count("# TYPE process_memory_usage_bytes gauge") == 1


@pytest.mark.parametrize(
    ("line", "labelled"),
    [
        ("a 1", 'a{x="1"} 1'),
        ("a{} 1", 'a{x="1"} 1'),
        ('a{b="c d"} 1', 'a{x="1",b="c d"} 1'),
    ],
)
def test_a_series_gets_the_labels_of_its_process(line: str, labelled: str) -> None:
    assert merge([({"x": "1"}, f"{line}\n")]) == f"{labelled}\n"


def test_a_page_in_openmetrics_keeps_exemplars_and_takes_envoys_counters_as_unknown() -> None:
    labels, rest = 'le="1"', '1.0 # {trace_id="ab"} 0.5 1.000'
    own = f"# HELP a Text.\n# TYPE a histogram\na_bucket{{{labels}}} {rest}\n# EOF\n"
    envoys = "# TYPE envoy_retries counter\nenvoy_retries{} 3\n"
    pages: Sequence[tuple[dict[str, str], str]] = [({"i": "0"}, own), ({"i": "e"}, envoys)]
    assert merge(pages, is_openmetrics=True) == (
        f'# HELP a Text.\n# TYPE a histogram\na_bucket{{i="0",{labels}}} {rest}\n'
        '# TYPE envoy_retries unknown\nenvoy_retries{i="e"} 3\n# EOF\n'
    )


def test_a_family_of_several_processes_is_written_once() -> None:
    page = "# HELP a Text.\n# TYPE a gauge\na 1\n"
    pages: Sequence[tuple[dict[str, str], str]] = [({"i": "0"}, page), ({"i": "1"}, page + "b 2\n")]
    assert merge(pages) == '# HELP a Text.\n# TYPE a gauge\na{i="0"} 1\na{i="1"} 1\nb{i="1"} 2\n'
