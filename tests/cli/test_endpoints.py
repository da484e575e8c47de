"""Envoy's `/clusters?format=json`, as `shoal status` reads it."""

from __future__ import annotations

from typing import Any

from shoal.cli.endpoints import of_document


def host(**stats: int) -> dict[str, Any]:
    return {
        "address": {"pipe": {"path": "/run/a.sock"}},
        "stats": [{"name": name, "value": str(value)} for name, value in stats.items()],
        "health_status": {"eds_health_status": "HEALTHY"},
    }


def test_a_connection_that_failed_is_no_request_that_failed() -> None:
    document = {
        "cluster_statuses": [
            {"name": "ads", "host_statuses": [host(rq_total=1, rq_active=1, rq_error=19, cx_connect_fail=19)]},
            {"name": "store", "host_statuses": [host(rq_total=9, rq_error=2)]},
        ]
    }
    ads, store = of_document(document)
    assert (ads.total_requests, ads.active_requests, ads.failed_requests) == (1, 1, 0)
    assert (store.total_requests, store.failed_requests) == (9, 2)
    assert (ads.address, ads.healthy) == ("unix:/run/a.sock", True)


def test_what_gets_no_traffic_says_why() -> None:
    away = host() | {"health_status": {"eds_health_status": "DRAINING", "failed_outlier_check": True}}
    [endpoint] = of_document({"cluster_statuses": [{"name": "infer", "host_statuses": [away]}]})
    assert (endpoint.healthy, endpoint.health) == (False, "draining, failed outlier check")
