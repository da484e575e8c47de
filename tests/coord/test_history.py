"""History of coord: growth of counters, the rings of an hour and their bounds, and the reading of nodes."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from mesh.cluster.membership import Instance, State, encode
from mesh.cluster.mirror import Copy
from mesh.metrics.endpoint import Endpoint, Request, Response
from mesh.rpc.channel import connect
from services.coord.history import EVERY_S, SLOTS, History
from services.coord.rpc import CoordRpc
from services.coord.sampling import SERIES, Sampling
from shoal import rates
from shoal.coord.v1 import coord_pb2 as pb
from shoal.errors import InvalidArgument, Unavailable
from shoal.rates import Change, Counters, Row

BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, math.inf)
HOUR = SLOTS - 1


def model(name: str, requests: int, slow: int = 0, instance: str = "infer-0") -> str:
    """Lines of a model whose requests took up to 1 ms, but the slow ones, which took from 5 to 10 ms."""
    labels = f'service="infer",instance="{instance}",model="{name}",version="1"'
    buckets = "".join(
        f'shoal_infer_request_duration_seconds_bucket{{{labels},le="{le}"}} '
        f"{(0 if le < 0.001 else requests - slow) if le < 0.01 else requests}.0\n"
        for le in BOUNDS
    )
    return (
        f"shoal_infer_model_ready{{{labels}}} 1.0\n"
        f'shoal_infer_requests_total{{{labels},outcome="success"}} {requests}.0\n'
        f'shoal_infer_requests_total{{{labels},outcome="failure"}} 0.0\n{buckets}'
    )


def process(instance: str = "infer-0", *, up: int = 1, restarts: int = 0) -> str:
    labels = f'service="infer",instance="{instance}"'
    return f"shoal_process_up{{{labels}}} {up}.0\nshoal_process_restarts_total{{{labels}}} {restarts}.0\n"


def rate(change: Change | None) -> float:
    assert change is not None
    [row] = rates.models(change)
    return row.rate


def took(*pages: str) -> Change | None:
    """The change of the last of pages that were read second by second."""
    counters = Counters()
    return [counters.take(page, float(at)) for at, page in enumerate(pages)][-1]


def test_a_process_that_starts_again_counts_from_zero_even_when_it_has_counted_further_since() -> None:
    assert rate(took(process() + model("m", 100), process(restarts=1) + model("m", 40))) == 40
    assert rate(took(process() + model("m", 100), process(restarts=1) + model("m", 130))) == 130
    # `shoal serve` does not tell the restarts of its only process.
    assert rate(took(model("m", 100), model("m", 40))) == 40


def test_the_restart_of_one_instance_does_not_count_what_another_one_has_counted() -> None:
    first = process("infer-0") + process("infer-1") + model("m", 1_000) + model("m", 5_000, instance="infer-1")
    then = process("infer-0", restarts=1) + process("infer-1") + model("m", 7) + model("m", 5_003, instance="infer-1")
    assert rate(took(first, then)) == 10


def test_a_process_without_an_answer_is_compared_with_its_last_one() -> None:
    silent = process(up=0) + process("infer-1") + model("m", 9, instance="infer-1")
    whole = process() + model("m", 100) + process("infer-1") + model("m", 9, instance="infer-1")
    assert rate(took(whole, silent)) == 0
    assert rate(took(whole, silent, whole.replace(" 100.0", " 104.0"))) == 4
    # Restarted while it did not answer.
    restarted = silent.replace(process(up=0), process(up=0, restarts=1))
    again = whole.replace(process() + model("m", 100), process(restarts=1) + model("m", 103))
    assert rate(took(whole, restarted, again)) == 103


def test_what_a_process_had_counted_before_it_was_read_for_the_first_time_is_no_rate() -> None:
    assert rate(took(process(up=0) + model("m", 5, instance="infer-1"), process() + model("m", 10**6))) == 0


def test_a_model_that_is_loaded_again_brings_its_counts_along_and_they_are_no_rate() -> None:
    other = process() + model("other", 1)
    loaded = other + model("m", 10**6)
    change = took(loaded, other, loaded)
    assert change is not None
    assert {row.name: row.rate for row in rates.models(change)} == {"m 1": 0.0, "other 1": 0.0}
    # The first requests of a model that is there without any.
    assert rate(took(process() + model("m", 0), process() + model("m", 3))) == 3


def test_percentiles_need_no_buckets_that_have_not_grown() -> None:
    change = took(process() + model("m", 0), process() + model("m", 100, slow=50))
    assert change is not None
    [row] = rates.models(change)
    assert row.p50_ms == pytest.approx(1.0)
    # Of the 50 slow ones, up to 10 ms: 0.98 of the bucket from 5 ms.
    assert row.p99_ms == pytest.approx(9.9)


def test_a_bucket_without_a_number_is_left_out() -> None:
    def page(requests: int) -> str:
        wrong = 'service="infer",instance="infer-0",model="m",version="1",le="wide"'
        return model("m", requests) + f"shoal_infer_request_duration_seconds_bucket{{{wrong}}} {requests}.0\n"

    change = took(process() + page(0), process() + page(100))
    assert change is not None
    [row] = rates.models(change)
    assert row.p50_ms == pytest.approx(0.75)


def test_a_page_of_another_server_is_refused() -> None:
    with pytest.raises(ValueError, match="no metrics"):
        Counters().take("<html>\n<b>hello</b>\n", 0.0)


def test_the_sum_of_two_nodes_has_the_rates_of_both_whatever_the_times_of_their_pages() -> None:
    seen = {}
    for node, seconds in (("a", 5.0), ("b", 10.0)):
        counters = Counters()
        counters.take(process() + model("m", 0), 0.0)
        change = counters.take(process() + model("m", 100), seconds)
        assert change is not None
        seen[node] = change
    assert rate(rates.merged(seen, EVERY_S)) == 30


def rows(names: Iterable[str], rate: float = 1.0, **fields: Any) -> dict[str, list[Row]]:
    return {"model": [Row(name, rate=rate, **fields) for name in names]}


def test_points_are_those_of_the_last_hour() -> None:
    history = History()
    for slot in range(1_000):
        history.add(slot, rows(["m 1"], float(slot), p99_ms=float(slot % 7), errors=0.5))
    points = history.points("model", most=SLOTS)
    assert (points.step_s, points.first, points.end) == (5.0, 280, 1_000)
    assert points.rows["m 1"]["rate"] == [float(slot) for slot in range(280, 1_000)]
    last = history.points("model", seconds=30)
    assert last.rows["m 1"]["rate"] == [994.0, 995.0, 996.0, 997.0, 998.0, 999.0]
    # Means of rates, the greatest of the percentiles, and the share of all requests that failed.
    [mean], [most], [failed] = (
        history.points("model", 30, 1).rows["m 1"][name] for name in ("rate", "p99_ms", "errors")
    )
    assert (mean, most, failed) == (996.5, 5.0, 0.5)
    # Every point but the first has all its slots.
    assert history.points("model", 35, 3).rows["m 1"]["rate"] == [993.0, 995.0, 998.0]


def test_slots_without_figures_are_missing_and_not_zero() -> None:
    history = History()
    history.add(0, rows(["m 1"], 4.0))
    history.add(3, rows(["m 1"], 8.0))
    history.add(4, {})
    found = history.points("model").rows["m 1"]["rate"]
    assert found[0] == 4.0
    assert found[3] == 8.0
    assert [math.isnan(value) for value in found] == [False, True, True, False, True]
    assert history.points("model", most=1).rows["m 1"]["rate"] == [6.0]


def test_a_name_that_is_gone_for_an_hour_is_forgotten() -> None:
    history = History()
    history.add(0, rows(["gone 1"]))
    for slot in range(1, SLOTS):
        history.add(slot, rows(["m 1"]))
    assert set(history.points("model").rows) == {"gone 1", "m 1"}
    history.add(SLOTS, rows(["m 1"]))
    assert set(history.points("model").rows) == {"m 1"}
    assert {name for _, name in history._kept} == {"m 1"}


def test_beyond_the_memory_the_gone_and_the_idle_give_way_to_the_busy() -> None:
    history = History(limit_bytes=4 * 24_000)
    history.add(0, rows(["gone 1", "old 1", "busy 1", "idle 1"]))
    history.add(1, {"model": [Row("old 1"), Row("busy 1", rate=9.0), Row("idle 1")]})
    assert history.left_out == 0
    # An idle one takes the place of the one that is gone, and no other's.
    history.add(
        2, {"model": [Row(f"{name} 1", rate=9.0 * (name == "busy")) for name in ("old", "busy", "idle", "new")]}
    )
    assert (history.left_out, set(history.points("model", 5).rows)) == (0, {"old 1", "busy 1", "idle 1", "new 1"})
    history.add(3, {"model": [Row(f"{name} 1") for name in ("old", "busy", "idle", "new", "late")]})
    assert (history.left_out, set(history.points("model", 5).rows)) == (1, {"old 1", "busy 1", "idle 1", "new 1"})
    # Busy ones take the places of those that have been idle for the longest time; the least busy one gets none.
    late = {"late": 4.0, "later": 3.0, "latest": 2.0, "last": 1.0, "busy": 1.0}
    names = ("old", "busy", "idle", "new", "late", "later", "latest", "last")
    history.add(4, {"model": [Row(f"{name} 1", rate=late.get(name, 0.0)) for name in names]})
    assert history.left_out == 4
    assert set(history.points("model", 5).rows) == {"busy 1", "late 1", "later 1", "latest 1"}


def test_a_response_has_a_bounded_number_of_points() -> None:
    history = History()
    for slot in (0, HOUR):
        history.add(slot, rows(f"model-{number} 1" for number in range(500)))
    points = history.points("model", most=SLOTS)
    assert len(points.rows) == 500
    assert len(points.rows["model-0 1"]["rate"]) * 500 <= 100_000


def busy_page(models: int, instances: int) -> str:
    text = []
    for number in range(instances):
        text.append(process(f"infer-{number}"))
        for each in range(models):
            name, labels = f"a-model-{each:04}", f'service="infer",instance="infer-{number}",model="a-model-{each:04}"'
            text.append(model(name, 1_000 + each, slow=each, instance=f"infer-{number}"))
            text += [
                f'{counter}{{{labels},version="1"}} {each + 1}.0\n'
                for counter in ("nv_inference_count", "nv_inference_exec_count", "shoal_infer_shed_total")
            ]
            text += [
                f'{gauge}{{{labels},version="1"}} 1.0\n'
                for gauge in ("shoal_infer_queue_depth", "shoal_infer_queue_age_seconds")
            ]
    return "".join(text)


@pytest.mark.parametrize(("models", "instances", "whole"), [(500, 2, True), (1_000, 2, False)])
def test_an_hour_of_500_busy_models_takes_32_mib_at_most(models: int, instances: int, whole: bool) -> None:
    first = busy_page(models, instances)
    then = first.replace("1.0\n", "9.0\n")
    many = [Row(f"tenant-{number:03}", rate=1.0) for number in range(102)]
    processes = [Row(f"node-{number:02}/infer-0", rate=1.0) for number in range(50)]
    tracemalloc.start()
    try:
        counters, history = Counters(), History()
        counters.series = SERIES
        counters.take(first, 0.0)
        change = counters.take(then, 5.0)
        assert change is not None
        found = rates.models(rates.merged({"local": change}, EVERY_S))
        for slot in (0, 1, 300, HOUR, HOUR + 1):
            history.add(slot, {"model": found, "tenant": many, "instance": processes})
        del change, found
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept = len(history.points("model").rows)
    print(f"{models} models, {instances} instances: {kept} kept, {size / (1 << 20):.1f} MiB")
    assert (kept == models, history.left_out == 0) == (whole, whole)
    assert size <= 32 << 20


class Cluster:
    """The keys of a cluster with a coord on each node."""

    def __init__(self, **admins: str) -> None:
        instances = [
            Instance("coord", node, "coord-0", "unix:/x", 1, State.READY, 1.0, admin=admin)
            for node, admin in admins.items()
        ]
        entries = {each.key: SimpleNamespace(key=each.key, value=encode(each)) for each in instances}
        self.copy = Copy(entries, 1, False)  # type: ignore[arg-type]


def sampling_of(cluster: Cluster, times: Iterable[float], *, leads: bool = True) -> Sampling:
    at = iter(times)
    election: Any = SimpleNamespace(is_leader=leads)
    now = iter((1_000.0,))
    return Sampling(cluster, election, clock=lambda: next(at), now=lambda: next(now, 1_010.0))  # type: ignore[arg-type]


async def test_each_node_is_asked_once_for_a_slot_and_a_silent_one_is_named() -> None:
    asked = []

    async def metrics(request: Request) -> Response:
        asked.append(request.query)
        return Response(200, "text/plain", (process() + model("m", 100 * len(asked))).encode())

    async with Endpoint("127.0.0.1:0", {"/metrics": metrics}) as served:
        # Nobody listens at port 1.
        history = sampling_of(Cluster(one=served.address, two="127.0.0.1:1"), (0.0, 0.0, 5.0, 10.0, 10.5, 12.0))
        for _ in range(3):
            await history.sample()
        report = await history.report("model", 0.0, 0)
        instances = await history.report("instance", 0.0, 0)
    assert len(asked) == 3
    assert all(query.startswith("node=one&within=2&name[]=") for query in asked)
    assert report.points.rows["m 1"]["rate"] == [20.0, 20.0]
    assert list(instances.points.rows) == ["one/infer-0"]
    assert (report.since, report.until) == (1_000.0, 1_010.0)
    # Two seconds later, by the same clock: it was set back.
    assert (instances.since, instances.until) == (998.0, 1_008.0)
    assert [(node.name, node.is_missing, node.answered_at) for node in report.nodes] == [
        ("one", False, 1_010.0),
        ("two", True, 0.0),
    ]


async def test_a_node_that_is_gone_is_named_for_an_hour() -> None:
    cluster: Any = Cluster(one="127.0.0.1:1", two="127.0.0.1:1")
    history = sampling_of(cluster, (0.0, 0.0, 3_600.0, 3_600.0, 3_605.0, 3_605.0))
    await history.sample()
    cluster.copy = Cluster(two="127.0.0.1:1").copy
    for names in (["one", "two"], ["two"]):
        await history.sample()
        assert [node.name for node in (await history.report("model", 0.0, 0)).nodes] == names


async def test_only_the_leader_answers() -> None:
    with pytest.raises(Unavailable):
        await sampling_of(Cluster(), (0.0,), leads=False).report("model", 0.0, 0)


def test_counters_beyond_the_bound_have_no_rate_and_none_when_there_is_room_again() -> None:
    counters = Counters()
    counters.series = 13
    two = process() + model("a", 100) + model("b", 1_000)
    found = [counters.take(two, 0.0), counters.take(two.replace(" 1000.0", " 1001.0"), 1.0)]
    counters.series = SERIES
    found.append(counters.take(two.replace(" 1000.0", " 1002.0"), 2.0))
    assert [{row.name: row.rate for row in rates.models(change)} for change in found if change is not None] == [
        {"a 1": 0.0, "b 1": 0.0},
        {"a 1": 0.0, "b 1": 0.0},
    ]


def served_by(leader: grpc.aio.Channel | None, history: Sampling, watch: Any = None) -> CoordRpc:
    """Return a coord whose channel to the leader this is; None: it leads."""

    async def get() -> grpc.aio.Channel | None:
        return leader

    unused: Any = None
    channel: Any = SimpleNamespace(get=get)
    return CoordRpc("local/coord-0", unused, unused, unused, watch, leader=channel, sampling=history)


async def test_a_leader_that_does_not_answer_is_named_with_the_reason(tmp_path: Path) -> None:
    ctx: Any = None
    async with connect(f"unix:{tmp_path}/none.sock") as nobody:
        served = served_by(nobody, sampling_of(Cluster(), (0.0,), leads=False))
        with pytest.raises(Unavailable, match=r"^the leading coord does not answer: .*none\.sock"):
            await served.GetHistory(pb.GetHistoryRequest(by="tenant"), ctx)


@pytest.mark.parametrize("forwarded", [False, True])
async def test_models_that_the_caller_may_not_see_are_left_out(forwarded: bool) -> None:
    history = sampling_of(Cluster(), (0.0, 5.0))
    history._history.add(0, rows(["seen 1", "hidden 1"]))
    watch: Any = SimpleNamespace(access=SimpleNamespace(allows=lambda rpc, caller, model: model == "seen"))
    served = served_by(None, history, watch)
    ctx: Any = SimpleNamespace(invocation_metadata=lambda: ())
    found = await served.GetHistory(pb.GetHistoryRequest(forwarded=forwarded), ctx)
    assert [(row.name, list(row.rate)) for row in found.rows] == [("seen 1", [1.0])]
    for wrong in (
        pb.GetHistoryRequest(by="execution"),
        pb.GetHistoryRequest(seconds=-1),
        pb.GetHistoryRequest(seconds=math.nan),
    ):
        with pytest.raises(InvalidArgument):
            await served.GetHistory(wrong, ctx)
