"""CTC decoding beside the recorded texts: by its definition, and with files that do not fit."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import FailedPrecondition
from tests.infer.operators import making

CHARACTERS = "a\nb\nc\nß\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ctc")
    (folder / "keys.txt").write_text(CHARACTERS, encoding="utf-8")
    return folder


def steps(*classes: int, of: int = 6) -> np.ndarray:
    return np.eye(of, dtype=np.float32)[list(classes)] * np.float32(0.8)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=5), blank=st.sampled_from(["first", "last"]))
def test_it_is_runs_without_blanks(folder, rows, blank):
    made = making.session(folder, "ctc_decode", characters="keys.txt", blank=blank)
    outputs = making.run(made, probabilities=[steps(*row) for row in rows])
    making.check(made, outputs, len(rows))
    names = ["", *"abcß "] if blank == "first" else [*"abcß ", ""]
    assert [text.decode() for text in outputs["text"][:, 0]] == ["".join(names[c] for c, _ in groupby(r)) for r in rows]


def test_softmax_makes_probabilities(folder):
    made = making.session(folder, "ctc_decode", characters="keys.txt", activation="softmax", space="false")
    logits = np.log(np.array([[0.1, 0.6, 0.1, 0.1, 0.1], [0.2, 0.2, 0.2, 0.1, 0.3]], np.float32)) + 5
    outputs = making.run(made, probabilities=[logits])
    assert outputs["text"][0, 0] == "aß".encode()
    assert outputs["score"][0, 0] == pytest.approx((0.6 + 0.3) / 2)


def test_another_number_of_classes_is_named(folder):
    made = making.session(folder, "ctc_decode", characters="keys.txt")
    assert "has 9 classes" in making.wrong(made, probabilities=[steps(1, of=9)])


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({}, "parameter 'characters' is missing"),
        ({"characters": "nowhere.txt"}, "'nowhere.txt' is neither in the version's folder"),
        ({"characters": "../keys.txt"}, "expected a name without folders"),
        ({"characters": "keys.txt", "blank": "middle"}, "parameter 'blank' 'middle'"),
    ],
)
def test_wrong_parameters_are_named(folder, parameters, says):
    with pytest.raises(FailedPrecondition) as err:
        making.session(folder, "ctc_decode", **parameters)
    assert says in str(err.value)


def test_files_that_are_no_characters(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(FailedPrecondition, match="no characters"):
        making.session(tmp_path, "ctc_decode", characters="empty.txt", space="false")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(FailedPrecondition, match=r"cannot read bytes\.txt"):
        making.session(tmp_path, "ctc_decode", characters="bytes.txt")
