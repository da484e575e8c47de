"""The setting that says how long batches stay."""

from __future__ import annotations

from datetime import timedelta

import pytest

from mesh.process.config import ConfigError, load
from services.ingest.config import IngestConfig

REQUIRED = {
    "SHOAL_INGEST_INSTANCE": "ingest-0",
    "SHOAL_INGEST_LISTEN": "127.0.0.1:0",
    "SHOAL_INGEST_MESH": "127.0.0.1:1",
    "SHOAL_INGEST_MONGO": "mongodb://127.0.0.1:1",
}


@pytest.mark.parametrize(
    ("said", "stay"),
    [
        ({}, timedelta(days=30)),
        ({"SHOAL_INGEST_KEEP_BATCHES_MS": "0"}, None),
        ({"SHOAL_INGEST_KEEP_BATCHES_MS": "60000"}, timedelta(minutes=1)),
    ],
    ids=["default", "for-ever", "shortest"],
)
def test_how_long_batches_stay(said: dict[str, str], stay: timedelta | None) -> None:
    assert load(IngestConfig, "ingest", REQUIRED | said).retention["batches"] == stay


@pytest.mark.parametrize("said", ["-1", "1", "59999", "9" * 30, "month", ""])
def test_a_span_that_is_none_is_refused_by_name(said: str) -> None:
    with pytest.raises(ConfigError, match="SHOAL_INGEST_KEEP_BATCHES_MS"):
        load(IngestConfig, "ingest", REQUIRED | {"SHOAL_INGEST_KEEP_BATCHES_MS": said})
