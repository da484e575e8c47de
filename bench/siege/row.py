"""One attack on one server: bystanders before, during and after it, and the server's memory.

processor 0: the server, with everything that belongs to it (or on every processor: `Checkout`)
processor 1: the bystanders, the probe, and the attacker, who gets what they leave
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.siege.attack import ATTACKER, Attack, has_begun
from bench.siege.bystander import OK, Call
from bench.siege.catalogue import CATALOGUE, is_of_jobs
from bench.siege.servers import ROOT, Server, peak_mib, reset_peak, resident_mib
from shoal.errors import Code

RATE = 50
"""Calls a second of each bystander."""
JOB_RATE = 5
"""Jobs a second of each bystander that submits jobs."""
PROBES = 100
TENANTS = (ATTACKER, "neighbour")
_REFUSED = f"status {int(Code.RESOURCE_EXHAUSTED)}"
_START_S = 0.05
# Time beyond its own after which a process is killed.
_PATIENCE_S = 60.0
# Longest wait for memory to return to the system after the attack.
_SETTLE_S = 30.0

CEILINGS_MIB = {"infer": 1024.0, "envoy": 512.0, "ingest": 768.0, "store": 768.0, "coord": 768.0}
"""Above idle for services, altogether for Envoy. MongoDB and etcd keep caches: they have none."""
RETURNED = 1.1
MAX_RATIO, MAX_MS = 5.0, 100.0
MAX_JOB_MS = 2000.0
"""Goal for a job, which waits for disks."""
_OTHERS = {"ingest": "ingest-0", "store": "store-0", "coord": "coord-0", "mongod": "mongod", "etcd": "etcd"}


@dataclass(frozen=True)
class Phases:
    """Lengths in seconds."""

    quiet: float
    during: float
    after: float


@dataclass
class Latencies:
    """Latencies of the worse bystander in one phase, in ms."""

    p50: float = 0.0
    p99: float = 0.0


@dataclass
class Memory:
    """Resident MiB of one process. `after` is what it has when all memory is back, or after the longest wait."""

    before: float = 0.0
    peak: float = 0.0
    after: float = 0.0


@dataclass
class Row:
    """Results of one attack."""

    attack: str
    server: str
    quiet: Latencies = field(default_factory=Latencies)
    during: Latencies = field(default_factory=Latencies)
    after: Latencies = field(default_factory=Latencies)
    calls: int = 0
    errors: dict[str, Counter[str]] = field(default_factory=dict)
    """Outcomes that are no right answer, by tenant."""
    repeated: int = 0
    memory: dict[str, Memory] = field(default_factory=dict)
    back_s: float = math.inf
    """Seconds from the end of the attack until the memory of all processes was back; infinite: not while waited for."""
    stall_ms: float = 0.0
    job_stall_ms: float = 0.0
    """Of ingest and store."""
    jobs: Sequence[Latencies] = ()
    """Of the bystander of the other tenant that submits jobs: quiet, during, after."""
    tally: dict[str, int] = field(default_factory=dict)
    is_alive: bool = True
    stop_s: float | None = math.nan
    """Seconds from SIGTERM under attack to the end; None: killed; nan: not tried."""

    def missed(self, drain_s: float) -> Sequence[str]:
        """Return the goals that are missed."""
        found = [] if has_begun(self.tally) else ["no attack"]
        own, others = (self.errors[tenant] for tenant in TENANTS)
        if others or any(not is_allowed(outcome, CATALOGUE[self.attack]) for outcome in own):
            found.append("errors")
        if self.during.p99 > min(MAX_RATIO * self.quiet.p99, MAX_MS):
            found.append("p99")
        if self.jobs and self.jobs[1].p99 > max(MAX_RATIO * self.jobs[0].p99, MAX_JOB_MS):
            found.append("jobs' p99")
        for name, memory in self.memory.items():
            if name not in CEILINGS_MIB:
                continue
            if memory.peak - (0 if name == "envoy" else memory.before) > CEILINGS_MIB[name]:
                found.append(f"{name} ceiling")
            if memory.after > RETURNED * memory.before:
                found.append(f"{name} memory kept")
        if not self.is_alive:
            found.append("ended")
        if self.stop_s is None or self.stop_s > drain_s:
            found.append("SIGTERM")
        return found


def is_allowed(outcome: str, attacks: Sequence[Attack]) -> bool:
    """Return True for an outcome that the bystander of the attacker's tenant may get during `attacks`."""
    return outcome == OK or (outcome.startswith(_REFUSED) and any(attack.fills_own_queue for attack in attacks))


