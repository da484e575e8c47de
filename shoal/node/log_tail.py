"""End of a process's log, shortened for a person."""

from __future__ import annotations

import os
from pathlib import Path

from shoal.node.logs import parse

_READ_BYTES = 64 << 10
_LINE_CHARS = 300


def last_lines(log: Path, count: int = 8) -> list[str]:
    """Return the last `count` lines of `log` that are not empty; structured ones as `LEVEL message (error)`.

    A log that cannot be read has no lines.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _READ_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return [_shortened(_plain(line)) for line in lines[-count:]]


def _plain(line: str) -> str:
    entry = parse(line, "")
    return line if entry is None else f"{entry.level} {entry.summary}"


def _shortened(line: str) -> str:
    return line if len(line) <= _LINE_CHARS else line[: _LINE_CHARS - 1] + "…"
