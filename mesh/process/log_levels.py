"""Levels of loggers that differ from the configured one until a time, in a file that `shoal logs --set-level` writes.

    {"levels": [{"process": "infer-0", "logger": "mesh.xds", "level": "DEBUG", "until": 1796083200.0}]}

A process looks at the file once a second. A level therefore needs no call that reaches the process, outlives a restart
of the process, and ends by itself. Those who may write the file may set levels: the node's user. The process's metrics
have the time of the file that it goes by (mesh.metrics.process), which shows that its levels are in force.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from mesh.process.files import write_atomically
from mesh.process.tasks import Background

log = logging.getLogger(__name__)

CHECK_S = 1.0
"""Time between two looks at the file."""


@dataclass(frozen=True)
class TimedLevel:
    """Level of a logger, and of those below it, in a process until a time."""

    process: str
    """`infer-0`"""
    logger: str
    """Empty: every logger that has no level of its own."""
    level: str
    until: float
    """Unix time."""


def read(path: Path) -> list[TimedLevel]:
    """Return the levels in a file; none when there is no file.

    Raises:
        OSError, ValueError: the file cannot be read, or is not of this form.
    """
    try:
        found = json.loads(path.read_text())["levels"]
        return [
            TimedLevel(str(one["process"]), str(one["logger"]), _level(one["level"]), _until(one["until"]))
            for one in found
        ]
    except FileNotFoundError:
        return []
    except (TypeError, KeyError) as err:
        raise ValueError(f"not a file of levels: {err!r}") from err


def _level(name: str) -> str:
    if name not in logging.getLevelNamesMapping():
        raise ValueError(f"{name!r} is no level")
    return name


def _until(at: float) -> float:
    try:
        # A time that has a date: NaN and infinity have none.
        return datetime.fromtimestamp(float(at), UTC).timestamp()
    except OverflowError as err:
        raise ValueError(f"{at!r} is no time") from err


def write(path: Path, levels: Iterable[TimedLevel]) -> None:
    """Replace the file. Raises OSError."""
    write_atomically(path, json.dumps({"levels": [asdict(level) for level in levels]}), is_private=True)


class LogLevels(Background):
    """The levels of this process while the `async with` block runs: those of the file, until their time is over."""

    file_time_s: ClassVar[float] = 0.0
    """Unix time of the file whose levels are in force; 0: there is none. Of the process, as its loggers are."""

    def __init__(self, path: Path, process: str) -> None:
        self._path = path
        self._process = process
        self._seen: tuple[int, int] | None = None
        self._levels: list[TimedLevel] = []
        self._set: dict[str, TimedLevel] = {}
        self._former: dict[str, int] = {}

    async def _run(self) -> None:
        while True:
            self.check(time.time())
            await asyncio.sleep(CHECK_S)

    def check(self, now: float) -> None:
        """Set the levels of time `now`, and the former ones where their time is over."""
        self._read()
        wanted = {one.logger: one for one in self._levels if one.process == self._process and now < one.until}
        for name in self._set.keys() - wanted.keys():
            del self._set[name]
            logging.getLogger(name).setLevel(self._former.pop(name))
            effective = logging.getLevelName(logging.getLogger(name).getEffectiveLevel())
            log.warning(
                "%(target)s is logged from %(threshold)s again",
                {"event": "log_level.restored", "target": name or "everything", "threshold": effective},
            )
        for name, one in wanted.items():
            if self._set.get(name) != one:
                log.warning(
                    "%(target)s is logged from %(threshold)s until %(until)s",
                    {
                        "event": "log_level.set",
                        "target": name or "everything",
                        "threshold": one.level,
                        "until": datetime.fromtimestamp(one.until, UTC).isoformat(timespec="seconds"),
                    },
                )
                logger = logging.getLogger(name)
                self._former.setdefault(name, logger.level)
                logger.setLevel(one.level)
                self._set[name] = one

    def _read(self) -> None:
        """Read the file if it has changed. Levels stay when it cannot be read."""
        try:
            status = os.stat(self._path)
            seen, time_s = (status.st_ino, status.st_mtime_ns), status.st_mtime
        except OSError:
            seen, time_s = None, 0.0
        if seen != self._seen:
            self._seen = seen
            try:
                self._levels = read(self._path)
                LogLevels.file_time_s = time_s
            except (OSError, ValueError) as err:
                log.warning(
                    "%(path)s is ignored: %(error)s",
                    {"event": "log_level.file_ignored", "path": self._path, "error": err},
                )
