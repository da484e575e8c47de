"""Display of one job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.cli.output import show

if TYPE_CHECKING:
    from shoal.client import Job


def show_job(job: Job) -> None:
    """Print a job and its transitions."""
    about = [
        ("job", job.id),
        ("state", job.state),
        ("model", f"{job.model_name} version {job.model_version}" if job.model_version else job.model_name),
        ("tenant", job.tenant),
        ("generation", job.generation if job.generation > 1 else None),
        ("priority", job.priority or None),
        ("attempts", job.attempts),
        ("submitted", job.submitted_at),
        ("not before", job.not_before),
        ("waits for", list(job.waits_for)),
        ("deadline", job.deadline),
        ("labels", [f"{key}={value}" for key, value in job.labels.items()]),
        ("last error", job.last_message),
    ]
    show(("", ""), [(name, value) for name, value in about if value not in (None, "", [])])
    steps = [(step.at, step.state, step.attempt or "", step.instance, step.reason) for step in job.transitions]
    show(("at", "state", "attempt", "by", "reason"), steps, empty="no transitions yet")
