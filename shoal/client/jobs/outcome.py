"""Answer of an ended job, or the error in its place."""

from __future__ import annotations

from shoal.client.inference.inference import InferResult, of_response
from shoal.client.jobs.job import Job, JobState
from shoal.errors import Cancelled, Code, DataLoss, DeadlineExceeded, NotFound, ShoalError, from_status
from shoal.ingest.v1 import ingest_pb2 as ingest
from shoal.store.v1 import store_pb2 as store


def of_result(result: store.Result) -> InferResult:
    """Return the answer in a result.

    Raises:
        Cancelled: the job was cancelled.
        DeadlineExceeded: the job expired.
        NotFound: the answer is no longer kept.
        DataLoss: the answer is damaged in the store.
        ShoalError: the job failed; class and message are those of its last attempt.
    """
    if result.outcome == store.Result.OUTCOME_SUCCEEDED:
        if result.HasField("answer_removed_at"):
            raise NotFound(f"job {result.job_id} succeeded; retention has removed its answer since")
        if result.answer_lost:
            raise DataLoss(
                f"job {result.job_id} succeeded, but its answer is damaged in the store: {result.answer_lost}: "
                "submit the job again to get a new answer"
            )
        return of_response(result.response)
    if result.outcome == store.Result.OUTCOME_CANCELLED:
        raise Cancelled(_message(result.job_id, "was cancelled", result.message))
    if result.outcome == store.Result.OUTCOME_EXPIRED:
        raise DeadlineExceeded(_message(result.job_id, "expired: its deadline passed before an answer", result.message))
    after = f"failed in attempt {result.attempt}" if result.attempt else "failed"
    raise from_status(result.code or Code.UNKNOWN, _message(result.job_id, after, result.message))


def missing_result(job: Job) -> ShoalError:
    """Return the error of an ended job that has no result in the store."""
    if job.state is JobState.SUCCEEDED:
        return NotFound(f"job {job.id} succeeded; its result is no longer in the store: retention has removed it")
    if job.state is JobState.CANCELLED:
        return Cancelled(_message(job.id, "was cancelled", job.last_message))
    if job.state is JobState.EXPIRED:
        return DeadlineExceeded(_message(job.id, "expired", job.last_message))
    return from_status(job.last_code or Code.UNKNOWN, _message(job.id, f"is {job.state}", job.last_message))


def of_ended(response: ingest.RunStreamResponse) -> ShoalError:
    """Return the error of a job of a stream that ended without an answer, or whose answer is missing."""
    job_id = response.job_id
    if response.state == ingest.JOB_STATE_CANCELLED:
        return Cancelled(_message(job_id, "was cancelled", response.message))
    if response.state == ingest.JOB_STATE_EXPIRED:
        return DeadlineExceeded(_message(job_id, "expired: its deadline passed before an answer", response.message))
    how = "has no result" if response.state == ingest.JOB_STATE_UNSPECIFIED else "failed"
    return from_status(response.code or Code.UNKNOWN, _message(job_id, how, response.message))


def _message(job_id: str, what: str, why: str) -> str:
    return f"job {job_id} {what}: {why}" if why else f"job {job_id} {what}"
