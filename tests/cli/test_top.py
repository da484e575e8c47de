"""`shoal top`: figures from two pages of metrics, their order, and the table."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console
from typer.testing import CliRunner

from shoal import rates
from shoal.cli import top
from shoal.cli.figures import ClusterFigures, NodeFigures, parse_since
from shoal.cli.here import admin_here
from shoal.cli.main import app
from shoal.client import History, HistoryNode
from shoal.discovery import pointer_path
from shoal.errors import FailedPrecondition, InvalidArgument, Unavailable, Unimplemented
from shoal.rates import Change, Counters, Row, ordered, percentile


def page(at: float, requests: int, failures: int, slow: int, cpu: float = 0.0) -> str:
    """A page on which `slow` of the successful requests took from 10 to 25 ms, and the others up to 1 ms."""
    labels = 'service="infer",instance="infer-0",model="digits",version="1"'
    fast = requests - failures - slow
    buckets = "".join(
        f'shoal_infer_request_duration_seconds_bucket{{{labels},le="{le}"}} {count}\n'
        for le, count in (("0.001", fast), ("0.01", fast), ("0.025", fast + slow), ("+Inf", fast + slow))
    )
    return (
        "# TYPE shoal_infer_requests_total counter\n"
        f'shoal_infer_requests_total{{{labels},outcome="success"}} {requests - failures}\n'
        f'shoal_infer_requests_total{{{labels},outcome="failure"}} {failures}\n'
        "# TYPE shoal_infer_request_duration_seconds histogram\n"
        f"{buckets}"
        f"nv_inference_count{{{labels}}} {requests * 2}\nnv_inference_exec_count{{{labels}}} {requests // 2}\n"
        f"shoal_infer_model_ready{{{labels}}} 1\n"
        f"shoal_infer_queue_depth{{{labels}}} 7\nshoal_infer_queue_age_seconds{{{labels}}} 0.5\n"
        'shoal_process_up{service="infer",instance="infer-0"} 1\n'
        'shoal_process_up{service="store",instance="store-0"} 0\n'
        f'process_cpu_time_seconds_total{{service="infer",instance="infer-0",mode="user"}} {cpu}\n'
        'process_memory_usage_bytes{service="infer",instance="infer-0"} 1048576\n'
    )


def change(first: str, second: str, seconds: float = 2.0) -> Change:
    counters = Counters()
    assert counters.take(first, 10.0) is None
    found = counters.take(second, 10.0 + seconds)
    assert found is not None
    return found


def test_a_model_s_figures_are_those_between_two_pages() -> None:
    [row] = rates.models(change(page(0, 100, 10, 0), page(0, 300, 20, 95)))
    assert row.name == "digits 1"
    assert (row.rate, row.errors) == (100.0, 0.05)
    # 190 succeeded: 95 within 1 ms, and 95 within 10 to 25 ms.
    assert row.p50_ms == pytest.approx(1.0)
    assert row.p99_ms == pytest.approx(24.7)
    assert (row.batch, row.queue, row.queue_age_s) == (4.0, 7.0, 0.5)


def test_a_process_that_starts_again_counts_from_zero() -> None:
    [row] = rates.models(change(page(0, 1_000, 0, 0), page(0, 50, 0, 0), seconds=1.0))
    assert row.rate == 50.0


def test_an_instance_without_an_answer_is_named() -> None:
    infer, store = rates.instances(change(page(0, 0, 0, 0), page(0, 0, 0, 0, cpu=1.0)))
    assert (infer.name, infer.cpu, infer.memory_bytes) == ("infer-0", 0.5, 1 << 20)
    assert (store.name, store.cpu) == ("store-0 (no answer)", None)


def test_executions_have_their_rate_rows_and_the_time_that_requests_waited() -> None:
    labels = 'service="infer",instance="infer-0",model="digits",version="1"'

    def of(runs: int) -> str:
        buckets = "".join(
            f'shoal_infer_{name}_duration_seconds_bucket{{{labels},le="{le}"}} {count}\n'
            for name, bound in (("compute", "0.001"), ("queue", "0.01"))
            for le, count in ((bound, runs), ("+Inf", runs))
        )
        sizes = f"shoal_infer_batch_size_sum{{{labels}}} {8 * runs}\nshoal_infer_batch_size_count{{{labels}}} {runs}\n"
        return f"shoal_infer_model_ready{{{labels}}} 1\n{buckets}{sizes}"

    [row] = rates.executions(change(of(10), of(110)))
    assert (row.name, row.rate, row.batch) == ("digits 1", 50.0, 8.0)
    assert (row.p50_ms, row.queue_p50_ms) == (pytest.approx(0.5), pytest.approx(5.0))
    assert row.queue_p99_ms == pytest.approx(9.9)


def test_tenants_are_ordered_by_the_memory_of_their_requests() -> None:
    text = "".join(
        f'shoal_connection_memory_tenant_bytes{{service="{service}",instance="{service}-0",tenant="{tenant}"}} {size}\n'
        for service, tenant, size in (("infer", "acme", 3 << 20), ("ingest", "acme", 1 << 20), ("infer", "b", 2 << 20))
    )
    rows = ordered(rates.tenants(change(text, text)), "memory")
    assert [(row.name, row.memory_bytes) for row in rows] == [("acme", 4 << 20), ("b", 2 << 20)]


@pytest.mark.parametrize(
    ("rest_4xx", "rest_5xx", "of_clusters", "refused", "expected"),
    [
        # gRPC: Envoy answers with the HTTP status 200.
        (0, 0, 30, 0, 0.3),
        (0, 0, 0, 20, 0.2),
        # REST: the same errors are in both counts.
        (5, 30, 30, 5, 0.35),
        (5, 10, 30, 0, 0.35),
    ],
)
def test_errors_that_envoy_made_are_counted_for_grpc_too(
    rest_4xx: int, rest_5xx: int, of_clusters: int, refused: int, expected: float
) -> None:
    envoy = 'service="envoy",instance="envoy"'
    gateway = f'{envoy},envoy_http_conn_manager_prefix="gateway"'

    def of(part: int) -> str:
        return (
            f"shoal_process_up{{{envoy}}} 1\n"
            f"envoy_http_downstream_rq_total{{{gateway}}} {100 * part}\n"
            f'envoy_http_downstream_rq_xx{{{gateway},envoy_response_code_class="4"}} {rest_4xx * part}\n'
            f'envoy_http_downstream_rq_xx{{{gateway},envoy_response_code_class="5"}} {rest_5xx * part}\n'
            f'envoy_cluster_upstream_rq_xx{{{envoy},envoy_cluster_name="infer",envoy_response_code_class="5"}} '
            f"{of_clusters * part}\n"
            f"envoy_http_rbac_denied{{{gateway}}} {refused * part}\n"
        )

    [row] = rates.instances(change(of(0), of(1)))
    assert (row.name, row.errors) == ("envoy", pytest.approx(expected))


def test_requests_that_envoy_saw_fail_at_an_instance_are_its_errors() -> None:
    seen = replace(change(page(0, 100, 0, 0), page(0, 200, 0, 0)), calls={"infer-0": (120, 30), "store-0": (0, 0)})
    infer, store = rates.instances(seen)
    assert (infer.errors, store.errors) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("bounds", "share", "expected"),
    [
        ({}, 0.5, None),
        ({1.0: 0, float("inf"): 0}, 0.5, None),
        ({1.0: 10, 2.0: 20, float("inf"): 20}, 0.5, 1.0),
        ({1.0: 10, 2.0: 20, float("inf"): 20}, 0.75, 1.5),
        ({1.0: 10, float("inf"): 20}, 0.99, 1.0),
    ],
)
def test_percentiles_are_interpolated_within_their_bucket(
    bounds: dict[float, float], share: float, expected: float | None
) -> None:
    assert percentile(bounds, share) == expected


def test_rows_are_ordered_by_a_field_and_then_by_name() -> None:
    rows = [Row("b", rate=1.0), Row("a", rate=1.0), Row("c", rate=5.0, p99_ms=3.0)]
    assert [row.name for row in ordered(rows, "rate")] == ["c", "a", "b"]
    assert [row.name for row in ordered(rows, "p99")] == ["c", "a", "b"]
    assert [row.name for row in ordered(rows, "name")] == ["a", "b", "c"]


def test_bars_grow_with_the_rate() -> None:
    assert top.spark([]) == ""
    assert top.spark([0.0, 0.0]) == "▁▁"
    assert top.spark([0.0, 50.0, 100.0]) == "▁▅█"


def test_the_table_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = iter([page(0, 0, 0, 0), *(page(0, 10_000_000 * n, 10, 5, cpu=n) for n in range(1, 12))])
    clock = iter(range(100))
    figures = NodeFigures("127.0.0.1:1")
    state = top._State(figures, "model", "rate")
    monkeypatch.setattr(figures, "_fetch", lambda: (next(shown), float(next(clock)), {}))
    for _ in range(12):
        state.read()
    for view in ("model", "execution", "tenant", "instance"):
        state.by = view
        console = Console(width=200)
        with console.capture() as captured:
            console.print(state.table())
        lines = captured.get().splitlines()
        assert max(map(len, lines)) <= 80
        assert lines[0].startswith(view)
    state.by = "model"
    assert len(state.rows()[0].rates) == 10


@pytest.mark.parametrize("wrong", [("--by", "nothing"), ("--sort", "beauty")])
def test_a_wrong_view_or_order_is_refused(wrong: tuple[str, str]) -> None:
    done = CliRunner().invoke(app, ["top", *wrong])
    assert done.exit_code != 0
    assert "expected" in str(done.exception)


def test_plain_rows_are_json() -> None:
    assert json.loads(json.dumps(top._plain(Row("a", rate=1.0))))["rate"] == 1.0


@pytest.mark.parametrize("address", ["foo bar", "127.0.0.1:0", "127.0.0.1:x"])
def test_an_address_without_metrics_is_named(address: str) -> None:
    done = CliRunner().invoke(app, ["top", "--once", "--admin", address])
    assert isinstance(done.exception, Unavailable)
    assert address in str(done.exception)


def test_a_page_that_waited_for_a_process_has_the_time_at_which_the_others_were_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [7.0]

    def read(address: str, target: str, **more: object) -> str:
        now[0] += 2.0 if "within=2&" in target else 5.0
        return "{}"

    monkeypatch.setattr("shoal.cli.figures.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("shoal.cli.admin_page.read", read)
    assert NodeFigures("127.0.0.1:1")._fetch()[1] == 7.0
    # The page of metrics, and that of Envoy.
    assert now[0] == 7.0 + 2.0 + 5.0


def test_a_malformed_page_is_read_in_linear_time() -> None:
    # A million characters would take hours in quadratic time.
    assert rates.parse(f"a{{{'b' * 1_000_000}}} 1\n").samples == {"a": {(): 1.0}}


def history(nodes: int = 1, **rows: tuple[float, ...]) -> History:
    listed = tuple(HistoryNode(f"n{number}", "127.0.0.1:1", None, number > 0) for number in range(nodes))
    since = datetime(2026, 12, 1, 12, 3, tzinfo=UTC)
    figures = {f"{name} 1": {"rate": rates, "p99_ms": rates} for name, rates in rows.items()}
    return History("local/coord-0", since, since, 5.0, figures, listed, 0)


class Coord:
    """A client whose coord has this history of models, and none of anything else."""

    address = "node-7:8080"

    def __init__(self, of_models: History) -> None:
        self.of_models = of_models

    def history(self, by: str, **asked: float) -> History:
        return self.of_models if by == "model" else replace(self.of_models, rows={})


@pytest.mark.parametrize(("nodes", "expected"), [(1, [0.0, 7.0, 50.0]), (2, [50.0])])
def test_the_rates_before_the_first_page_are_those_of_the_history(
    monkeypatch: pytest.MonkeyPatch, nodes: int, expected: list[float]
) -> None:
    client: Any = Coord(history(nodes, digits=(math.nan, 0.0, 7.0)))
    figures = NodeFigures("127.0.0.1:1", client)
    shown = iter([(page(0, 0, 0, 0), 0.0, {}), (page(0, 100, 0, 0), 2.0, {})])
    monkeypatch.setattr(figures, "_fetch", lambda: next(shown))
    for _ in range(2):
        figures.read("model")
    [row] = figures.rows("model")
    assert row.rates == expected


def test_figures_of_the_history_say_since_when_and_which_nodes_are_missing() -> None:
    client: Any = Coord(history(2, digits=(4.0, math.nan, 8.0), gone=(4.0, 4.0, math.nan)))
    figures = ClusterFigures(client)
    figures.read("model")
    [row] = figures.rows("model")
    assert (row.name, row.rate, row.p99_ms, row.rates) == ("digits 1", 8.0, 8.0, [4.0, 0.0, 8.0])
    began, missing = figures.notes()
    assert "when the history of local/coord-0 began" in began
    assert missing.startswith("node n1 is missing: 127.0.0.1:1 does not answer")
    assert json.loads(json.dumps(figures.past("model")))["rows"]["gone 1"]["rate"] == [4.0, 4.0, None]


@pytest.mark.parametrize(("since_s", "remedy"), [(0.0, "start it with --metrics-port"), (60.0, "leave --since out")])
def test_a_server_has_no_history_and_the_error_says_what_to_do(since_s: float, remedy: str) -> None:
    client: Any = SimpleNamespace(address="127.0.0.1:1", history=Mock(side_effect=Unimplemented("no such method")))
    with pytest.raises(InvalidArgument, match=f"127.0.0.1:1 keeps no history. .*{remedy}"):
        ClusterFigures(client, since_s).read("model")


def test_one_of_several_servers_is_chosen_by_its_gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHOAL_GATEWAY", raising=False)
    for variable in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    for number, pid in enumerate((os.getpid(), os.getppid())):
        document = {"gateway": f"127.0.0.1:{number}", "admin": f"127.0.0.1:90{number}"}
        pointer_path(os.environ, pid, "serve-").write_text(json.dumps(document))
    assert admin_here("127.0.0.1:1", "metrics") == "127.0.0.1:901"
    with pytest.raises(FailedPrecondition, match="2 servers are running") as caught:
        admin_here(None, "metrics")
    assert "127.0.0.1:900 (of 127.0.0.1:0)" in str(caught.value)


@pytest.mark.parametrize("wrong", ["61m", "0m", "soon", "2h"])
def test_a_time_that_the_history_does_not_have_is_refused(wrong: str) -> None:
    assert parse_since("60m") == 3_600
    with pytest.raises(InvalidArgument):
        parse_since(wrong)
