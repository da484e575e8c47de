"""`shoal jobs watch`: one job until its end, or all that match until somebody has seen enough."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from shoal.cli.output import printable, show_json_line, text
from shoal.errors import InvalidArgument

if TYPE_CHECKING:
    from shoal.client import Client, Job, Transition


@dataclass(frozen=True)
class JobWatch:
    """What the options say."""

    states: Sequence[str]
    model: str
    tenant: str
    labels: Mapping[str, str]
    existing: bool
    resume: Path | None

    @property
    def is_set(self) -> bool:
        return any((self.states, self.model, self.tenant, self.labels, self.existing, self.resume))


def follow_one(client: Client, job_id: str, *, timeout: float, as_json: bool) -> None:
    """Prints each step of a job. Exits 1 when it did not succeed."""
    from shoal.client import JobState

    last: Job | None = None
    shown = 0
    for last in client.jobs.watch(job_id, timeout=timeout):
        if as_json:
            show_json_line(last)
            continue
        for step in last.transitions[shown:]:
            typer.echo(_line(step))
        shown = len(last.transitions)
    if last is None or last.state is not JobState.SUCCEEDED:
        raise typer.Exit(1)


def follow_all(client: Client, wanted: JobWatch, *, timeout: float | None, as_json: bool) -> None:
    """Prints each step of each job that matches. Goes on where the file `wanted.resume` says, and keeps it up."""
    from shoal.client import JobFilter
    from shoal.client.jobs.jobs import WATCH_ALL_S

    token = _read(wanted.resume)
    among = JobFilter(states=wanted.states, model=wanted.model, tenant=wanted.tenant, labels=wanted.labels)
    changes = client.jobs.watch_all(
        among, include_existing=wanted.existing, resume_token=token, timeout=WATCH_ALL_S if timeout is None else timeout
    )
    with contextlib.suppress(KeyboardInterrupt):
        for change in changes:
            if as_json:
                show_json_line(change.job)
            else:
                typer.echo(f"{change.job.id}  {printable(change.job.model_name)}  {_line(change.job.transitions[-1])}")
            if wanted.resume is not None:
                _write(wanted.resume, change.resume_token)


def _line(step: Transition) -> str:
    attempt = f"  attempt {step.attempt}" if step.attempt else ""
    reason = f"  {printable(step.reason)}" if step.reason else ""
    return f"{text(step.at)}  {step.state:<9}{attempt}{reason}"


def _read(path: Path | None) -> str:
    if path is None or not path.exists():
        return ""
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidArgument(f"--resume {path}: not a file that this command kept: {err}") from None


def _write(path: Path, token: str) -> None:
    """Whole or not at all: a kill in between leaves the token of before, and a line is printed again."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(token + "\n", "ascii")
        os.replace(new, path)
    except OSError as err:
        raise InvalidArgument(f"--resume {path}: it cannot be kept there: {err}") from None
