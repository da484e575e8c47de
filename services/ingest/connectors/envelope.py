"""JSON envelope of a message with its headers, for brokers without headers.

{"headers": {"shoal-job-id": "01J...", ...}, "key": "k", "value": "as it is"}      texts
{"headers": {...}, "value_base64": "/9j/4AAQ..."}                                  values that are no UTF-8
"""

from __future__ import annotations

import base64
import json

from services.ingest.connectors.message import Outgoing


def pack(message: Outgoing) -> bytes:
    """Return a message with its key and headers as one JSON object."""
    document: dict[str, object] = {"headers": {name: _text(value) for name, value in message.headers}}
    if message.key is not None:
        document |= _field("key", message.key)
    document |= _field("value", message.value)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _field(name: str, value: bytes) -> dict[str, str]:
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value).decode()}


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
