"""Logs of a node's processes as entries: read from the end of each file, merged by time, and followed.

A process logs in its own format: Shoal's services, etcd and mongod write JSON, Envoy a line in brackets. A line that is
none of these belongs to the entry before it, such as the lines of a traceback.
"""

from __future__ import annotations

import heapq
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
"""From the least severe to the most severe."""

_SEVERITIES: Mapping[str, str] = {
    **{level: level for level in LEVELS},
    **dict.fromkeys(("TRACE", "D", "D1", "D2", "D3", "D4", "D5"), "DEBUG"),
    **dict.fromkeys(("I", "NOTICE"), "INFO"),
    **dict.fromkeys(("W", "WARN"), "WARNING"),
    **dict.fromkeys(("E", "F", "CRITICAL", "FATAL", "PANIC", "DPANIC"), "ERROR"),
}
# The place in Envoy's source is left out.
_ENVOY = re.compile(
    r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[.,]\d+)\]\[\d+\]\[(\w+)\]\[(\w+)\] (?:\[[^\]]*:\d+\] )?(.*)", re.DOTALL
)
# Lines of Go's gRPC library in etcd.
_GO = re.compile(r"(INFO|WARNING|ERROR|FATAL): (\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) (.*)", re.DOTALL)
# Fields of most entries that say nothing of the event.
_COMMON = frozenset({"instance", "trace_id", "span_id", "exception"})
_BLOCK_BYTES = 64 << 10
_LINE_BYTES = 1 << 20
"""Bytes of a line that are kept."""
_ENTRY_LINES = 1_000
"""Lines without a format that one entry takes."""
_BEGINNING = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One event in the log of a process."""

    at: datetime
    process: str
    """`infer-0`, `envoy`, `mongod` ..."""
    level: str
    """One of LEVELS."""
    logger: str
    message: str
    """May have several lines."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """All else that the process has logged: `trace_id`, `instance`, fields of the event."""

    @property
    def trace_id(self) -> str:
        return str(self.fields.get("trace_id", ""))

    @property
    def summary(self) -> str:
        """The message, the event or, without one, the fields, and the last line of an exception."""
        # The message of an event has its values.
        shown = self.fields if "event" not in self.fields else {"event": self.fields["event"]}
        fields = "".join(f"  {key}={_short(value)}" for key, value in shown.items() if key not in _COMMON)
        cause = str(self.fields.get("exception", "")).rstrip().rpartition("\n")[2]
        return f"{self.message}{fields}" + (f" ({cause})" if cause else "")


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Selection of entries; empty: all of them."""

    since: datetime | None = None
    level: str = ""
    """The least severe level."""
    trace_id: str = ""
    """Trace id, or the first characters of one."""
    contains: str = ""
    warnings_only: frozenset[str] = frozenset()
    """Processes of which only warnings and errors are selected."""

    def matches(self, entry: LogEntry) -> bool:
        return (
            (entry.process not in self.warnings_only or entry.level in ("WARNING", "ERROR"))
            and (self.since is None or entry.at >= self.since)
            and (not self.level or LEVELS.index(entry.level) >= LEVELS.index(self.level))
            and (not self.trace_id or entry.trace_id.startswith(self.trace_id))
            and (
                not self.contains
                or self.contains in f"{entry.message} {json.dumps(entry.fields, default=str, ensure_ascii=False)}"
            )
        )


def parse(line: str, process: str) -> LogEntry | None:
    """Return the entry of one line; None: the line has none of the formats."""
    if line.startswith("{"):
        return _parse_json(line, process)
    if (found := _ENVOY.fullmatch(line)) is not None:
        return _entry(process, found[1].replace(",", "."), found[2].upper(), found[3], found[4])
    if (found := _GO.fullmatch(line)) is not None:
        return _entry(process, found[2].replace("/", "-"), found[1], "grpc", found[3].rstrip())
    return None


def _parse_json(line: str, process: str) -> LogEntry | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    fields: dict[str, Any] = found
    match fields:
        case {"time": str(at), "level": str(level), "message": str(message)}:
            logger, own = fields.get("logger", ""), {"time", "level", "message", "logger"}
        case {"ts": str(at), "level": str(level), "msg": str(message)}:
            logger, own = fields.get("caller", ""), {"ts", "level", "msg", "caller"}
        case {"t": {"$date": str(at)}, "s": str(level), "msg": str(message)}:
            attributes = fields.get("attr")
            logger, fields = fields.get("c", ""), attributes if isinstance(attributes, dict) else {}
            own = set()
        case _:
            return None
    others = {key: value for key, value in fields.items() if key not in own}
    return _entry(process, at, level.upper(), str(logger), message, others)


def _entry(
    process: str, at: str, level: str, logger: str, message: str, fields: Mapping[str, Any] | None = None
) -> LogEntry | None:
    try:
        # A time without a zone is the machine's.
        moment = datetime.fromisoformat(at).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return LogEntry(moment, process, _SEVERITIES.get(level, "INFO"), logger, message, fields or {})


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def processes(folder: Path) -> list[str]:
    """Return the names of the processes that have a log in `folder`."""
    return sorted(path.stem for path in folder.glob("*.log"))


def latest(folder: Path, names: Sequence[str], count: int, chosen: LogFilter) -> list[LogEntry]:
    """Return the last `count` entries of these processes that match, oldest first.

    Files are read from their ends, and no further than needed.
    """
    newest_first = heapq.merge(*(_backwards(folder, name, chosen) for name in names), key=_time, reverse=True)
    found = [entry for entry, _ in zip(newest_first, range(count), strict=False)]
    return found[::-1]