def besiege(server: Server, attack: str, name: str, phases: Phases) -> Row:
    """Run one attack. The bystanders call all the time."""
    row = Row(attack, name)
    pids = {"infer": server.infer, **({"envoy": server.envoy} if server.envoy else {})}
    with contextlib.ExitStack() as stack:
        command = ["bench.siege.bystander", server.address]
        bystanders = [stack.enter_context(_process(*command, tenant, str(RATE))) for tenant in TENANTS]
        probe = stack.enter_context(_process("bench.siege.bystander", server.probe, "probe", str(PROBES), "live"))
        job_callers, job_probes = [], []
        if is_of_jobs(attack):
            pids |= {name: server.others[each] for name, each in _OTHERS.items() if each in server.others}
            job_callers = [stack.enter_context(_process(*command, tenant, str(JOB_RATE), "jobs")) for tenant in TENANTS]
            job_probes = [
                stack.enter_context(_process("bench.siege.bystander", each, "probe", str(PROBES), "health"))
                for each in server.job_probes
            ]
        attacker = stack.enter_context(_process("bench.siege.attacker", attack, server.address))
        watchers = (*bystanders, probe, *job_callers, *job_probes)
        for process in (*watchers, attacker):
            _line(process)
        start = time.monotonic() + _START_S
        attacked, left = start + phases.quiet, start + phases.quiet + phases.during
        end = left + phases.after
        for process in watchers:
            _tell(process, start, end)
        _tell(attacker, attacked, left)
        _sleep_until(attacked)
        for part, pid in pids.items():
            row.memory[part] = Memory(before=resident_mib(pid))
            reset_peak(pid)
        row.tally = _result(attacker, left + _PATIENCE_S)
        for part, pid in pids.items():
            row.memory[part].peak = peak_mib(pid)
        found = [_result(process, end + _PATIENCE_S) for process in (*bystanders, *job_callers)]
        row.repeated = sum(each["repeated"] for each in found)
        every: list[list[Call]] = [[tuple(call) for call in each["calls"]] for each in found]
        row.stall_ms = _stall_ms([probe], attacked, end)
        row.job_stall_ms = _stall_ms(job_probes, attacked, end)
    row.back_s = _settle(row, pids, left)
    calls, jobs = every[: len(bystanders)], every[len(bystanders) :]
    phases_of = (start, attacked), (attacked, left), (left, end)
    row.quiet, row.during, row.after = (_worse(calls, begin, stop) for begin, stop in phases_of)
    if jobs:
        # Jobs of the attacker's tenant wait behind its own.
        row.jobs = [_worse(jobs[1:], begin, stop) for begin, stop in phases_of]
    row.calls = sum(map(len, every))
    row.errors = {
        tenant: Counter(outcome for each in every[n :: len(TENANTS)] for _, _, outcome in each if outcome != OK)
        for n, tenant in enumerate(TENANTS)
    }
    row.is_alive = server.is_running()
    return row


def stop_under_attack(server: Server, attack: str) -> float | None:
    """Send SIGTERM during an attack. Return the seconds until the end; None when the server had to be killed."""
    with _process("bench.siege.attacker", attack, server.address) as attacker:
        _line(attacker)
        now = time.monotonic()
        _tell(attacker, now, now + 8.0)
        time.sleep(0.5)
        took = server.stop()
        attacker.kill()
    return took


def _worse(calls: Sequence[Sequence[Call]], begin: float, stop: float) -> Latencies:
    each = []
    for some in calls:
        took = sorted(
            1000 * (math.inf if seconds is None else seconds) for due, seconds, _ in some if begin <= due < stop
        )
        each.append(Latencies(_quantile(took, 0.5), _quantile(took, 0.99)))
    return Latencies(max(one.p50 for one in each), max(one.p99 for one in each))


def _stall_ms(probes: Sequence[subprocess.Popen[str]], begin: float, end: float) -> float:
    """Return the longest wait of a probe since `begin`."""
    waits = [
        1000 * (took if took is not None and outcome == OK else math.inf)
        for probe in probes
        for due, took, outcome in _result(probe, end + _PATIENCE_S)["calls"]
        if due > begin
    ]
    return max(waits, default=0.0)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else math.nan


def _settle(row: Row, pids: dict[str, int], attacked_until: float) -> float:
    """Wait until the memory is back. Return the seconds since the attack's end; infinite when it is not back."""
    while True:
        for part, pid in pids.items():
            row.memory[part].after = resident_mib(pid)
        took = time.monotonic() - attacked_until
        if all(each.after <= RETURNED * each.before for name, each in row.memory.items() if name in CEILINGS_MIB):
            return took
        if took > _SETTLE_S:
            return math.inf
        time.sleep(0.1)


@contextlib.contextmanager
def _process(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _line(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        sys.exit(f"{process.args!r} ended with {process.wait()}")


def _tell(process: subprocess.Popen[str], start: float, end: float) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"start": start, "end": end}) + "\n")
    process.stdin.flush()


def _result(process: subprocess.Popen[str], until: float) -> dict[str, Any]:
    out, _ = process.communicate(timeout=until - time.monotonic())
    found: dict[str, Any] = json.loads(out)
    return found


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
