"""Resources of a server and its child processes: memory, threads, descriptors."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PAGE = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True)
class Resources:
    """Resources of a process and its descendants."""

    rss_bytes: int
    threads: int
    descriptors: int


def resources(pid: int) -> Resources:
    """Return the current resources. Processes that end during the call are not counted."""
    rss = threads = descriptors = 0
    for each in _family(pid):
        try:
            rss += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * _PAGE
            threads += len(os.listdir(f"/proc/{each}/task"))
            descriptors += len(os.listdir(f"/proc/{each}/fd"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return Resources(rss, threads, descriptors)


def _family(pid: int) -> Sequence[int]:
    family = [pid]
    for each in family:
        try:
            tasks = os.listdir(f"/proc/{each}/task")
            children = [Path(f"/proc/{each}/task/{task}/children").read_text().split() for task in tasks]
        except (FileNotFoundError, ProcessLookupError):
            continue
        family += [int(child) for some in children for child in some]
    return family


@dataclass
class Memory:
    """Samples of the resident memory over time."""

    clock: Callable[[], float]
    samples: list[tuple[float, int]] = field(default_factory=list)

    def sample(self, pid: int) -> None:
        self.samples.append((self.clock(), resources(pid).rss_bytes))

    def growth_bytes(self) -> int:
        """Return the growth from the second quarter of the time to the last, of medians, to ignore peaks.

        The first quarter is the warm-up.
        """
        count = len(self.samples)
        early, late = self.samples[count // 4 : count // 2], self.samples[-(count // 4) :]
        if not early or not late:
            return 0
        return int(statistics.median(rss for _, rss in late) - statistics.median(rss for _, rss in early))

    def slope_bytes_a_minute(self) -> float:
        """Return the slope of a regression line through all samples after the first quarter."""
        kept = self.samples[len(self.samples) // 4 :]
        if len(kept) < 2:
            return 0.0
        return statistics.linear_regression([at for at, _ in kept], [rss for _, rss in kept]).slope * 60
