"""The differences to real Triton that docs/compatibility.md lists: the rows of its table, as the tests read them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

_ROW = re.compile(r"^\| (?P<cases>`.+?`) \| (?P<triton>[A-Z_]+) \| (?P<shoal>[A-Z_]+) \| (?P<why>.+) \|$")
_REST_ROW = re.compile(r"^\| (?P<cases>`.+?`) \| (?P<triton>\d+) \| (?P<shoal>\d+) \| (?P<why>.+) \|$")
_CASE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Difference:
    """One row: which cases, how each server responds to them, and why."""

    cases: tuple[str, ...]
    """Names; `*` stands for anything."""
    triton: str
    shoal: str
    why: str

    def covers(self, case: str) -> bool:
        return any(fnmatchcase(case, pattern.replace("[", "[[]")) for pattern in self.cases)


def listed(page: Path, *, rest: bool = False) -> list[Difference]:
    """The rows of the table in `page`; with `rest` those of the table for REST, whose statuses are HTTP's."""
    rows = ((_REST_ROW if rest else _ROW).match(line) for line in page.read_text().splitlines())
    return [Difference(tuple(_CASE.findall(r["cases"])), r["triton"], r["shoal"], r["why"]) for r in rows if r]
