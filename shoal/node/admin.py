"""Admin address of a node, for operators and Prometheus: GET only. It has `/metrics`, and Envoy's reading pages.

    /metrics  ──> each service's process, over its own socket; Envoy: chosen statistics ──> one page
              ──> memory and processor time of Envoy, etcd and mongod, of /proc
    /spans    ──> each service's process ──> the kept spans of a trace or a job, or of the latest failed and slow calls
    /clusters, /config_dump ... ──> Envoy's admin socket, which only the node's user can reach

A process that does not answer in time has `shoal_process_up` 0, and the page has the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from mesh.metrics import exposition, page_client
from mesh.metrics import spans as spans_page
from mesh.metrics.endpoint import OPENMETRICS, Endpoint, Handler, Request, Response, text
from mesh.metrics.families import Family, Kind, Reading

ENVOY_PAGES = (
    *("/certs", "/clusters", "/config_dump", "/init_dump", "/listeners", "/memory", "/ready", "/runtime"),
    *("/server_info", "/stats", "/stats/prometheus", "/stats/recentlookups"),
)
"""Pages of Envoy's admin interface that change nothing. Envoy leaves private keys out of them, but no headers."""
_END = "# EOF"
"""Last line of a page in OpenMetrics."""
_DUMPS = ("/config_dump", "/init_dump")
REDACTED = "[redacted]"
FILE_SD = "prometheus.json"
"""File in the data folder that names the node for Prometheus."""
READ_S = 5.0
"""Time in which a process must answer: less than a scrape's default timeout of 10 s."""
_PAGES = 4
"""Pages that are made at a time: one waits for a process that stands still, and must not hold the next ones up."""
PAGE_BYTES = 64 << 20
"""Most bytes of one process's page: 500 models and 10,000 tenants have 3.3 MiB."""
# Requests by code, retries, overflow, ejections, errors of TLS, rejects of configurations, days of certificates.
_OF_ENVOY = "|".join(
    (
        r"^http\.[^.]+\.downstream_(rq_[1-5]xx|rq_active|rq_total|cx_active|cx_total|rq_overload_close|rq_timeout)$",
        r"^http\.[^.]+\.(jwt_authn|rbac|local_rate_limiter|http_local_rate_limit)\..*(denied|allowed|rate_limited)$",
        r"^cluster\.[^.]+\.(upstream_rq_(total|[1-5]xx|active|retry|retry_overflow|pending_overflow|timeout))$",
        r"^cluster\.[^.]+\.(upstream_cx_(active|overflow|connect_fail)|outlier_detection\.ejections_active)$",
        r"^cluster\.[^.]+\.(membership_(healthy|total)|health_check\.failure)$",
        r"^listener\.[^.]+\.(ssl\.(connection_error|handshake|fail_verify_error)|downstream_cx_overflow)$",
        r"(cds|lds|rds\.[^.]+|extension_config_discovery\..*)\.(update_rejected|update_success|update_failure)$",
        r"^server\.(days_until_first_cert_expiring|memory_allocated|memory_heap_size|uptime|live|concurrency)$",
        r"^overload\..*\.(pressure|active)$",
    )
)
UP = Family(
    "shoal.process.up",
    Kind.GAUGE,
    "",
    "1: the process has answered this scrape; 0: it has not.",
    ("service", "instance"),
)
RESTARTS = Family(
    "shoal.process.restarts",
    Kind.COUNTER,
    "{restart}",
    "Starts of a process after its first, since the node's start.",
    ("service", "instance"),
)
FAMILIES = (UP, RESTARTS)


@dataclass(frozen=True, slots=True)
class Scraped:
    """A process of the node whose metrics are read."""

    service: str
    instance: str
    socket: Path | None
    """Socket of its page; None: it has none, as etcd and mongod."""
    target: str = "/metrics"
    restarts: int = 0
    pid: int | None = None
    """Process whose memory and processor time the node reads; None: it does not run, or its own page has them."""


Processes = Callable[[], Sequence[Scraped]]


def envoy_process(socket: Path, pid: int | None, restarts: int = 0) -> Scraped:
    """Return the node's Envoy as a process whose metrics are read, from its admin socket."""
    target = f"/stats/prometheus?filter={quote(_OF_ENVOY, safe='')}"
    return Scraped("envoy", "envoy", socket, target, restarts, pid)


def secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the secrets that Envoy's configuration has from the environment: keys of the traces' collector."""
    if not any(name.startswith("OTEL_EXPORTER_OTLP_") for name in environ):
        return ()
    # Imported here: the SDK takes most of a second to import.
    from mesh.process.telemetry import collector_headers

    return tuple(value for value in collector_headers(environ).values() if value)


def endpoint(
    listen: str, processes: Processes, envoy: Path | None, secrets: Sequence[str] = (), node: str = ""
) -> Endpoint:
    """Return the endpoint of the admin address of a node; `envoy` is the path of Envoy's admin socket.

    `secrets` are left out of Envoy's dumps of its configuration.
    """
    turns = asyncio.Semaphore(_PAGES)

    async def metrics(request: Request) -> Response:
        # A reader that means another node: on each machine, the first one listens at the same port.
        if (asked := parse_qs(request.query).get("node")) is not None and asked != [node]:
            return text(404, f"this is the node {node}")
        async with turns:
            return await node_page(processes(), request.headers.get("accept", ""), request.query)

    async def spans(request: Request) -> Response:
        return await node_spans(processes(), request.query)

    pages: dict[str, Handler] = {"/metrics": metrics, spans_page.PAGE: spans}
    if envoy is not None:

        async def of_envoy(request: Request) -> Response:
            target = request.path + (f"?{request.query}" if request.query else "")
            try:
                response = await fetch(envoy, target, "", READ_S)
                if secrets and request.path in _DUMPS and response.status == 200:
                    return await asyncio.to_thread(_redacted, response, secrets)
                return response
            except (OSError, TimeoutError, ValueError) as err:
                return text(502, f"Envoy does not answer: {err or type(err).__name__}")

        pages |= dict.fromkeys(ENVOY_PAGES, of_envoy)

    async def index(request: Request) -> Response:
        if request.path == "/":
            return text(200, "\n".join(sorted(pages)))
        return text(404, f"there is no {request.path[:255]} here: {', '.join(sorted(pages))}")

    return Endpoint(listen, {**pages, "*": index})


def _redacted(response: Response, secrets: Sequence[str]) -> Response:
    """Return a JSON response without the secrets. Raises ValueError for a body that is no JSON."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for secret in secrets:
                value = value.replace(secret, REDACTED)
            return value
        if isinstance(value, list):
            return [clean(each) for each in value]
        return {key: clean(each) for key, each in value.items()} if isinstance(value, dict) else value

    body = json.dumps(clean(json.loads(response.body)), indent=1).encode()
    return Response(response.status, response.content_type, body)


async def node_page(processes: Sequence[Scraped], accept: str = "", query: str = "") -> Response:
    """Return the page of metrics of these processes, each series with its service and instance.

    The page is in OpenMetrics, which has exemplars, when the header `accept` names it; else in Prometheus' text format.
    The query may name the families, as at the page of one process, and have a shorter time than READ_S for each
    process, in seconds (`within`).
    """
    is_openmetrics = OPENMETRICS in accept
    # Not the reader's own header: Envoy also has a form that is no text.
    accept = OPENMETRICS if is_openmetrics else ""
    within_s = READ_S
    with contextlib.suppress(ValueError):
        within_s = min(READ_S, max(0.1, float(parse_qs(query).get("within", [""])[0])))
    if query:
        # Envoy's own page has another query.
        processes = [
            replace(one, target=f"{one.target}?{query}") if one.target == "/metrics" else one for one in processes
        ]
    pages = await asyncio.gather(*(_page(one, accept, within_s) for one in processes))
    return await asyncio.to_thread(_merged, processes, pages, is_openmetrics, exposition.wanted(query))


def _merged(
    processes: Sequence[Scraped], pages: Sequence[bytes | None], is_openmetrics: bool, wanted: exposition.Wanted | None
) -> Response:
    own: list[Reading] = []
    found: list[tuple[Mapping[str, str], str]] = []
    for one, body in zip(processes, pages, strict=True):
        labels = {"service": one.service, "instance": one.instance}
        resources = b"" if one.pid is None else _resources(one.pid, is_openmetrics)
        own.append((UP, tuple(labels.values()), int(bool(resources) if one.socket is None else body is not None)))
        own.append((RESTARTS, tuple(labels.values()), one.restarts))
        found.extend((labels, text.decode()) for text in (body, resources) if text)
    text, content_type = exposition.page(own, is_openmetrics=is_openmetrics)
    merged = merge([({}, text.decode()), *found], wanted, is_openmetrics=is_openmetrics)
    return Response(200, content_type, merged.encode())


