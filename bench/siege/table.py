"""Tables of a siege, as Markdown."""

from __future__ import annotations

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from bench.siege.catalogue import described
from bench.siege.row import MAX_MS, MAX_RATIO, RATE, Latencies, Phases, Row

DRAIN_S = 5.0 + 1.5
"""The drain of infer, and half a second for what is left; a second for the process."""
NODE_DRAIN_S = 20.0

_COLUMNS = (
    "attack",
    "server",
    "quiet",
    "during",
    "after",
    "errors",
    "infer MiB",
    "Envoy MiB",
    "back s",
    "stall ms",
    "SIGTERM s",
    "goals",
)


_JOB_COLUMNS = (
    "attack",
    "server",
    "jobs quiet",
    "during",
    "after",
    "ingest MiB",
    "store MiB",
    "coord MiB",
    "MongoDB MiB",
    "stall ms",
)


def missed(row: Row) -> Sequence[str]:
    return row.missed(NODE_DRAIN_S if "envoy" in row.memory else DRAIN_S)


def brief(front: str, row: Row) -> str:
    """Return one line on a row."""
    return " | ".join((front, *_cells(row), *(_job_cells(row)[2:] if row.jobs else ())))


def document(
    rows: Mapping[str, Sequence[Row]], phases: Phases, arguments: Sequence[str], *, uses_whole_machine: bool
) -> str:
    """Return all tables, with the machine that they come from."""
    lines = ["# Siege: attacks, and what bystanders see of them", ""]
    lines += [f"    python -m bench.siege {' '.join(arguments)}".rstrip(), "", _machine(), ""]
    lines += [_method(phases, "every processor" if uses_whole_machine else "processor 0")]
    for front, found in rows.items():
        lines += ["", f"## {front}", "", *_markdown(_COLUMNS, [_cells(row) for row in _by_attack(found)])]
        if of_jobs := [row for row in _by_attack(found) if row.jobs]:
            lines += ["", "Jobs during the attacks on ingest and store:", ""]
            lines += _markdown(_JOB_COLUMNS, [_job_cells(row) for row in of_jobs])
        for server in dict.fromkeys(row.server for row in found):
            some = [row for row in found if row.server == server]
            met = sum(not missed(row) for row in some)
            lines += ["", f"{server}: {met} of {len(some)} attacks met every goal."]
    lines += ["", "## What the attacker did", ""]
    tallies = [
        (front, row.attack, row.server, described(row.attack), _tally(row.tally))
        for front, found in rows.items()
        for row in _by_attack(found)
    ]
    lines += _markdown(("front", "attack", "server", "what it is", "counts"), tallies)
    return "\n".join(lines)


def _by_attack(rows: Sequence[Row]) -> Sequence[Row]:
    order = {name: n for n, name in enumerate(dict.fromkeys(row.attack for row in rows))}
    return sorted(rows, key=lambda row: order[row.attack])


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} {platform.machine()} cores, {memory} GiB, Linux "
        f"{platform.release()}, Python {platform.python_version()}, load average {os.getloadavg()[0]:.1f} at the end."
    )


def _method(phases: Phases, processors: str) -> str:
    return (
        f"The server, and its Envoy, MongoDB and etcd, run on {processors}; two bystanders ({RATE} calls/s each) and "
        "the probe on processor 1, and the attacker there, who gets what they leave. "
        f"Quiet {phases.quiet:g} s, attack {phases.during:g} s, after {phases.after:g} s.\n\n"
        "Latencies are p50/p99 in ms of the worse bystander, from when a call was due. Errors are those of the "
        'bystander of the attacker\'s tenant + those of the other. Memory is before/peak/after; "back" is the time '
        "from the attack's end until it was within 10 % of before, for which 30 s are waited. A stall is the longest "
        "wait of a ServerLive, sent to infer itself every 10 ms. SIGTERM is sent during a second attack.\n\n"
        f"Goals: no errors; p99 during the attack at most {MAX_RATIO:g} times the quiet one and {MAX_MS:g} ms; infer "
        "at most 1 GiB above before, Envoy 512 MiB; memory back within 10 %; SIGTERM ends within the drain."
    )


def _memory(row: Row) -> dict[str, str]:
    return {name: f"{m.before:.0f}/{m.peak:.0f}/{m.after:.0f}" for name, m in row.memory.items()}


def _cells(row: Row) -> tuple[str, ...]:
    memory = _memory(row)
    return (
        row.attack,
        row.server,
        _latencies(row.quiet),
        _latencies(row.during),
        _latencies(row.after),
        _errors(row),
        memory.get("infer", ""),
        memory.get("envoy", ""),
        _number(row.back_s),
        _number(row.stall_ms),
        "killed" if row.stop_s is None else _number(row.stop_s),
        ", ".join(missed(row)) or "met",
    )


def _job_cells(row: Row) -> tuple[str, ...]:
    memory = _memory(row)
    return (
        row.attack,
        row.server,
        *map(_latencies, row.jobs),
        *(memory.get(name, "") for name in ("ingest", "store", "coord", "mongod")),
        _number(row.job_stall_ms),
    )


def _latencies(latencies: Latencies) -> str:
    return f"{_number(latencies.p50)}/{_number(latencies.p99)}"


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "never"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _errors(row: Row) -> str:
    own, other = (errors.total() for errors in row.errors.values())
    named = sum(row.errors.values(), Counter()).most_common(2)
    causes = "; ".join(f"{count} {outcome[:100]}" for outcome, count in named)
    return f"{own} + {other} of {row.calls}" + (f" ({causes})" if causes else "")


def _tally(tally: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(tally.items(), key=lambda pair: -pair[1]) if count)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Sequence[str]:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
