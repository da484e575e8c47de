"""Arguments of `Job.replaced`: the fields of a job, which mypy checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

from services.ingest.job import Job, JobFieldValues, State
from tests.ingest.making import job
from tests.typed import mypy_says

CHANGES = """
from services.ingest.job import Job, State

def changed(job: Job) -> None:
    job.replaced(state=State.DEAD, attempts=1, lease=None)
    job.replaced(atempts=1)
    job.replaced(attempts="1")
    job.replaced(state=None)
"""


def test_it_takes_the_fields_of_a_job_and_no_others() -> None:
    assert get_type_hints(JobFieldValues) == {name: get_type_hints(Job)[name] for name in Job.__dataclass_fields__}


def test_it_gives_what_replace_gives() -> None:
    one = job()
    assert one.replaced(state=State.DEAD, attempts=3) == replace(one, state=State.DEAD, attempts=3)
    assert one.state is State.QUEUED


def test_mypy_finds_a_change_that_is_wrong(tmp_path: Path, repository_root: Path) -> None:
    seen = mypy_says(CHANGES, tmp_path, repository_root)
    for words in (
        'Unexpected keyword argument "atempts" for "replaced" of "Job"',
        '"attempts" to "replaced" of "Job" has incompatible type "str"; expected "int"',
        '"state" to "replaced" of "Job" has incompatible type "None"; expected "State"',
    ):
        assert words in seen, seen
    assert seen.count("error:") == 3, seen
