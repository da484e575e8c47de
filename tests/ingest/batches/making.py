"""Signatures, batches and files for tests of batches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from services.ingest.batches.batch import Batch, BatchState, BatchStep, Format
from services.ingest.batches.inputs.listing import line_of
from services.ingest.batches.inputs.locations import InputLocations
from services.ingest.batches.rows.signature import Signature, TensorSpec

START = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
DOUBLE = Signature((TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (4,)),), 8)


def batch(folder: Path, **fields: Any) -> Batch:
    """A batch that writes to `folder`."""
    made: dict[str, Any] = {
        "id": "01JDG3W6ZKQ1N8X9T4B7R2M5P0",
        "inputs": (f"file://{folder}/in.jsonl",),
        "output": f"file://{folder}/out",
        "format": Format.JSONL,
        "model_name": "double",
        "signature": DOUBLE,
        "columns": (("x", "x"),),
        "submitted_at": START,
        "updated_at": START,
        "steps": (BatchStep(BatchState.RUNNING, START, "local/ingest-0", "submitted"),),
        **fields,
    }
    return Batch(**made)


def locations() -> InputLocations:
    return InputLocations(["file:///"])


def listing(folder: Path, urls: Sequence[str]) -> Any:
    """The entry of a listing of `urls`, as a batch pins it."""
    where = locations()
    (folder / "out").mkdir(exist_ok=True)
    path = folder / "out" / "_inputs.jsonl"
    path.write_bytes(b"".join(line_of(where.stat(url)) for url in urls))
    return where.stat(f"file://{path}")


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]], tail: str = "\n") -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + (tail if rows else ""))
    return f"file://{path}"


def write_parquet(path: Path, table: Any, **options: Any) -> str:
    pq.write_table(pa.table(table), path, **options)
    return f"file://{path}"


def write_npz(path: Path, *, packed: bool = False, **arrays: Any) -> str:
    (np.savez_compressed if packed else np.savez)(path, **arrays)
    return f"file://{path}"
