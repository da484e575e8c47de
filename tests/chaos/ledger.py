"""The ledger of a chaos run: what was acknowledged, and what became of it. Plain values; knows no node.

    producer ──acknowledged(job, tenant, number)──> Ledger <──found(job)── every job and result that the node has

Each job asks the model to double a number that no other job has, so a result says by itself whose it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Found:
    """A result as the store has it."""

    job_id: str
    is_success: bool
    number: float | None
    """Half of the model's answer: the number that it was asked about. None: there is no answer."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the comparison brought to light, by job id or key; all empty is how it must be."""

    missing: list[str]
    """Acknowledged, and without a result."""
    doubled: list[str]
    """More than one result of one job, or more than one job of one key."""
    foreign: list[str]
    """The answer is to the question of another job."""
    failed: list[str]
    """Ended without success, though the request is good."""

    @property
    def is_clean(self) -> bool:
        return not (self.missing or self.doubled or self.foreign or self.failed)

    def __str__(self) -> str:
        parts = {"missing": self.missing, "doubled": self.doubled, "foreign": self.foreign, "failed": self.failed}
        return ", ".join(f"{len(ids)} {name} {ids[:5] if ids else ''}".strip() for name, ids in parts.items())


@dataclass(slots=True)
class Ledger:
    """Acknowledged jobs by id."""

    numbers: dict[str, float] = field(default_factory=dict)
    by_tenant: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    """Submits that were not acknowledged, by the code: each is repeated with its key."""

    def acknowledged(self, job_id: str, tenant: str, number: float) -> None:
        """A submit was answered."""
        assert self.numbers.setdefault(job_id, number) == number, f"job {job_id} was acknowledged for two questions"
        self.by_tenant[tenant] += 1

    def compare(self, results: Iterable[Found], keys: Iterable[tuple[str, str]]) -> Verdict:
        """Compares with every result there is, and with (key, job id) of every job there is."""
        seen: Counter[str] = Counter()
        foreign, failed = [], []
        for result in results:
            seen[result.job_id] += 1
            if result.job_id not in self.numbers:
                continue  # Durable, but its acknowledgement was lost on the way: it may run, once.
            if not result.is_success:
                failed.append(result.job_id)
            elif result.number != self.numbers[result.job_id]:
                foreign.append(result.job_id)
        jobs_of: defaultdict[str, set[str]] = defaultdict(set)
        for key, job_id in keys:
            jobs_of[key].add(job_id)
        doubled = [job_id for job_id, times in seen.items() if times > 1]
        doubled += [key for key, jobs in jobs_of.items() if len(jobs) > 1]
        return Verdict([job_id for job_id in self.numbers if not seen[job_id]], doubled, foreign, failed)