def _resources(pid: int, is_openmetrics: bool) -> bytes:
    """Return memory and processor time of a process as a page of metrics; an empty one when it has ended."""
    from mesh.metrics import process

    try:
        return exposition.page(process.resources(pid), is_openmetrics=is_openmetrics)[0]
    except OSError:
        return b""


async def _page(one: Scraped, accept: str, within_s: float) -> bytes | None:
    """Return the body of a process's page; None when it has none, or does not answer in time, or not with the page."""
    if one.socket is None:
        return None
    with contextlib.suppress(OSError, TimeoutError, ValueError):
        response = await fetch(one.socket, one.target, accept, within_s)
        if response.status == 200:
            return response.body
    return None


async def node_spans(processes: Sequence[Scraped], query: str) -> Response:
    """Return the kept spans that a query asks for, of all processes, and the names of processes without an answer."""
    if spans_page.parsed(query) is None:
        return spans_page.BAD_QUERY
    # Envoy's page is that of its statistics.
    services = [one for one in processes if one.socket is not None and one.target == "/metrics"]
    target = f"{spans_page.PAGE}?{query}"
    found = await asyncio.gather(*(_page(replace(one, target=target), "", READ_S) for one in services))
    document = {
        "spans": [span for body in found if body is not None for span in json.loads(body)],
        "silent": [one.instance for one, body in zip(services, found, strict=True) if body is None],
    }
    return Response(200, "application/json", json.dumps(document).encode())


def merge(
    pages: Iterable[tuple[Mapping[str, str], str]],
    wanted: exposition.Wanted | None = None,
    *,
    is_openmetrics: bool = False,
) -> str:
    """Return pages as one: each wanted family once, each series with the page's labels.

    With `is_openmetrics`, the page is in OpenMetrics. Pages of Envoy, which has Prometheus' text format only, fit in:
    its counters, whose names do not end in `_total`, are of type `unknown` there.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
    for labels, page in pages:
        added = ",".join(f'{name}="{value}"' for name, value in labels.items())
        family, is_wanted = "", True
        # Not splitlines: names of models and tenants may have other characters that end a line for Python.
        for line in page.split("\n"):
            if line == _END:
                continue
            if line.startswith("#"):
                if is_openmetrics and line.startswith("# TYPE envoy_"):
                    line = line.replace(" counter", " unknown")
                parts = line.split(" ", 3)
                if len(parts) > 2:
                    family = parts[2]
                    # In OpenMetrics, the head of a counter has the name of its series without the suffix.
                    named = (family, f"{family}_total") if is_openmetrics else (family,)
                    is_wanted = wanted is None or any(map(wanted, named))
                    if not is_wanted:
                        continue
                    heads, _ = families.setdefault(family, ([], []))
                    if line not in heads and not any(head.startswith(" ".join(parts[:3])) for head in heads):
                        heads.append(line)
            elif line and is_wanted:
                families.setdefault(family, ([], []))[1].append(_labelled(line, added))
    end = [_END] if is_openmetrics else []
    lines = (line for heads, series in families.values() for line in (*heads, *series))
    return "".join(f"{line}\n" for line in (*lines, *end))


def _labelled(line: str, added: str) -> str:
    if not added:
        return line
    name, brace, rest = line.partition("{")
    if brace:
        comma = "" if rest.startswith("}") else ","
        return f"{name}{{{added}{comma}{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{added}}} {value}"


async def fetch(socket: Path, target: str, accept: str, within_s: float) -> Response:
    """Return the response to a GET at a unix socket. `accept` is the header of that name.

    Raises:
        OSError, TimeoutError, ValueError: as `mesh.metrics.page_client.fetch`.
    """
    return await page_client.fetch(f"unix:{socket}", target, accept, timeout_s=within_s, most_bytes=PAGE_BYTES)


def file_sd(address: str, node: str) -> str:
    """Return the document of Prometheus' file_sd_configs that names this node."""
    labels: Mapping[str, str] = {"node": node}
    return json.dumps([{"targets": [address], "labels": labels}], indent=2) + "\n"
