"""A batch on a whole node, from and to a real object store, through the command line, while its processes are killed:
each row of the results is what the model answers when it is asked directly."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shoal
from shoal.errors import DeadlineExceeded, Unavailable
from tests.long_form import by_form
from tests.seaweedfs import WeedProcess

pytestmark = [pytest.mark.node, pytest.mark.timeout(300)]

ROWS = by_form(400, 600)
VICTIMS = by_form(
    ["ingest-0", "infer-0", "ingest-1", "store-0"],
    ["ingest-0", "infer-0", "ingest-1", "ingest-0", "infer-1", "store-0"],
)
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def running(node: Any, onnx_models: Path, weed: WeedProcess) -> Any:
    one = node("--replicas", "infer=2,ingest=2", env=weed.access)
    one.shoal("models", "push", str(onnx_models / "double.onnx"))
    one.shoal("models", "push", str(onnx_models / "slow.onnx"))
    return one


def rows_of(weed: WeedProcess, prefix: str, below: str = "") -> Any:
    store = weed.store(prefix)
    names = sorted(found["path"] for page in obstore.list(store, below or None) for found in page)
    tables = [
        pq.read_table(io.BytesIO(bytes(obstore.get(store, name).bytes())))
        for name in names
        if name.rpartition("/")[2].startswith("part-") and name.startswith("_dead/") is bool(below)
    ]
    return pa.concat_tables(tables)


def batch_of(running: Any, batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(running.shoal("jobs", "batch", "get", batch_id, "--json").stdout)
    return found


def test_every_row_is_the_models_own_answer_whatever_is_killed(running: Any, weed: WeedProcess) -> None:
    root = weed.prefix()
    x = np.random.default_rng(7).standard_normal((ROWS, 4)).astype(np.float32)
    lines = [json.dumps({"features": row.tolist(), "id": f"row-{n}"}) for n, row in enumerate(x)]
    lines[17] = '{"features": [1, 2, 3], "id": "short"}'
    obstore.put(weed.store(root), "in.jsonl", "\n".join(lines).encode())
    command = ["jobs", "submit", "--batch", f"{root}/in.jsonl", "--out", f"{root}/out/", "--model", "slow"]
    command += ["--column", "x=features", "--keep", "id", "--chunk-rows", "25", "--no-wait"]
    batch_id = running.shoal(*command).stdout.strip()
    done = 0
    for victim in VICTIMS:
        done = wait_for_rows(running, batch_id, done + 15)
        running.wait_until_restarted(victim, running.kill(victim))
    wait_for_rows(running, batch_id, ROWS)
    watched = running.shoal("jobs", "batch", "watch", batch_id, "--json", timeout_s=180)
    batch = json.loads(watched.stdout)
    assert (batch["state"], batch["rows"], batch["rows_ok"], batch["rows_failed"]) == ("succeeded", ROWS, ROWS - 1, 1)
    table = rows_of(weed, f"{root}/out")
    wanted = [n for n in range(ROWS) if n != 17]
    assert table.column("row").to_pylist() == wanted
    assert table.column("id").to_pylist() == [f"row-{n}" for n in wanted]
    with shoal.Client(running.gateway) as client:
        direct = np.concatenate([client.infer("double", {"x": x[at : at + 50]})["y"] for at in range(0, ROWS, 50)])
    assert np.array_equal(np.array(table.column("y").to_pylist(), np.float32), direct[wanted])
    dead = rows_of(weed, f"{root}/out", "_dead").to_pylist()
    assert [(row["row"], row["code"]) for row in dead] == [(17, "INVALID_ARGUMENT")]


def wait_for_rows(running: Any, batch_id: str, rows: int) -> int:
    """Waits until so many rows are done, or the batch has ended; says how many are."""
    deadline = time.monotonic() + PATIENCE_S
    with shoal.Client(running.gateway) as client:
        while True:
            with contextlib.suppress(Unavailable, DeadlineExceeded):  # Both that could answer may be down for a moment.
                batch = client.batches.get(batch_id, timeout=20)
                if batch.rows_done >= rows or batch.ended:
                    return batch.rows_done
            assert time.monotonic() < deadline, running.story()
            time.sleep(0.05)


def test_what_a_newcomer_sees(running: Any, tmp_path: Path) -> None:
    x = np.arange(4_000, dtype=np.float32).reshape(1_000, 4)
    np.savez(tmp_path / "in.npz", x=x)
    arguments = ("jobs", "submit", "--batch", str(tmp_path / "in.npz"), "--out", str(tmp_path / "out"))
    done = running.shoal(*arguments, "--model", "double")
    assert "1,000 of 1,000" in done.stdout
    assert "succeeded" in done.stdout
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "out").glob("part-*"))])
    assert np.array_equal(np.array(table.column("y").to_pylist(), np.float32), 2 * x)
    again = running.shoal(*arguments, "--model", "double", check=False)
    assert again.returncode == 1
    assert "has the results of batch" in again.stderr
    wrong = running.shoal(*arguments, "--model", "nope", check=False)
    assert wrong.returncode == 1
    assert "nope" in wrong.stderr
    listed = json.loads(running.shoal("jobs", "batch", "list", "--json").stdout)
    assert listed[0]["rows_ok"] == 1_000
    for words, options in (
        ("a batch takes its rows from files", ("double", "[[1]]", "--batch", "x", "--out", "y")),
        ("needs --out", ("double", "--batch", str(tmp_path / "in.npz"))),
        ("needs a model", ("--batch", str(tmp_path / "in.npz"), "--out", "y")),
        ("no such file or folder", ("double", "--batch", str(tmp_path / "none.npz"), "--out", "y")),
        ("a job needs MODEL and INPUT", ("double",)),
    ):
        refused = running.shoal("jobs", "submit", *options, check=False)
        assert refused.returncode == 2
        assert words in refused.stderr
