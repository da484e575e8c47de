"""What `import shoal` costs and gives, and what a type checker sees of either face."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import shoal
from tests.typed import mypy_says


def test_importing_shoal_or_its_errors_loads_no_client() -> None:
    code = "import shoal, shoal.errors, sys; assert not {'grpc', 'numpy', 'google', 'shoal.client'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_client_is_there_when_it_is_named() -> None:
    for name in shoal.__all__:
        assert getattr(shoal, name) is not None
        assert name in dir(shoal)
    with pytest.raises(AttributeError, match="has no attribute 'Clint'"):
        shoal.Clint  # noqa: B018


USER = """
import shoal
from shoal.client import Job, ModelVersion

with shoal.Client() as client:
    reveal_type(client.infer("m", {"x": [1]}, version=2))
    reveal_type(client.models.list())
    reveal_type(client.jobs.submit)
    for job in client.jobs.watch("a"):
        reveal_type(job)
    client.infer("m", {"x": [1]}, verson=2)
    client.jobs.get(7)

async def main() -> None:
    async with shoal.Client() as client:
        reveal_type(await client.infer("m", {"x": [1]}))
        async for ack in client.jobs.submit_many([]):
            reveal_type(ack)
"""


def test_a_type_checker_sees_real_signatures(tmp_path: Path, repository_root: Path) -> None:
    seen = mypy_says(USER, tmp_path, repository_root)
    for words in (
        '"shoal.client.inference.inference.InferResult"',
        'list[shoal.client.models.registry.ModelVersion]"',
        "idempotency_key: str",
        '"shoal.client.jobs.job.Job"',
        '"shoal.client.jobs.job.Submitted"',
        'Unexpected keyword argument "verson"',
        'incompatible type "int"; expected "str"',
    ):
        assert words in seen, seen
    assert seen.count("error:") == 2, seen
