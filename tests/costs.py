"""Report the wall time and the processor time of tests: a pytest plugin, on with `--costs ROWS`.

Processor time is that of the worker, of its descendants that live, and of those that were waited for. Where a shared
part works for several files, each file pays what the part used during the file. A fixture counts for the test that is
first to need it. Processes whose parent was killed leave the tree, and their last seconds are lost.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TICKS = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--costs", type=int, default=0, metavar="ROWS", help="report the slowest tests and costliest files"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--costs"):
        config.pluginmanager.register(Costs(config.getoption("--costs")))


class Costs:
    """Attach the processor time to each report, in the workers; sum up and print, in the process that reports."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._before = processor_s()
        self._is_last = False
        self._wall: Counter[str] = Counter()
        self._files_wall: Counter[str] = Counter()
        self._files_processor: Counter[str] = Counter()

    def pytest_collection_finish(self) -> None:
        self._before = processor_s()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        # Counting costs milliseconds where many processes live: once for each file, behind its last test.
        self._is_last = nextitem is None or nextitem.location[0] != item.location[0]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: Any = yield
        if self._is_last and call.when == "teardown":
            now = processor_s()
            report.processor_s = max(now - self._before, 0.0)
            self._before = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.split("::")[0]
        self._wall[report.nodeid] += report.duration
        self._files_wall[file] += report.duration
        # Only the last report of a file has it.
        self._files_processor[file] += getattr(report, "processor_s", 0.0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"slowest {self._rows} tests")
        for name, wall in self._wall.most_common(self._rows):
            terminalreporter.write_line(f"{wall:7.1f} s  {name}")
        terminalreporter.section(f"{self._rows} files with the most processor time")
        for file, processor in self._files_processor.most_common(self._rows):
            terminalreporter.write_line(f"{processor:7.1f} s of {self._files_wall[file]:6.1f} s  {file}")
        both = self._files_processor.total(), self._files_wall.total()
        terminalreporter.write_line("{:7.1f} s of {:6.1f} s  all tests, without collection".format(*both))


def processor_s() -> float:
    """Return the seconds of processor time that this process and its descendants have used."""
    left, ticks = [os.getpid()], 0
    while left:
        pid = left.pop()
        try:
            # The name of the program is in parentheses and may hold spaces; utime is the 12th field behind it.
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
            for task in (PROC / str(pid) / "task").iterdir():
                left += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has ended; its parent has its time.
    return ticks / TICKS
