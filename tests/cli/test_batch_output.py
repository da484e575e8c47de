"""What `shoal jobs submit --batch` shows: a line for each tenth, a bar on a terminal, and how to come back."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from shoal.cli import batches
from shoal.client import Batch, BatchState
from shoal.client.transport.methods import GET_BATCH, WATCH_BATCH
from shoal.ingest.v1 import ingest_pb2 as ingest
from tests.client.served import Served


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.close()


def batch(**fields: Any) -> Batch:
    made: dict[str, Any] = {
        "id": "b",
        "state": BatchState.RUNNING,
        "inputs": ("file:///in.jsonl",),
        "output": "file:///out",
        "format": "jsonl",
        "model_name": "m",
        "is_planned": True,
        "rows": 100,
        **fields,
    }
    return Batch(**made)


def test_a_line_for_each_tenth_and_each_wait(capsys: pytest.CaptureFixture[str]) -> None:
    seen = [batch(rows_ok=n) for n in range(0, 101, 2)] + [batch(rows_ok=100, waits_for="UNAVAILABLE: model away")]
    batches._lines(batch(), seen)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "batch b"
    assert len(lines) == 1 + 11 + 1
    assert "waits for: UNAVAILABLE: model away" in lines[-1]


def test_before_the_plan_is_complete_the_rows_are_a_minimum(capsys: pytest.CaptureFixture[str]) -> None:
    assert batches._fields(batch(is_planned=False, rows=50, rows_ok=10))["rows"] == "10 of 50+ rows"
    assert batches._fields(batch(rows_ok=7, rows_failed=3))["rows"] == "10 of 100 rows, 3 failed"
    assert batches._fields(batch(ending=BatchState.CANCELLED))["state"] == "cancelled ..."


class Interrupted:
    """A client whose watch is interrupted."""

    @property
    def batches(self) -> Interrupted:
        return self

    def watch(self, batch_id: str) -> Iterator[Batch]:
        yield batch()
        raise KeyboardInterrupt


def test_an_interrupt_leaves_the_batch_running_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        batches._follow(Interrupted(), batch(), as_json=False)  # type: ignore[arg-type]
    assert ended.value.exit_code == 130
    said = capsys.readouterr().err
    assert "shoal jobs batch watch b" in said
    assert "shoal jobs batch cancel b" in said


def test_the_bar_on_a_real_terminal(served: Served) -> None:
    states = [
        ingest.Batch(id="b", state=1, model_name="m", inputs=["s3://b/x"], is_planned=True, rows=10, rows_ok=n)
        for n in (0, 5)
    ]
    last = ingest.Batch(id="b", state=4, output="s3://b/y", is_planned=True, rows=10, rows_failed=10, message="why not")

    async def get(request: Any, context: Any) -> Any:
        return ingest.GetBatchResponse(batch=states[0])

    async def watch(request: Any, context: Any) -> Any:
        for one in [*states, last]:
            yield ingest.WatchBatchResponse(batch=one)

    served.on(GET_BATCH, get)
    served.on(WATCH_BATCH, watch, "unary_stream")
    served.start()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "shoal.cli.main", "jobs", "batch", "watch", "b", "--gateway", served.address]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env={**os.environ, "COLUMNS": "160", "TERM": "xterm"},
        timeout=60,
        check=False,
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 1, shown
    assert "Ctrl-C leaves it running" in shown
    assert "10 of 10 rows, 10 failed" in shown
    assert "why not" in done.stdout
    assert "s3://b/y/_dead/" in done.stdout
