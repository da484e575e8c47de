"""Duties of a batch leave no open file behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from services.ingest.batches.duties import Duties
from tests.ingest.batches.making import batch, locations, write_lines


def test_a_listing_leaves_no_open_file(tmp_path: Path) -> None:
    nothing = cast(Any, None)
    duties = Duties(nothing, nothing, locations(), nothing, folder=tmp_path)
    one = batch(tmp_path, inputs=(write_lines(tmp_path / "in.jsonl", [{"x": [1, 2, 3, 4]}]),))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        assert duties._write_listing(one, f"file://{tmp_path}/out/listing-{number}.jsonl") == 1
    assert len(os.listdir("/proc/self/fd")) == before
