"""Duties of a batch leave no open file behind."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from services.ingest.batches.duties import Duties
from tests.ingest.batches.making import batch, locations, write_lines


def open_files(folder: Path) -> list[str]:
    """Return the paths of the files below `folder` that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        # One may have been closed meanwhile, as the listing's own has.
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [path for path in found if path.startswith(f"{folder}/")]


def test_a_listing_leaves_no_open_file(tmp_path: Path) -> None:
    nothing = cast(Any, None)
    duties = Duties(nothing, nothing, locations(), nothing, folder=tmp_path)
    one = batch(tmp_path, inputs=(write_lines(tmp_path / "in.jsonl", [{"x": [1, 2, 3, 4]}]),))
    for number in range(3):
        assert duties._write_listing(one, f"file://{tmp_path}/out/listing-{number}.jsonl") == 1
    assert open_files(tmp_path) == []
    with (tmp_path / "in.jsonl").open():
        assert open_files(tmp_path) == [str(tmp_path / "in.jsonl")]
