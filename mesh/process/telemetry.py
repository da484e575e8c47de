"""OpenTelemetry: spans are exported when the standard OTEL_* variables name a collector; otherwise a few are kept.

OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) turns the exporter on; OTEL_EXPORTER_OTLP_PROTOCOL selects `grpc`
(default) or `http/protobuf`; OTEL_TRACES_EXPORTER=none and OTEL_SDK_DISABLED=true turn it off. The same variables with
METRICS for TRACES are those of `mesh.metrics.otlp`. OTEL_TRACES_SAMPLER and
OTEL_TRACES_SAMPLER_ARG select the sampled calls. The SDK itself reads the variables for batching and TLS.

The exporter logs its address when a collector cannot be reached, so a password never stays in the address: user and
password become the header `authorization`.
"""

from __future__ import annotations

import base64
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from mesh.process.kept_spans import KeptSpans, OnRequest
from shoal import __version__

LAST_EXPORT_S = 1.0
"""Longest wait of a stop for the collectors to take the last spans and the last metrics, both at once."""
AWAY_S = 0.2
"""The same for a collector that has not taken the export before. A node's services stop one after the other."""


def last_export_s(was_taken: bool) -> float:
    """Return the longest wait for a collector that has taken the export before, or has not."""
    return LAST_EXPORT_S if was_taken else AWAY_S


_USERINFO = re.compile(r"^((?:[A-Za-z][A-Za-z0-9+.-]*://)?)([^/?#]*)@")
"""Scheme, and user and password, of an address that has these."""


def collector(environ: Mapping[str, str], signal: str = "TRACES") -> str | None:
    """Return the OTLP endpoint for TRACES or METRICS without user and password; None when the environment names none.

    With `http/protobuf` it has the path of the signal.
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if environ.get(f"OTEL_{signal}_EXPORTER", "otlp") != "otlp":
        return None
    endpoint = _USERINFO.sub(r"\1", _setting(environ, signal, "ENDPOINT"))
    if protocol(environ, signal) == "http/protobuf" and not environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"):
        endpoint = endpoint and f"{endpoint.rstrip('/')}/v1/{signal.lower()}"
    return endpoint or None


def protocol(environ: Mapping[str, str], signal: str = "TRACES") -> str:
    """Return the protocol of the exporter: `grpc` or `http/protobuf`."""
    return "http/protobuf" if _setting(environ, signal, "PROTOCOL") == "http/protobuf" else "grpc"


def _setting(environ: Mapping[str, str], signal: str, name: str) -> str:
    return environ.get(f"OTEL_EXPORTER_OTLP_{signal}_{name}") or environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""


def resource_of(service: str, instance: str) -> Resource:
    """Return the resource of a process of `service`; `instance` has its node."""
    return Resource.create(
        {"service.name": f"shoal-{service}", "service.instance.id": instance, "service.version": __version__}
    )


def collector_headers(environ: Mapping[str, str], signal: str = "TRACES") -> dict[str, str]:
    """Return the headers of each request to the collector, such as its key, or the user and password of its address."""
    pairs = (pair.partition("=") for pair in _setting(environ, signal, "HEADERS").split(",") if "=" in pair)
    headers = {key.strip().lower(): unquote(value.strip()) for key, _, value in pairs}
    if found := _USERINFO.match(_setting(environ, signal, "ENDPOINT")):
        user, _, password = found[2].partition(":")
        basic = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
        headers.setdefault("authorization", f"Basic {basic}")
    return headers


@dataclass(frozen=True)
class Sampling:
    """Head sampling, configured by OTEL_TRACES_SAMPLER."""

    ratio: float
    """Share of the traces that begin here and are sampled, 0 to 1."""
    follows_parent: bool
    """A call that belongs to a trace is sampled when its caller's span is."""


