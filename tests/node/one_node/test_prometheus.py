"""A real Prometheus finds a loaded node by its file, scrapes it without errors, and gets every family."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shoal
from mesh.metrics import limits, process
from mesh.metrics.families import Family, Kind
from services.coord import metrics as coord
from services.infer import metrics as infer
from services.ingest import metrics as ingest
from services.store import metrics as store
from shoal.cli.traced import traced
from shoal.node import admin
from shoal.node.ports import Ports
from tests.breakable import Process, until
from tests.free_ports import free_port
from tests.prometheus_binaries import find_binary
from tools import dashboards

pytestmark = pytest.mark.node

# Without connectors, callers that name a tenant, response caches, streams, jobs that wait, and limits, there are no
# series.
WITHOUT_SERIES = {
    limits.REFUSED,
    *(
        each
        for each in (*process.FAMILIES, *ingest.FAMILIES, *infer.FAMILIES)
        if each.labels in (("connector",), ("tenant",))
    ),
    *(each for each in infer.FAMILIES if re.search(r"[._](cache|first_response)[._]", each.name)),
}
FAMILIES = {
    *(*admin.FAMILIES, *process.FAMILIES, *infer.FAMILIES, *ingest.FAMILIES, *store.FAMILIES, *coord.FAMILIES),
} - WITHOUT_SERIES
OF_ENVOY = (
    "envoy_http_downstream_rq_xx",
    "envoy_cluster_upstream_rq_xx",
    "envoy_cluster_upstream_rq_retry",
    "envoy_cluster_upstream_rq_pending_overflow",
    "envoy_cluster_upstream_rq_active",
    "envoy_cluster_outlier_detection_ejections_active",
    "envoy_cluster_membership_healthy",
    "envoy_listener_manager_lds_update_rejected",
    "envoy_cluster_manager_cds_update_rejected",
    "envoy_server_days_until_first_cert_expiring",
)
GOAL = 'parameters { key: "slo_ms" value { string_value: "30000" } }'
# Names of other projects, which are kept: Envoy's and Triton's break promtool's rules of naming.
FOREIGN = ("envoy_", "nv_")


def tool(name: str) -> str:
    found = find_binary(name)
    if found is None:
        pytest.skip("needs Prometheus: run tools/prometheus.sh")
    return found


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        text: str = response.read().decode()
        return text


@pytest.fixture(scope="module")
def loaded(running: Any, onnx_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The node, after requests and jobs, with a model that has a latency goal."""
    folder = tmp_path_factory.mktemp("models") / "prompt"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(GOAL)
    shutil.copy(onnx_models / "double.onnx", folder / "1/model.onnx")
    with shoal.Client(running.gateway, tenant="acme") as client:
        client.models.push(folder)
        client.infer("prompt", {"x": np.ones((1, 4), np.float32)})
        for _ in range(8):
            client.infer("double", {"x": np.ones((1, 4), np.float32)})
        job = client.jobs.submit("double", {"x": np.ones((1, 4), np.float32)})
        client.jobs.result(job.id)
    # An error over REST, of a service.
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{running.gateway}/v2/models/absent", timeout=30)
    refused.value.close()
    return running


