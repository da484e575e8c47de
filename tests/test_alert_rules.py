"""Alert rules as shipped, run by the real promtool: each fires for its cause alone, and a healthy node fires none."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.prometheus_binaries import find_binary

RULES = Path("deploy/observability/alerts.yml")
MODEL = 'model="digits",version="1",instance="infer-0"'
# Values at each minute, in promtool's notation.
HEALTHY: dict[str, str] = {
    f'shoal_infer_requests_total{{{MODEL},outcome="success"}}': "0+6000x400",
    f'shoal_infer_requests_total{{{MODEL},outcome="failure"}}': "0+1x400",
    f"shoal_infer_requests_within_slo_total{{{MODEL}}}": "0+5990x400",
    f"shoal_infer_slo_seconds{{{MODEL}}}": "0.05x400",
    f"shoal_infer_slo_availability_ratio{{{MODEL}}}": "0.999x400",
    f"shoal_infer_slo_latency_ratio{{{MODEL}}}": "0.99x400",
    f"shoal_infer_expired_rows_executed_total{{{MODEL}}}": "0x400",
    f"shoal_infer_model_ready{{{MODEL}}}": "1x400",
    'up{job="shoal",node="local",instance="127.0.0.1:9901"}': "1x400",
    'shoal_process_up{service="infer",instance="infer-0"}': "1x400",
    'shoal_process_restarts_total{service="infer",instance="infer-0"}': "1x400",
    'shoal_coord_leader{instance="coord-0"}': "0x400",
    'shoal_coord_leader{instance="coord-1"}': "1x400",
    'shoal_coord_view_stale{instance="coord-0"}': "0x400",
    'shoal_coord_envoys{instance="coord-0"}': "1x400",
    'shoal_coord_xds_refused{instance="coord-0",node="local",type="Listener"}': "0x400",
    'shoal_coord_xds_awaited_seconds{instance="coord-0",node="local",type="Listener"}': "0x400",
    'shoal_coord_etcd_alarm{instance="coord-0",alarm="NOSPACE"}': "0x400",
    'shoal_store_mongo_member_up{instance="store-0",member="a:27017"}': "1x400",
    'shoal_store_mongo_oplog_window_seconds{instance="store-0"}': "40x400",
    'shoal_store_mongo_oplog_used{instance="store-0"}': "0.4x400",
    'shoal_ingest_mongo_disk_free_bytes{instance="ingest-0"}': "40000000000x400",
    'shoal_ingest_mongo_disk_reserve_bytes{instance="ingest-0"}': "500000000x400",
    'shoal_store_mongo_clock_ahead_seconds{instance="store-0"}': "-0.02x400",
    'shoal_ingest_mongo_clock_ahead_seconds{instance="ingest-0"}': "0.02x400",
    'shoal_store_retention_stopped{service="store",instance="store-0"}': "0x400",
    'shoal_ingest_retention_stopped{service="ingest",instance="ingest-0"}': "0x400",
    'envoy_server_days_until_first_cert_expiring{instance="envoy"}': "4294967295x400",
    'shoal_event_loop_stalled_seconds_total{instance="infer-0"}': "0+1x400",
    'shoal_connection_memory_bytes{instance="infer-0",kind="requests"}': "100x400",
    'shoal_connection_memory_limit_bytes{instance="infer-0",kind="requests"}': "1000x400",
    'process_open_file_descriptors{instance="infer-0"}': "40x400",
    'process_file_descriptor_limit{instance="infer-0"}': "20000x400",
    'shoal_ingest_queue_oldest_seconds{instance="ingest-0"}': "3x400",
    'shoal_ingest_jobs_ended_total{instance="ingest-0",outcome="failed"}': "0+1x400",
    'shoal_ingest_schedules_failed_total{instance="ingest-0"}': "0x400",
    'shoal_ingest_connector_lag_time_seconds{instance="ingest-0",connector="orders"}': "2x400",
    'shoal_ingest_connector_lag{instance="ingest-0",connector="bills"}': "7x400",
    'shoal_store_audit_failed_total{instance="store-0"}': "0x400",
}
FAILURES = f'shoal_infer_requests_total{{{MODEL},outcome="failure"}}'
SUCCESSES = f'shoal_infer_requests_total{{{MODEL},outcome="success"}}'
WITHIN = f"shoal_infer_requests_within_slo_total{{{MODEL}}}"
# Series whose alerts look at the last six hours.
OF_HOURS = {FAILURES, WITHIN}
GOAL = f"shoal_infer_slo_seconds{{{MODEL}}}"
STALLED = 'shoal_event_loop_stalled_seconds_total{instance="infer-0"}'
# The alerts that fire, and the series that differ from the healthy ones: after 390 minutes for those of hours, else 30.
CAUSES: list[tuple[tuple[str, ...], dict[str, str]]] = [
    # 1 % for six hours: the slow alert. 5 % in the last hour: the fast one.
    (("ShoalErrorsSlow",), {FAILURES: "0+60x400"}),
    (("ShoalErrorsFast",), {FAILURES: "0x325 0+130x70"}),
    (("ShoalErrorsFast", "ShoalErrorsSlow"), {FAILURES: "0+600x400"}),
    # It is over: the short windows are clean again.
    ((), {FAILURES: "0+600x200 120000x200"}),
    # The goal is missed by 10 % of the requests for six hours, by 20 % in the last one, and by 30 % until an hour ago.
    (("ShoalLatencySlow",), {WITHIN: "0+5400x400"}),
    (("ShoalLatencyFast",), {WITHIN: "0+6000x325 1950000+4800x75"}),
    (("ShoalLatencyFast", "ShoalLatencySlow"), {WITHIN: "0+4000x400"}),
    ((), {WITHIN: "0+4200x325 1365000+6000x75"}),
    # A model has got its goal four minutes ago, or lost it 24 minutes ago: its other requests have met none.
    ((), {WITHIN: "_x386 0+5990x14", GOAL: "_x386 0.05x14"}),
    ((), {WITHIN: "0+5990x366 _x34", GOAL: "0.05x366 _x34"}),
    # Few of the few requests of a model.
    ((), {SUCCESSES: "0x380 3x20", FAILURES: "0x385 1x15", WITHIN: "0x380 2x20"}),
    (("ShoalNodeDown",), {'up{job="shoal",node="local",instance="127.0.0.1:9901"}': "1x20 0x20"}),
    (("ShoalExpiredRowsRun",), {f"shoal_infer_expired_rows_executed_total{{{MODEL}}}": "0x27 3x13"}),
    (("ShoalProcessDown",), {'shoal_process_up{service="infer",instance="infer-0"}': "1x20 0x20"}),
    (
        ("ShoalProcessFlapping",),
        {'shoal_process_restarts_total{service="infer",instance="infer-0"}': "1x18 2 3 4 5 6x20"},
    ),
    (("ShoalNoLeader",), {'shoal_coord_leader{instance="coord-1"}': "1x20 0x20"}),
    (("ShoalEtcdUnreachable",), {'shoal_coord_view_stale{instance="coord-0"}': "0x20 1x20"}),
    (("ShoalEnvoyDisconnected",), {'shoal_coord_envoys{instance="coord-0"}': "1x20 0x20"}),
    (
        ("ShoalEnvoyRefuses",),
        {'shoal_coord_xds_refused{instance="coord-0",node="local",type="Listener"}': "0x20 1x20"},
    ),
    (
        ("ShoalEnvoyStale",),
        {'shoal_coord_xds_awaited_seconds{instance="coord-0",node="local",type="Listener"}': "60x40"},
    ),
    (("ShoalEtcdRefusesWrites",), {'shoal_coord_etcd_alarm{instance="coord-0",alarm="NOSPACE"}': "0x20 1x20"}),
    (("ShoalMongoMembersMissing",), {'shoal_store_mongo_member_up{instance="store-0",member="a:27017"}': "1x20 0x20"}),
    (("ShoalOplogShort",), {'shoal_store_mongo_oplog_used{instance="store-0"}': "0.99x40"}),
    (("ShoalDiskNearlyFull",), {'shoal_ingest_mongo_disk_free_bytes{instance="ingest-0"}': "900000000x40"}),
    ((), {'shoal_ingest_mongo_disk_free_bytes{instance="ingest-0"}': "-1x40"}),
    (("ShoalClockOff",), {'shoal_store_mongo_clock_ahead_seconds{instance="store-0"}': "0x20 -3x20"}),
    (("ShoalClockOff",), {'shoal_ingest_mongo_clock_ahead_seconds{instance="ingest-0"}': "0x20 3x20"}),
    (("ShoalRemovalStopped",), {'shoal_store_retention_stopped{service="store",instance="store-0"}': "0x20 1x20"}),
    (("ShoalRemovalStopped",), {'shoal_ingest_retention_stopped{service="ingest",instance="ingest-0"}': "0x20 1x20"}),
    (("ShoalCertificateEnds",), {'envoy_server_days_until_first_cert_expiring{instance="envoy"}': "13x40"}),
    (("ShoalEventLoopStalls",), {STALLED: "0+12x40"}),
    (
        ("ShoalMemoryNearLimit",),
        {'shoal_connection_memory_bytes{instance="infer-0",kind="requests"}': "100x20 950x20"},
    ),
    (("ShoalFilesNearLimit",), {'process_open_file_descriptors{instance="infer-0"}': "17000x40"}),
    (("ShoalModelNotReady",), {f"shoal_infer_model_ready{{{MODEL}}}": "1x20 0x20"}),
    ((), {f"shoal_infer_model_ready{{{MODEL}}}": "1x27 0x13"}),
    (("ShoalQueueOld",), {'shoal_ingest_queue_oldest_seconds{instance="ingest-0"}': "400x40"}),
    (("ShoalJobsFail",), {'shoal_ingest_jobs_ended_total{instance="ingest-0",outcome="failed"}': "0+2x40"}),
    (("ShoalScheduleMissed",), {'shoal_ingest_schedules_failed_total{instance="ingest-0"}': "0x20 1x20"}),
    (
        ("ShoalConnectorLags",),
        {'shoal_ingest_connector_lag_time_seconds{instance="ingest-0",connector="orders"}': "900x40"},
    ),
    (("ShoalConnectorLags",), {'shoal_ingest_connector_lag{instance="ingest-0",connector="bills"}': "50000x40"}),
    (("ShoalAuditNotWritten",), {'shoal_store_audit_failed_total{instance="store-0"}': "0x27 2x13"}),
]


def rules(root: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load((root / RULES).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture
def promtool() -> str:
    found = find_binary("promtool")
    if found is None:
        pytest.skip("needs promtool: run tools/prometheus.sh")
    return found


# By model: failures a minute beside 6,000 successes, successes within the goal, the objectives of availability and of
# latency at each minute, and the alerts of the model.
ERRORS, LATE = ("ShoalErrorsFast", "ShoalErrorsSlow"), ("ShoalLatencyFast", "ShoalLatencySlow")
OBJECTIVES: dict[str, tuple[int, int, str, str, tuple[str, ...]]] = {
    "default-errors": (600, 6000, "0.999x400", "0.99x400", ERRORS),
    "few-nines": (600, 6000, "0.98x400", "0.99x400", ()),
    "changed": (600, 6000, "0.98x388 0.999x11", "0.99x400", ERRORS),
    "many-nines": (2, 6000, "0.99999x400", "0.99x400", ERRORS),
    "default-latency": (0, 4000, "0.999x400", "0.99x400", LATE),
    "loose": (0, 4000, "0.999x400", "0.9x400", ()),
    "strict": (0, 5900, "0.999x400", "0.999x400", LATE),
    # Half of the requests cannot be missed six times as often.
    "half": (9000, 2000, "0.5x400", "0.5x400", ()),
    "nearly-all": (60000, 500, "0.5x400", "0.5x400", (*ERRORS, *LATE)),
    "no-goal": (0, 6000, "0.999x400", "", ()),
}


def run(promtool: str, folder: Path, rules: Path, tests: list[dict[str, Any]]) -> None:
    document = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}
    (folder / "tests.yml").write_text(yaml.safe_dump(document))
    done = subprocess.run([promtool, "test", "rules", str(folder / "tests.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_burn_rates_follow_the_objectives_that_the_policy_states(
    promtool: str, repository_root: Path, tmp_path: Path
) -> None:
    series = []
    for model, (failures, within, availability, latency, _) in OBJECTIVES.items():
        labels = f'model="{model}",version="1",instance="infer-0"'
        for name, values in (
            (f'requests_total{{{labels},outcome="success"}}', "0+6000x400"),
            (f'requests_total{{{labels},outcome="failure"}}', f"0+{failures}x400"),
            (f"requests_within_slo_total{{{labels}}}", f"0+{within}x400"),
            (f"slo_availability_ratio{{{labels}}}", availability),
            (f"slo_latency_ratio{{{labels}}}", latency),
            (f"slo_seconds{{{labels}}}", "0.05x400" if latency else ""),
        ):
            if values:
                series.append({"series": f"shoal_infer_{name}", "values": values})
    expected = [
        {"labels": f'{{alertname="{alert}",model="{model}"}}', "value": 1}
        for model, (*_, alerts) in OBJECTIVES.items()
        for alert in alerts
    ]
    fires = 'count by (alertname, model) (ALERTS{alertstate="firing",alertname=~"ShoalErrors.*|ShoalLatency.*"})'
    test = {
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [{"expr": fires, "eval_time": "390m", "exp_samples": expected}],
    }
    run(promtool, tmp_path, repository_root / RULES, [test])


def test_each_alert_fires_for_its_cause_alone(promtool: str, repository_root: Path, tmp_path: Path) -> None:
    short = [((), {}), *((alerts, changed) for alerts, changed in CAUSES if not OF_HOURS & changed.keys())]
    tests = [
        {
            "interval": "1m",
            "input_series": [
                {"series": name, "values": values.replace("x400", "x40")}
                for name, values in {**HEALTHY, **changed}.items()
            ],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": "30m",
                    "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in alerts],
                }
            ],
        }
        for alerts, changed in short
    ]
    run(promtool, tmp_path, repository_root / RULES, tests)


def test_each_alert_of_hours_fires_for_the_model_that_causes_it_alone(
    promtool: str, repository_root: Path, tmp_path: Path
) -> None:
    # A model for each cause, beside the healthy one: promtool needs seconds for hours, however many models have them.
    causes = [(alerts, changed) for alerts, changed in CAUSES if OF_HOURS & changed.keys()]
    of_models = {name: values for name, values in HEALTHY.items() if MODEL in name}
    series = dict(HEALTHY)
    for number, (_, changed) in enumerate(causes):
        assert all(MODEL in name for name in changed)
        for name, values in {**of_models, **changed}.items():
            series[name.replace('model="digits"', f'model="digits-{number}"')] = values
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname, model) (ALERTS{alertstate="firing"})',
                "eval_time": "390m",
                "exp_samples": [
                    {"labels": f'{{alertname="{alert}",model="digits-{number}"}}', "value": 1}
                    for number, (alerts, _) in enumerate(causes)
                    for alert in alerts
                ],
            }
        ],
    }
    run(promtool, tmp_path, repository_root / RULES, [test])


def test_every_alert_has_a_cause_here_a_command_and_a_line_in_the_docs(repository_root: Path) -> None:
    alerts = {rule["alert"]: rule for rule in rules(repository_root) if "alert" in rule}
    assert alerts.keys() == {name for names, _ in CAUSES for name in names}
    page = (repository_root / "docs/observability.md").read_text()
    for name, rule in alerts.items():
        assert f"| `{name}` |" in page
        assert rule["annotations"]["runbook"].startswith("shoal ")
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_every_alert_is_caused_on_a_real_node(repository_root: Path) -> None:
    files = ("tests/node/test_alerts.py", "tests/node/doctor/test_causes.py")
    text = "".join((repository_root / file).read_text() for file in files)
    caused = re.findall(r'until_(?:notified|alerted)\("(\w+)"', text)
    assert {*caused} == {rule["alert"] for rule in rules(repository_root) if "alert" in rule}


def test_rules_read_only_metrics_that_exist(repository_root: Path) -> None:
    table = (repository_root / "docs/metrics.md").read_text()
    for rule in rules(repository_root):
        for name in re.findall(r"\b(?:shoal|process)_[a-z_]+", rule["expr"]):
            assert f"`{name}`" in table or f"`{name.removesuffix('_total')}`" in table, name
