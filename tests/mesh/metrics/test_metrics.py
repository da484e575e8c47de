"""Families, histograms, rows of the largest keys, pages and their endpoint."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from mesh.h2.memory_account import MemoryAccount
from mesh.metrics import endpoint, exposition, limits, process
from mesh.metrics.exposition import PageWriter, metrics_endpoint, page
from mesh.metrics.families import LABEL_CHARS, Family, Kind, Reading
from mesh.metrics.histogram import EXEMPLAR_S, Exemplars, Histogram
from mesh.metrics.largest import OTHER, Largest, largest
from mesh.metrics.snapshot import read
from mesh.process.stall_watch import StallWatch

TIMES = Family("shoal.test.duration", Kind.HISTOGRAM, "s", "Times.", ("model",))
CALLS = Family("shoal.test.calls", Kind.COUNTER, "{call}", "Calls.", ("model",))


@pytest.mark.parametrize(
    ("name", "kind", "unit", "expected"),
    [
        ("process.cpu.time", Kind.COUNTER, "s", "process_cpu_time_seconds_total"),
        ("process.memory.usage", Kind.GAUGE, "By", "process_memory_usage_bytes"),
        ("system.memory.utilization", Kind.GAUGE, "1", "system_memory_utilization_ratio"),
        ("shoal.hits", Kind.COUNTER, "1", "shoal_hits_total"),
        ("shoal.calls", Kind.COUNTER, "{call}", "shoal_calls_total"),
    ],
)
def test_prometheus_names_follow_from_those_of_opentelemetry(name: str, kind: Kind, unit: str, expected: str) -> None:
    body, _ = page([(Family(name, kind, unit, "Help."), (), 1)])
    assert f"\n{expected} 1.0\n" in body.decode()


def test_both_forms_have_the_same_values() -> None:
    times = Histogram()
    times.add(0.02, 3)
    readings: list[Reading] = [(TIMES, ('a"{ \n\x85',), times.read()), (CALLS, ("m" * 1000,), 2)]
    plain, openmetrics = PageWriter(), PageWriter(is_openmetrics=True)
    for reading in readings:
        plain.add(reading)
        openmetrics.add(reading)
    text, text_type = plain.page()
    other, other_type = openmetrics.page()
    assert (text_type, other_type) == (exposition.TEXT, exposition.OPENMETRICS_1)
    for families in (list(parse_text(text.decode())), list(parse_openmetrics(other.decode()))):
        [bounds] = [
            {sample.labels["le"]: sample.value for sample in family.samples if "le" in sample.labels}
            for family in families
            if family.type == "histogram"
        ]
        assert (bounds["0.01"], bounds["0.025"], bounds["+Inf"]) == (0, 3, 3)
        samples = {sample.name: sample for family in families for sample in family.samples if "le" not in sample.labels}
        assert samples["shoal_test_duration_seconds_count"].value == 3
        assert samples["shoal_test_duration_seconds_count"].labels == {"model": 'a"{ \n\x85'}
        assert samples["shoal_test_calls_total"].labels == {"model": "m" * LABEL_CHARS}


def test_a_bucket_has_one_exemplar_a_minute_and_only_in_openmetrics() -> None:
    times, exemplars = Histogram(), Exemplars()
    for at_s, trace_id in ((100.0, 1), (100.0 + EXEMPLAR_S - 1, 2), (100.0 + EXEMPLAR_S, 3), (161.0, 4)):
        times.add(0.02)
        exemplars.add(0.02, trace_id, 7, at_s)
    times.add(99.0)
    exemplars.add(99.0, 5, 7, 161.5)
    plain, openmetrics = PageWriter(), PageWriter(is_openmetrics=True)
    for writer in (plain, openmetrics):
        writer.add((TIMES, ("m",), times.read(exemplars.read())))
    assert b"trace_id" not in plain.page()[0]
    [family] = parse_openmetrics(openmetrics.page()[0].decode())
    found = {sample.labels["le"]: sample.exemplar for sample in family.samples if sample.exemplar}
    assert {le: (each.value, float(each.timestamp), each.labels) for le, each in found.items()} == {
        "0.025": (0.02, 160.0, {"trace_id": f"{3:032x}", "span_id": f"{7:016x}"}),
        "+Inf": (99.0, 161.5, {"trace_id": f"{5:032x}", "span_id": f"{7:016x}"}),
    }


def test_the_largest_keys_have_rows_and_all_others_share_one() -> None:
    rows = Largest(1, size=3)
    for n in range(3):
        rows.row(f"small-{n}")[0] += 1
    for _ in range(10):
        rows.row("large")[0] += 1
    assert dict(rows.rows())[OTHER] == [10]
    rows.settle()
    for _ in range(10):
        rows.row("large")[0] += 1
    found = dict(rows.rows())
    assert found["large"] == [10]
    assert len(found) == 4


def test_amounts_beyond_the_largest_are_one_sum() -> None:
    amounts = [("a", 1), ("b", 5), ("a", 3), (OTHER, 2), ("c", 3), ("d" * 1_000, 9)]
    assert largest(amounts, size=2) == [("d" * LABEL_CHARS, 9), ("b", 5), (OTHER, 9)]
    assert largest([("a", 1)], size=2) == [("a", 1)]
    assert largest([]) == []


@pytest.mark.parametrize(("keys", "events"), [(100, 1), (1_000, 3)])
def test_keys_that_change_all_the_time_renew_no_rows(keys: int, events: int) -> None:
    rows = Largest(1)
    for scrape in range(5):
        for n in range(keys):
            for _ in range(events):
                rows.row(f"{scrape}-{n}")[0] += 1
        rows.settle()
    assert {key for key, _ in rows.rows()} == {f"0-{n}" for n in range(50)} | {OTHER}
    for n in range(keys):
        rows.row(f"5-{n}")[0] += 1
        rows.row("large")[0] += 1
    rows.settle()
    assert "large" in dict(rows.rows())


def test_ten_thousand_tenants_take_the_memory_and_the_series_of_fifty() -> None:
    rows = Largest(2)
    tracemalloc.start()
    for n in range(10_000):
        rows.row(f"{n:05d}" * 2_000)[0] += 1
    rows.settle()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(list(rows.rows())) == 51
    assert sum(row[0] for _, row in rows.rows()) == 10_000
    assert used < 64 << 10


async def test_a_page_of_500_models_and_10000_tenants_leaves_the_loop_a_turn_every_5_ms() -> None:
    tenants, writer, turns, looks = Largest(2), PageWriter(), 0, 0
    for n in range(10_000):
        tenants.row(f"tenant-{n}")[0] += 1

    def models() -> Iterable[Reading]:
        for n in range(500):
            for _ in range(20):
                yield CALLS, (f"model-{n}",), 1
            for _ in range(4):
                yield TIMES, (f"model-{n}",), Histogram().read()

    def of_tenants() -> Iterable[Reading]:
        tenants.settle()
        for tenant, (requests, _) in tenants.rows():
            yield CALLS, (tenant,), requests

    def clock() -> float:
        # A millisecond between two looks: five looks, and the one that begins the next piece.
        nonlocal looks
        looks += 1
        return looks / 1_000

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    await read([models, of_tenants], writer.add, clock)
    task.cancel()
    readings = 500 * 24 + 51
    assert turns >= readings // 32 // 6
    assert writer.page()[0].count(b"\n") == 4 + 500 * (20 + 4 * 18) + 51


async def test_a_page_is_made_once_a_second_whoever_asks(tmp_path: Path) -> None:
    made = 0

    def readings() -> Iterable[Reading]:
        nonlocal made
        made += 1
        yield CALLS, ("m",), made

    async with metrics_endpoint(f"unix:{tmp_path}/m.sock", [readings]):
        before = asyncio.get_running_loop().time()
        answers = await asyncio.gather(*(get(tmp_path / "m.sock") for _ in range(20)))
        took_s = asyncio.get_running_loop().time() - before
    assert {status for status, _ in answers} == {200}
    assert made <= 1 + took_s / exposition.KEPT_S


async def get(path: Path, target: str = "/metrics", method: str = "GET", headers: str = "") -> tuple[int, bytes]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(f"{method} {target} HTTP/1.1\r\nhost: x\r\n{headers}connection: close\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body


async def test_the_endpoint_takes_reads_of_its_page_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    holders = [lambda: [("acme", 3)], lambda: [("acme", 4), ("", 1)]]
    source = process.source("1.2.3", StallWatch(), {"requests": MemoryAccount(7)}, holders)
    async with metrics_endpoint(f"unix:{path}", [source]):
        status, body = await get(path)
        assert status == 200
        found = {family.name: family for family in parse_text(body.decode())}
        assert found["process_memory_usage_bytes"].samples[0].value > 1 << 20
        assert found["shoal_connection_memory_limit_bytes"].samples[0].value == 7
        held = {
            sample.labels["tenant"]: sample.value for sample in found["shoal_connection_memory_tenant_bytes"].samples
        }
        assert held == {"acme": 7, "": 1}
        # No limit has refused a call.
        without = {limits.REFUSED}
        assert [*found] == [family.prometheus for family in process.FAMILIES if family not in without]
        status, body = await get(path, headers="accept: application/openmetrics-text\r\n")
        assert body.endswith(b"# EOF\n")
        assert (await get(path, "/other"))[0] == 404
        assert (await get(path, method="POST"))[0] == 405
        assert (await get(path, headers="content-length: 3\r\n"))[0] == 400
        assert (await get(path, headers="upgrade: websocket\r\nconnection: upgrade\r\n"))[0] == 400
        assert (await get(path, "x:1", method="CONNECT"))[0] == 400
        assert (await get(path, headers=f"x: {'y' * endpoint.HEAD_BYTES}\r\n"))[0] == 431


async def test_a_page_that_nobody_reads_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "WRITE_S", 0.2)
    path = tmp_path / "m.sock"

    async def large(request: endpoint.Request) -> endpoint.Response:
        return endpoint.Response(200, "text/plain", bytes(16 << 20))

    async with endpoint.Endpoint(f"unix:{path}", {"/": large}):
        reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 10)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(1)
        assert len(await reader.read()) < 16 << 20
        writer.close()


async def test_a_page_of_the_browser_cannot_read_a_loopback_port_under_another_name() -> None:
    async with metrics_endpoint("127.0.0.1:0", []) as served:
        host, _, port = served.address.rpartition(":")
        for name, status in (("localhost", b"200"), (f"{host}:{port}", b"200"), ("evil.example", b"403")):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /metrics HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n\r\n".encode())
            assert (await reader.read()).split()[1] == status
            writer.close()


async def test_connections_beyond_the_bound_are_closed_and_leave_room_again(tmp_path: Path) -> None:
    path = str(tmp_path / "m.sock")
    async with metrics_endpoint(f"unix:{path}", []):
        held = [await asyncio.open_unix_connection(path) for _ in range(endpoint.CONNECTIONS)]
        # Each is being served once it has had an answer.
        for reader, writer in held:
            writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
        reader, _ = await asyncio.open_unix_connection(path)
        assert await reader.read() == b""
        for _, writer in held:
            writer.close()
        async with asyncio.timeout(30):
            while True:
                try:
                    if (await get(Path(path)))[0] == 200:
                        break
                except (IndexError, OSError):
                    await asyncio.sleep(0.01)