@pytest.fixture(scope="module")
def prometheus(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Prometheus that scrapes the node."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = {
        "global": {"scrape_interval": "5s", "scrape_timeout": "5s"},
        "scrape_configs": [
            {
                "job_name": "shoal",
                "honor_labels": True,
                "file_sd_configs": [{"files": [str(loaded.data_dir / "prometheus.json")]}],
            }
        ],
    }
    # JSON is YAML.
    (folder / "prometheus.yml").write_text(json.dumps(config))
    subprocess.run([tool("promtool"), "check", "config", folder / "prometheus.yml"], check=True, capture_output=True)
    with Ports() as ports:
        address = f"127.0.0.1:{ports.reserve()}"
    argv = [tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    argv.append("--enable-feature=exemplar-storage")
    with Process([*argv, f"--web.listen-address={address}"], folder / "prometheus.log"):
        asyncio.run(until(lambda: bool(target(f"http://{address}")), "Prometheus listens", 60))
        yield f"http://{address}"


def query(url: str, text: str) -> list[Any]:
    document = json.loads(read(f"{url}/api/v1/query?query={urllib.parse.quote(text)}"))
    found: list[Any] = document["data"]["result"]
    return found


def target(url: str) -> dict[str, Any]:
    """Return the state of the one target; empty before its first scrape."""
    try:
        [found] = json.loads(read(f"{url}/api/v1/targets"))["data"]["activeTargets"]
    except (OSError, ValueError):
        return {}
    return dict(found)


def series_of(family: Family) -> str:
    if family.kind is Kind.HISTOGRAM:
        return f"{family.prometheus}_count"
    return family.prometheus + ("_total" if family.kind is Kind.COUNTER and not family.verbatim else "")


def test_prometheus_scrapes_every_family(prometheus: str, loaded: Any) -> None:
    found: dict[str, Any] = {}

    def is_scraped() -> bool:
        found.update(target(prometheus))
        return found.get("health") == "up"

    asyncio.run(until(is_scraped, "a scrape without an error", 60))
    assert found["lastError"] == ""
    assert found["labels"]["node"] == "local"

    def names() -> set[str]:
        return set(json.loads(read(f"{prometheus}/api/v1/label/__name__/values"))["data"])

    def missing() -> set[str]:
        return {series_of(family) for family in FAMILIES} - names()

    # Some are read from MongoDB every few seconds.
    asyncio.run(until(lambda: not missing(), "a series of each family", 60))
    assert set(OF_ENVOY) - names() == set()
    services = {name for name in loaded.pids() if "-" in name}

    def are_up() -> bool:
        up = {each["metric"]["instance"]: each["value"][1] for each in query(prometheus, "shoal_process_up")}
        return up == dict.fromkeys({*services, "envoy", "etcd", "mongod"}, "1")

    # On a busy machine, a process may not answer in the time of a scrape.
    asyncio.run(until(are_up, "every process is up", 60))
    [ended] = query(prometheus, 'sum(shoal_ingest_jobs_ended_total{outcome="succeeded"}) > 0')
    assert ended
    [requests] = query(prometheus, 'sum(shoal_infer_requests_total{model="double"}) >= 9')
    assert requests


def test_an_exemplar_of_a_bucket_leads_to_the_trace_of_a_request(prometheus: str, loaded: Any) -> None:
    begun = time.time()
    with traced(None) as command, shoal.Client(loaded.gateway) as client:
        # Each bucket takes one exemplar a minute, and only this model's requests.
        client.infer("prompt", {"x": np.ones((1, 4), np.float32)})
    trace_id = command.split()[2]
    for name in ("request_duration_seconds", "queue_duration_seconds", "compute_duration_seconds", "batch_size"):
        series = f'shoal_infer_{name}_bucket{{model="prompt"}}'
        found = partial(exemplars, prometheus, series, begun)
        asyncio.run(until(lambda found=found: trace_id in found(), f"the exemplar of {series}", 60))
    assert len(exemplars(prometheus, 'shoal_infer_request_duration_seconds_bucket{model="prompt"}', begun)) == 1
    assert "ModelInfer" in loaded.shoal("trace", trace_id).stdout


def exemplars(url: str, series: str, begun: float) -> list[str]:
    """Return the traces of the exemplars of a series since `begun`."""
    times = f"start={begun - 60}&end={time.time() + 60}"
    document = json.loads(read(f"{url}/api/v1/query_exemplars?query={urllib.parse.quote(series)}&{times}"))
    return [each["labels"]["trace_id"] for one in document["data"] for each in one["exemplars"]]


def test_the_commands_of_the_page_about_observability_do_what_it_says(loaded: Any, tmp_path: Path) -> None:
    page = Path("docs/observability.md").read_text()
    ports = {shipped: str(free_port()) for shipped in ("9090", "9093")}
    unpack, *commands = re.findall(r"```sh\n(.+?)```", page, re.DOTALL)[0].strip().split("\n")
    assert (unpack, len(commands)) == ("tools/prometheus.sh", 4)
    # As in a checkout whose user runs `shoal up`.
    (tmp_path / ".local/share").mkdir(parents=True)
    (tmp_path / ".local/share/shoal").symlink_to(loaded.data_dir)
    shutil.copytree("deploy", tmp_path / "deploy")
    (tmp_path / ".prometheus").mkdir()
    (tmp_path / ".prometheus/usr").symlink_to(Path(tool("prometheus-alertmanager")).parent.parent)
    config = tmp_path / "deploy/observability/prometheus.yml"
    config.write_text(config.read_text().replace("9093", ports["9093"]).replace("15s", "1s"))
    with ExitStack() as stack:
        for number, command in enumerate(commands):
            for shipped, own in ports.items():
                command = command.replace(shipped, own)
            shell = ["sh", "-c", f"cd {tmp_path} && HOME={tmp_path} && {command.removesuffix(' &')}"]
            if command.endswith(" &"):
                # The program in the place of the shell: it is killed at the end.
                shell[2] = shell[2].replace("&& .prometheus", "&& exec .prometheus")
                stack.enter_context(Process(shell, tmp_path / f"{number}.log"))
                continue
            asyncio.run(until(lambda shell=shell: subprocess.run(shell).returncode == 0, command, 60, every_s=0.2))
        url = f"http://127.0.0.1:{ports['9090']}"
        asyncio.run(until(lambda: target(url).get("health") == "up", "Prometheus scrapes the node", 60))
        active = json.loads(read(f"{url}/api/v1/alertmanagers"))["data"]["activeAlertmanagers"]
        assert [each["url"] for each in active] == [f"http://127.0.0.1:{ports['9093']}/api/v2/alerts"]
        found = [rule for group in json.loads(read(f"{url}/api/v1/rules"))["data"]["groups"] for rule in group["rules"]]
        assert "ShoalNoLeader" in {rule["name"] for rule in found}


def test_the_queries_of_the_page_about_observability_have_results(prometheus: str) -> None:
    page = Path("docs/observability.md").read_text()
    queries = re.findall(r"^\| [^|`]+ \| `([^`]+)` \|$", page, re.MULTILINE)
    assert len(queries) == 9
    # No Envoy has refused anything, so the values are 0.
    for each in queries:
        text = each.removesuffix(" > 0")
        # A rate has a value after two scrapes.
        asyncio.run(until(partial(_has_results, prometheus, text), text, 60))


@pytest.mark.parametrize(
    "path", sorted(Path("deploy/observability/dashboards").glob("*.json")), ids=lambda path: path.stem
)
def test_no_panel_of_a_dashboard_is_empty(prometheus: str, path: Path) -> None:
    dashboard = json.loads(path.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert expressions
    for each in expressions:
        text = each.replace(dashboards.RATE, "1m")
        asyncio.run(until(partial(_has_results, prometheus, text), text, 60))


def _has_results(url: str, text: str) -> bool:
    return bool(query(url, text))


def test_promtool_finds_nothing_to_object_to(loaded: Any) -> None:
    page = read(f"http://{loaded.admin}/metrics")
    checked = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=page, capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in checked.stderr.splitlines() if line and not line.startswith(FOREIGN)]
    assert complaints == []


def test_metrics_are_not_at_the_gateway(loaded: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        read(f"http://{loaded.gateway}/metrics")
    assert refused.value.code == 404
