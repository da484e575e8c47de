"""Prometheus, promtool, Alertmanager and VictoriaMetrics, of the system or of `tools/prometheus.sh`."""

from __future__ import annotations

import shutil
from pathlib import Path

_UNPACKED = Path(__file__).parent.parent / ".prometheus/usr/bin"


def find_binary(name: str) -> str | None:
    """Return the path of a program, such as `promtool`; None where it is not installed."""
    return shutil.which(name) or shutil.which(name, path=str(_UNPACKED))
