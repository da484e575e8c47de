"""How a job ended: an answer, or the error that says why there is none."""

from __future__ import annotations

from shoal.client.inference.inference import InferResult, of_response
from shoal.client.jobs.job import Job, JobState
from shoal.errors import Cancelled, Code, DataLoss, DeadlineExceeded, NotFound, ShoalError, from_status
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.store.v1 import store_pb2 as store


def of_result(result: store.Result) -> InferResult:
    """The answer.

    Raises:
        Cancelled: the job was cancelled.
        DeadlineExceeded: it expired.
        NotFound: its answer is no longer kept.
        DataLoss: its answer is damaged in the store.
        ShoalError: it failed: the class and the words of its last attempt.
    """
    if result.outcome == store.Result.OUTCOME_SUCCEEDED:
        if result.HasField("answer_removed_at"):
            raise NotFound(f"job {result.job_id} succeeded; retention has removed its answer since")
        if result.answer_lost:
            raise DataLoss(
                f"job {result.job_id} succeeded, and its answer is damaged in the store: {result.answer_lost}: "
                "to have it again, submit the job again"
            )
        return of_response(result.response)
    if result.outcome == store.Result.OUTCOME_CANCELLED:
        raise Cancelled(_words(result.job_id, "was cancelled", result.message))
    if result.outcome == store.Result.OUTCOME_EXPIRED:
        raise DeadlineExceeded(_words(result.job_id, "expired: its deadline passed before an answer", result.message))
    after = f"failed in attempt {result.attempt}" if result.attempt else "failed"
    raise from_status(result.code or Code.UNKNOWN, _words(result.job_id, after, result.message))


def without_result(job: Job) -> ShoalError:
    """The error of a job that has ended, and of which the store has nothing (any more)."""
    if job.state is JobState.SUCCEEDED:
        return NotFound(f"job {job.id} succeeded; its result is no longer in the store: retention has removed it")
    if job.state is JobState.CANCELLED:
        return Cancelled(_words(job.id, "was cancelled", job.last_message))
    if job.state is JobState.EXPIRED:
        return DeadlineExceeded(_words(job.id, "expired", job.last_message))
    return from_status(job.last_code or Code.UNKNOWN, _words(job.id, f"is {job.state}", job.last_message))


def of_ended(answer: ingest.RunStreamResponse) -> ShoalError:
    """The error of a job of a stream that ended without an answer, or whose answer is not there."""
    job_id = answer.job_id
    if answer.state == ingest.JOB_STATE_CANCELLED:
        return Cancelled(_words(job_id, "was cancelled", answer.message))
    if answer.state == ingest.JOB_STATE_EXPIRED:
        return DeadlineExceeded(_words(job_id, "expired: its deadline passed before an answer", answer.message))
    how = "has no result" if answer.state == ingest.JOB_STATE_UNSPECIFIED else "failed"
    return from_status(answer.code or Code.UNKNOWN, _words(job_id, how, answer.message))


def _words(job_id: str, what: str, why: str) -> str:
    return f"job {job_id} {what}: {why}" if why else f"job {job_id} {what}"
