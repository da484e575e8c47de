"""Ingest where Arrow is not installed: everything but batches."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mesh.rpc.tenant_scope import Scopes
from services.ingest.batches.rpc import BatchesRpc
from shoal.errors import Unimplemented
from shoal.ingest.v1 import ingest_pb2 as pb


def test_ingest_needs_no_arrow_to_start() -> None:
    code = "import sys; sys.modules['pyarrow'] = None; import services.ingest.app, services.ingest.rpc"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_batches_say_what_they_miss() -> None:
    with pytest.raises(Unimplemented, match=r"shoal\[parquet\]"):
        await BatchesRpc(None, Scopes("")).GetBatch(pb.GetBatchRequest(id="x"), None)  # type: ignore[arg-type]
