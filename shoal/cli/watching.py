"""`shoal jobs watch`: one job until its end, or all jobs that match until interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mesh.process.files import write_atomically
from shoal.cli.output import printable, show_json_line, text
from shoal.errors import InvalidArgument

if TYPE_CHECKING:
    from shoal.client import Client, Job, Transition


@dataclass(frozen=True)
class WatchOptions:
    """Options that select jobs."""

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
    """Print each transition of a job. Exits 1 when the job did not succeed."""
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


def follow_all(client: Client, options: WatchOptions, *, timeout: float | None, as_json: bool) -> None:
    """Print each transition of each job that matches. Resume at the position in `options.resume`, and update it."""
    from shoal.client import JobFilter
    from shoal.client.jobs.jobs import WATCH_ALL_S

    token = _read(options.resume)
    matching = JobFilter(states=options.states, model=options.model, tenant=options.tenant, labels=options.labels)
    changes = client.jobs.watch_all(
        matching,
        include_existing=options.existing,
        resume_token=token,
        timeout=WATCH_ALL_S if timeout is None else timeout,
    )
    with contextlib.suppress(KeyboardInterrupt):
        for change in changes:
            if as_json:
                show_json_line(change.job)
            else:
                typer.echo(f"{change.job.id}  {printable(change.job.model_name)}  {_line(change.job.transitions[-1])}")
            if options.resume is not None:
                _write(options.resume, change.resume_token)


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
        raise InvalidArgument(f"--resume {path}: not a file of this command: {err}") from None


def _write(path: Path, token: str) -> None:
    """Replace the file: after a kill the old token remains, and a line may be printed again."""
    try:
        write_atomically(path, token + "\n")
    except OSError as err:
        raise InvalidArgument(f"--resume {path}: cannot write it: {err}") from None
