"""Messages with their headers in one piece, for brokers that know no headers.

{"headers": {"shoal-job-id": "01J...", ...}, "key": "k", "value": "as it is"}      texts
{"headers": {...}, "value_base64": "/9j/4AAQ..."}                                  what is no UTF-8
"""

from __future__ import annotations

import base64
import json

from services.ingest.connectors.message import Outgoing


def packed(message: Outgoing) -> bytes:
    """One JSON object of all of it."""
    document: dict[str, object] = {"headers": {name: _text(value) for name, value in message.headers}}
    if message.key is not None:
        document |= _said("key", message.key)
    document |= _said("value", message.value)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _said(name: str, value: bytes) -> dict[str, str]:
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value).decode()}


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
