"""rsyslog of the system or of `tools/rsyslog.sh`, with its output for Elasticsearch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

_UNPACKED = Path(__file__).parent.parent / ".rsyslog/usr"
_LIBRARIES = next(iter(_UNPACKED.glob("lib/*-linux-gnu")), None)


def find_rsyslog() -> tuple[Sequence[str], Mapping[str, str]] | None:
    """Return the command and the variables of rsyslogd; None where it, or its output for Elasticsearch, is missing."""
    if _LIBRARIES is not None:
        return (str(_UNPACKED / "sbin/rsyslogd"), "-M", f"{_LIBRARIES}/rsyslog"), {"LD_LIBRARY_PATH": str(_LIBRARIES)}
    found = shutil.which("rsyslogd", path=f"{os.environ.get('PATH')}:/usr/sbin")
    has_output = any(Path("/usr/lib").glob("*-linux-gnu/rsyslog/omelasticsearch.so"))
    return ((found,), {}) if found and has_output else None
