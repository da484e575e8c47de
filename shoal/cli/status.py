"""`shoal status`: overview of a node."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.endpoints import Endpoint, fetch
from shoal.cli.models import show_models
from shoal.cli.output import AsJson, Gateway, connect, console, plain, show, show_json, text
from shoal.discovery import node_of
from shoal.errors import ShoalError
from shoal.node.versions import warnings

if TYPE_CHECKING:
    from shoal.client import Connector, Status

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command()
def status(
    admin: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Admin address of the node. Default: the one of the node, when the node runs on this machine.",
            show_default=False,
        ),
    ] = None,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Show instances, the leader, models, connectors, and Envoy's view of each endpoint.

    Parts that cannot be read are listed as problems; the command fails only when no service responds.

    [bold]Examples[/bold]

      shoal status

      shoal status --json --gateway 127.0.0.1:8080 --admin 127.0.0.1:9901
    """
    with connect(gateway) as client:
        overview = client.status()
    problems = list(overview.problems)
    if overview.stale:
        problems.append("etcd is unreachable: the instances are the last known ones")
    node = node_of(overview.gateway, os.environ)
    versions = {} if node is None else node.versions
    admin = admin or (None if node is None else node.admin)
    endpoints: list[Endpoint] = []
    if admin is None:
        problems.append("Envoy's view is missing: the node runs on another machine, use --admin HOST:PORT")
    else:
        try:
            endpoints = fetch(admin)
        except ShoalError as err:
            problems.append(err.message)
    if json:
        show_json(_document(overview, admin, endpoints, problems, versions))
    else:
        _show(overview, endpoints, problems, versions)


def _document(
    overview: Status, admin: str | None, endpoints: list[Endpoint], problems: list[str], versions: Mapping[str, str]
) -> dict[str, Any]:
    document: dict[str, Any] = plain(overview)
    document["healthy"] = overview.healthy
    document["envoy"] = {"admin": admin, "endpoints": [{**plain(e), "healthy": e.healthy} for e in endpoints]}
    document["problems"] = problems
    document["versions"] = dict(versions)
    document["warnings"] = warnings(versions)
    return document


def _show(overview: Status, endpoints: list[Endpoint], problems: list[str], versions: Mapping[str, str]) -> None:
    out = console()
    leads = (
        f"{overview.leader.instance} (term {overview.leader.fencing_token})" if overview.leader else "none at present"
    )
    out.print(f"gateway {overview.gateway}   leader {leads}", markup=False)
    if versions:
        out.print("   ".join(f"{name} {version}" for name, version in versions.items()), markup=False)
    if overview.master_key:
        policy = f"version {overview.policy_version}" if overview.policy_version else "none is known yet"
        out.print(f"policy {policy}   master key: {overview.master_key}", markup=False, soft_wrap=True)
    instances = [
        (
            instance.service,
            instance.name,
            f"{instance.state} (by an operator)" if instance.drained_by_operator else instance.state,
            instance.pid,
            instance.started_at,
            [f"{name} {'/'.join(map(str, versions))}" for name, versions in sorted(instance.models.items())],
        )
        for instance in overview.instances
    ]
    show(("service", "instance", "state", "pid", "since", "models"), instances, title="instances")
    show_models(list(overview.models), title="models")
    slow = {(model, reason) for instance in overview.instances for model, reason in instance.slow_paths.items()}
    if slow:
        show(("model", "because"), sorted(slow), title="models on the slow path")
    if overview.connectors:
        show(_CONNECTOR_COLUMNS, [_row(connector) for connector in overview.connectors], title="connectors")
    rows = [(e.cluster, e.address, e.health, e.active_requests, e.total_requests, e.failed_requests) for e in endpoints]
    columns = ("cluster", "endpoint", "health", "active", "requests", "failed")
    show(columns, rows, title="endpoints, as Envoy sees them", empty="unknown")
    refused = [(envoy.node, resource.type, resource.nack) for envoy in overview.envoys for resource in envoy.refused]
    if refused:
        show(("Envoy", "resource", "error"), refused, title="configuration that an Envoy rejected")
    for warning in warnings(versions):
        out.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    for problem in problems:
        out.print(f"problem: {problem}", style="yellow", markup=False, soft_wrap=True)


_CONNECTOR_COLUMNS = ("connector", "at", "phase", "from", "to", "answered", "dead", "in flight", "lag", "last error")


def _row(connector: Connector) -> tuple[object, ...]:
    error = f"{text(connector.last_error_at)} {connector.last_error}" if connector.last_error else ""
    return (
        connector.name,
        connector.instance,
        "no reports" if connector.stale else connector.phase,
        connector.source,
        connector.sink or "the store",
        connector.answered,
        connector.dead,
        connector.in_flight,
        _lag(connector),
        error,
    )


def _lag(connector: Connector) -> str:
    if connector.lag is not None:
        return str(connector.lag)
    return "unknown" if connector.lag_ms is None else f"{connector.lag_ms / 1000:.1f} s"
