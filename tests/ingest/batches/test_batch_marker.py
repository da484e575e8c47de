"""The marker of a batch's output: a duty that is done again finds its own, however many inputs the batch has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.ingest.batches.duties import mark_output
from shoal.errors import AlreadyExists
from tests.ingest.batches.making import batch, locations

MANY = tuple(f"file:///{'x' * 2_000}-{number}.jsonl" for number in range(1_000))


def test_the_output_of_a_batch_with_the_most_inputs_is_marked_again_after_a_kill(tmp_path: Path) -> None:
    one = batch(tmp_path, inputs=MANY)
    mark_output(locations(), one)
    mark_output(locations(), one)
    assert json.loads((tmp_path / "out" / "_batch.json").read_text())["batch"] == one.id
    with pytest.raises(AlreadyExists, match=f"the results of batch {one.id} already"):
        mark_output(locations(), batch(tmp_path, id="01JDG3W6ZKQ1N8X9T4B7R2M5P1"))


def test_a_marker_of_an_earlier_version_with_all_inputs_still_names_its_batch(tmp_path: Path) -> None:
    one = batch(tmp_path, inputs=MANY)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_batch.json").write_text(json.dumps({"batch": one.id, "inputs": MANY}, indent=2))
    mark_output(locations(), one)
