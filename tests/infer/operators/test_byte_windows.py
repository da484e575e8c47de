"""Windows of bytes: what the package `magika` makes for its own models, for any bytes; and other parameters."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from magika import Magika
from magika.types import Seekable

from shoal.errors import FailedPrecondition
from tests.infer.operators import making
from tests.infer.operators.images import array

SPACE = b" \t\n\r\x0b\x0c"
FILES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.builds(lambda n, body: SPACE * n + body + SPACE * n, st.integers(0, 900), st.binary(max_size=3000)),
        st.builds(lambda n, seed: np.random.default_rng(seed).bytes(n), st.integers(0, 9000), st.integers(0, 99)),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def magika():
    return Magika()


@settings(max_examples=150, deadline=None)
@given(files=FILES)
@example(files=[b"", SPACE * 2000, b"x" * 4096, SPACE * 683 + b"y", b"a" + SPACE * 1000 + b"b"])
def test_they_are_magikas(magika, tmp_path_factory, files):
    asked = magika._model_config
    made = making.session(
        tmp_path_factory.getbasetemp(),
        "byte_windows",
        begin=str(asked.beg_size),
        end=str(asked.end_size),
        block=str(asked.block_size),
        padding=str(asked.padding_token),
    )
    outputs = making.run(made, data=array(*files))
    making.check(made, outputs, len(files))
    for file, window in zip(files, outputs["bytes"], strict=True):
        features = Magika._extract_features_from_seekable(
            Seekable(io.BytesIO(file)),
            asked.beg_size,
            asked.mid_size,
            asked.end_size,
            asked.padding_token,
            asked.block_size,
            asked.use_inputs_at_offsets,
        )
        assert window.tolist() == [*features.beg, *features.end]


def test_length_is_of_the_first_window(tmp_path):
    made = making.session(tmp_path, "byte_windows", begin="4", end="0", block="8")
    outputs = making.run(made, data=array(b"", b"  ab ", b"abcdefg"))
    assert outputs["length"].tolist() == [[0], [3], [4]]
    assert outputs["bytes"].tolist() == [[256] * 4, [97, 98, 32, 256], [97, 98, 99, 100]]


def test_white_space_may_count(tmp_path):
    made = making.session(tmp_path, "byte_windows", begin="2", end="2", block="2", strip="false", padding="-1")
    assert making.run(made, data=array(b" a ", b"x"))["bytes"].tolist() == [[32, 97, 97, 32], [120, -1, -1, 120]]


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"begin": "0", "end": "0"}, "both 0"),
        ({"begin": "100", "block": "50"}, "'block' 50 is less"),
        ({"begin": "-1"}, "parameter 'begin' '-1'"),
        ({"begin": "1e3"}, "parameter 'begin' '1e3'"),
        ({"size": "3"}, "parameter 'size' is unknown"),
    ],
)
def test_wrong_parameters_are_named(tmp_path, parameters, says):
    with pytest.raises(FailedPrecondition) as err:
        making.session(tmp_path, "byte_windows", **parameters)
    assert says in str(err.value)