def sampling_of(environ: Mapping[str, str]) -> Sampling:
    """Return the sampling of the environment; the SDK's defaults replace missing and invalid values."""
    name = environ.get("OTEL_TRACES_SAMPLER", "parentbased_always_on").lower()
    kind = name.removeprefix("parentbased_")
    if kind not in ("always_on", "always_off", "traceidratio"):
        return Sampling(1.0, follows_parent=True)
    ratio = 0.0 if kind == "always_off" else 1.0
    if kind == "traceidratio":
        try:
            argument = float(environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
            ratio = argument if 0 <= argument <= 1 else 1.0
        except ValueError:
            pass
    return Sampling(ratio, follows_parent=name != kind)


@dataclass(frozen=True)
class Exporting:
    """Parts of this process's exporter that make spans without the SDK's tracers (mesh.rpc.fast_spans)."""

    export: Callable[[ReadableSpan], None]
    """Takes a finished, sampled span; never waits."""
    resource: Resource
    sampling: Sampling
    admits: Callable[[], bool] | None = None
    """Returns True when a span may be made for one more sampled call; None: always."""


class _Watched(SpanExporter):
    """An exporter that knows whether the collector has taken the export before."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.is_taken = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        self.is_taken = result is SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _Provider(TracerProvider):
    """Tracer provider that also exposes the export of a finished span, and whose end has a bound."""

    def __init__(
        self, resource: Resource, exporter: SpanExporter, sampling: Sampling, kept: KeptSpans | None = None
    ) -> None:
        super().__init__(resource=resource, shutdown_on_exit=False)
        self._exporter = exporter = _Watched(exporter)
        self._ends_at: float | None = None
        self.kept = kept
        if kept is not None:
            kept.has_all_roots = sampling.ratio >= 1
        processors = [BatchSpanProcessor(exporter), *([kept] if kept is not None else [])]
        for processor in processors:
            self.add_span_processor(processor)

        def export(span: ReadableSpan) -> None:
            for processor in processors:
                processor.on_end(span)

        self.exporting = Exporting(export, resource, sampling)

    def begin_end(self) -> None:
        """Export the spans so far, in a thread. The time of the last export begins."""
        if self._ends_at is None:
            self._ends_at = time.monotonic() + last_export_s(self._exporter.is_taken)
            threading.Thread(target=self.force_flush, daemon=True).start()

    def end(self) -> None:
        """Export all spans, or give up at the end of that time."""
        now, least_s = time.monotonic(), 0.0
        if self._ends_at is None:
            self._ends_at = now + last_export_s(self._exporter.is_taken)
        elif self._exporter.is_taken:
            # For the spans since `begin_end`.
            least_s = AWAY_S
        # In a thread: the processor by itself waits half a minute, and an export over HTTP cannot be interrupted.
        ending = threading.Thread(target=self.shutdown, daemon=True)
        ending.start()
        ending.join(max(self._ends_at - now, least_s))
        if ending.is_alive():
            self._exporter.shutdown()


def begin_last_export() -> None:
    """Begin the last export of spans: it takes its time at once with that of the metrics."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, _Provider):
        provider.begin_end()


def exporting() -> Exporting | None:
    """Return how this process exports or keeps spans; None when it does neither."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, OnRequest):
        kept = provider.kept
        return Exporting(kept.on_end, provider.resource, Sampling(0.0, follows_parent=True), kept.admits)
    return provider.exporting if isinstance(provider, _Provider) else None


def kept_spans() -> KeptSpans | None:
    """Return the spans that this process keeps; None when it keeps none."""
    provider = trace.get_tracer_provider()
    return provider.kept if isinstance(provider, OnRequest | _Provider) else None


def _exporter(environ: Mapping[str, str]) -> SpanExporter:
    endpoint, headers = collector(environ), collector_headers(environ)
    if protocol(environ) == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter(endpoint, headers=headers)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    return GrpcExporter(endpoint, headers=headers)


@contextmanager
def tracing(
    service: str, instance: str, environ: Mapping[str, str] = os.environ, *, keeps: bool = False
) -> Iterator[None]:
    """Export this process's spans as service `shoal-<service>` until the block ends, then flush them.

    With `keeps`, the latest ones are kept in memory, too, and without a collector those of sampled callers; and those
    of calls that fail or are slow, whether sampled or not.
    """
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if collector(environ) is None:
        if keeps and not is_off:
            trace.set_tracer_provider(OnRequest(resource_of(service, instance), KeptSpans(instance=instance)))
        yield
        return
    resource = resource_of(service, instance)
    provider = _Provider(
        resource, _exporter(environ), sampling_of(environ), KeptSpans(instance=instance) if keeps else None
    )
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.end()
