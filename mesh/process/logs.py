"""Structured logs: one JSON object a line on standard error, with the ids of the current trace and span.

    log.warning("lost the registration: %(error)s", {"event": "registration.lost", "error": err})

{"time": "2026-11-24T16:00:00.123Z", "level": "WARNING", "logger": "mesh.cluster.membership", "message": "lost the ...",
 "instance": "node-a/store-0", "event": "registration.lost", "error": "...", "trace_id": "...", "span_id": "..."}

Every call at INFO and above has an event and its values by name; docs/logs.md lists them all.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

from opentelemetry import trace


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON. The event and its values, the mapping of the call, become keys."""

    def __init__(self, instance: str) -> None:
        super().__init__()
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        entry: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "instance": self._instance,
        }
        if isinstance(record.args, Mapping):
            entry |= {key: value for key, value in record.args.items() if key not in entry}
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            entry["trace_id"] = trace.format_trace_id(context.trace_id)
            entry["span_id"] = trace.format_span_id(context.span_id)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry, default=str, ensure_ascii=False)


def configure(instance: str, level: str) -> None:
    """Write every log record of this process to standard error as JSON. Called once, by `__main__`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(instance))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # These libraries log at INFO what their exceptions report anyway.
    for name in ("pymongo", "aetcd", "opentelemetry"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    # At DEBUG, gRPC names the event loop once a call.
    logging.getLogger("grpc._cython.cygrpc").setLevel(max(logging.INFO, root.level))