def _time(entry: LogEntry) -> datetime:
    return entry.at


def _backwards(folder: Path, name: str, chosen: LogFilter) -> Iterator[LogEntry]:
    """Return the entries of a process that match, newest first."""
    following: list[str] = []
    oldest: datetime | None = None
    for line in _lines_backwards(folder / f"{name}.log", folder / f"{name}.log.1"):
        entry = parse(line, name)
        if entry is None:
            following = [*following[-_ENTRY_LINES + 1 :], line]
            continue
        if chosen.since is not None and entry.at < chosen.since:
            return
        oldest = entry.at
        entry = _with_lines(entry, following[::-1])
        following = []
        if chosen.matches(entry):
            yield entry
    if following:
        # A process that ends before it logs leaves only such lines: a traceback, an error of the loader.
        first, *others = following[::-1]
        entry = LogEntry(oldest or _changed(folder / f"{name}.log"), name, "INFO", "", first)
        entry = _with_lines(entry, others)
        if chosen.matches(entry):
            yield entry


def _changed(path: Path) -> datetime:
    """Return the time at which a file was written last."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return _BEGINNING


def _with_lines(entry: LogEntry, lines: Sequence[str]) -> LogEntry:
    if not lines:
        return entry
    message = "\n".join((entry.message, *lines))
    return LogEntry(entry.at, entry.process, entry.level, entry.logger, message, entry.fields)


def _lines_backwards(*paths: Path) -> Iterator[str]:
    """Return the lines of files, the last line of the first file first. Files that cannot be read have none."""
    for path in paths:
        try:
            file = path.open("rb")
        except OSError:
            continue
        with file:
            end, rest = file.seek(0, os.SEEK_END), b""
            while end > 0:
                size = min(_BLOCK_BYTES, end)
                end -= size
                file.seek(end)
                first, *lines = (file.read(size) + rest).split(b"\n")
                yield from (_text(line) for line in reversed(lines) if line.strip())
                # A line without an end is not collected without a bound.
                rest = first[:_LINE_BYTES]
            if rest.strip():
                yield _text(rest)


def _text(line: bytes) -> str:
    return line[:_LINE_BYTES].decode(errors="replace").rstrip()


class Follower:
    """The entries that processes log from now on. A caller polls."""

    def __init__(self, folder: Path, includes: Callable[[str], bool], chosen: LogFilter) -> None:
        self._folder = folder
        self._includes = includes
        self._chosen = chosen
        self._files: dict[str, _Followed] = {}
        for name in processes(folder):
            self._files[name] = _Followed(folder, name, at_end=True)

    def poll(self) -> list[LogEntry]:
        """Return the new entries that match, ordered by time."""
        for name in processes(self._folder):
            if name not in self._files:
                self._files[name] = _Followed(self._folder, name, at_end=False)
        entries = [
            entry
            for name, file in self._files.items()
            if self._includes(name)
            for entry in file.poll()
            if self._chosen.matches(entry)
        ]
        return sorted(entries, key=_time)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _Followed:
    """One log that is followed, over restarts of its process and over the bounds of its size."""

    def __init__(self, folder: Path, name: str, *, at_end: bool) -> None:
        self._path = folder / f"{name}.log"
        self._former = folder / f"{name}.log.1"
        self._name = name
        self._file: BinaryIO | None = None
        self._rest = b""
        self._last: LogEntry | None = None
        file = self._open()
        if at_end and file is not None:
            file.seek(0, os.SEEK_END)

    def _open(self) -> BinaryIO | None:
        try:
            self._file = self._path.open("rb")
        except OSError:
            self._file = None
        return self._file

    def poll(self) -> list[LogEntry]:
        return [entry for line in self._lines() if (entry := self._parse(line)) is not None]

    def _parse(self, line: str) -> LogEntry | None:
        entry = parse(line, self._name)
        if entry is not None:
            self._last = entry
            return entry
        # The entry before may have been returned by an earlier poll: a line of its own has its time and level.
        at, level = (_BEGINNING, "INFO") if self._last is None else (self._last.at, self._last.level)
        return LogEntry(at, self._name, level, "", line)

    def _lines(self) -> Iterator[str]:
        file = self._file or self._open()
        if file is None:
            return
        position = file.tell()
        if os.fstat(file.fileno()).st_size < position:
            # The content was moved to the former log, and the file cut to nothing.
            yield from self._rest_of_former(position)
            file.seek(0)
        yield from self._read(file)
        if self._is_replaced(file):
            # The process was started again with a new log: the old file has been read to its end.
            self.close()
            if (new := self._open()) is not None:
                yield from self._read(new)

    def _rest_of_former(self, position: int) -> Iterator[str]:
        try:
            with self._former.open("rb") as former:
                former.seek(position)
                yield from self._read(former)
        except OSError:
            return

    def _read(self, file: BinaryIO) -> Iterator[str]:
        while block := file.read(_BLOCK_BYTES):
            *lines, rest = (self._rest + block).split(b"\n")
            self._rest = rest[:_LINE_BYTES]
            yield from (_text(line) for line in lines if line.strip())

    def _is_replaced(self, file: BinaryIO) -> bool:
        try:
            return not os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except OSError:
            return False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._rest = b""
