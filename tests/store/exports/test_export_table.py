"""Results as rows: every form in which a response may hold its values."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from math import inf, nan

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from services.store.exports.table import SCHEMA, table_of
from shoal.store.v1 import store_pb2 as pb

CONTENTS = [
    ("BOOL", "bool_contents", [True, False, True], "?"),
    ("INT8", "int_contents", [-128, 0, 127], "<i1"),
    ("INT16", "int_contents", [-(1 << 15), 1], "<i2"),
    ("INT32", "int_contents", [-(1 << 31), (1 << 31) - 1], "<i4"),
    ("INT64", "int64_contents", [-(1 << 63), (1 << 63) - 1], "<i8"),
    ("UINT8", "uint_contents", [0, 255], "<u1"),
    ("UINT16", "uint_contents", [0, 65535], "<u2"),
    ("UINT32", "uint_contents", [0, (1 << 32) - 1], "<u4"),
    ("UINT64", "uint64_contents", [0, (1 << 64) - 1], "<u8"),
    ("FP32", "fp32_contents", [0.5, float("inf"), -1.25], "<f4"),
    ("FP64", "fp64_contents", [0.1, -1e300], "<f8"),
]


def row(result: pb.Result) -> dict[str, object]:
    (found,) = table_of([result]).to_pylist()
    return dict(found)


@pytest.mark.parametrize(("datatype", "field", "values", "dtype"), CONTENTS, ids=[case[0] for case in CONTENTS])
def test_values_in_the_message(datatype: str, field: str, values: list[object], dtype: str) -> None:
    result = pb.Result(job_id="j", outcome=1)
    output = result.response.outputs.add(name="y", datatype=datatype, shape=[len(values)])
    getattr(output.contents, field).extend(values)
    (found,) = row(result)["outputs"]
    assert (found["name"], found["datatype"], found["shape"]) == ("y", datatype, [len(values)])
    assert np.frombuffer(found["data"], dtype).tolist() == values


def test_raw_values_and_texts_keep_their_bytes() -> None:
    result = pb.Result(job_id="j", outcome=1)
    for name in ("a", "b"):
        result.response.outputs.add(name=name, datatype="FP16", shape=[2, 1])
    result.response.raw_output_contents.extend([b"\0\1\2\3", b""])
    assert [one["data"] for one in row(result)["outputs"]] == [b"\0\1\2\3", b""]
    texts = pb.Result(job_id="j", outcome=1)
    texts.response.outputs.add(name="t", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"hi", b""])
    assert row(texts)["outputs"][0]["data"] == b"\2\0\0\0hi\0\0\0\0"


def test_a_response_that_fits_nothing_is_a_row_still() -> None:
    """What a model may have sent years ago must not stop an export of all the others."""
    odd = pb.Result(job_id="j", outcome=1)
    odd.response.outputs.add(name="a", datatype="WHAT", shape=[-3])
    odd.response.outputs.add(name="b", datatype="INT8", shape=[9]).contents.int_contents.extend([300, -300])
    first, second = row(odd)["outputs"]
    assert (first["data"], first["shape"]) == (None, [-3])
    assert second["data"] == np.int64([300, -300]).astype("<i1").tobytes()
    short = pb.Result(job_id="j", outcome=1)
    for name in "ab":
        short.response.outputs.add(name=name, datatype="INT8", shape=[1])
    short.response.raw_output_contents.append(b"x")
    assert [one["data"] for one in row(short)["outputs"]] == [b"x", None]


def test_parameters_of_every_kind() -> None:
    result = pb.Result(job_id="j", outcome=1)
    parameters = result.response.parameters
    parameters["b"].bool_param = True
    parameters["i"].int64_param = -(1 << 63)
    parameters["s"].string_param = 'q"ü'
    parameters["d"].double_param = 0.5
    parameters["none"].SetInParent()
    assert json.loads(str(row(result)["parameters"])) == {
        "b": True, "i": -(1 << 63), "s": 'q"ü', "d": 0.5, "none": None
    }  # fmt: skip


@pytest.mark.parametrize(("number", "told"), [(nan, "NaN"), (inf, "Infinity"), (-inf, "-Infinity")])
def test_parameters_that_json_has_no_number_for(number: float, told: str) -> None:
    result = pb.Result(job_id="j", outcome=1)
    result.response.parameters["d"].double_param = number

    def refused(word: str) -> float:
        raise AssertionError(f"{word} is no JSON, whatever Python says")

    assert json.loads(str(row(result)["parameters"]), parse_constant=refused) == {"d": told}


def test_a_failure_has_no_answer() -> None:
    found = row(pb.Result(job_id="j", outcome=pb.Result.OUTCOME_FAILED, code=13, message="boom"))
    assert (found["outcome"], found["code"], found["message"]) == ("failed", 13, "boom")
    assert (found["outputs"], found["parameters"], found["submitted_at"]) == (None, None, None)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
whole = st.builds(
    pb.Result,
    job_id=text, outcome=st.sampled_from([1, 2, 3, 4]), model_name=text, model_version=text, tenant=text, message=text,
    labels=st.dictionaries(text, text, max_size=4), code=st.integers(0, 16), instance=text,
    attempt=st.integers(0, (1 << 31) - 1),
    submitted_at=st.builds(
        Timestamp, seconds=st.integers(-62135596800, 253402300799), nanos=st.integers(0, 999_999_999)
    ),
    recorded_at=st.builds(Timestamp, seconds=st.integers(0, 253402300799)),
)  # fmt: skip


@given(st.lists(whole, max_size=4))
def test_any_result_is_its_row(results: list[pb.Result]) -> None:
    table = table_of(results)
    assert table.schema == SCHEMA
    for result, found in zip(results, table.to_pylist(), strict=True):
        for field in ("job_id", "model_name", "tenant", "message", "code", "attempt", "instance"):
            assert found[field] == getattr(result, field)
        assert dict(found["labels"]) == dict(result.labels)
        assert found["recorded_at"] == result.recorded_at.ToDatetime(UTC)
        epoch = datetime(1970, 1, 1, tzinfo=UTC)
        microseconds = round((found["submitted_at"] - epoch).total_seconds() * 1_000_000)
        expected = result.submitted_at.seconds * 1_000_000 + result.submitted_at.nanos // 1_000
        assert abs(microseconds - expected) <= 64  # A float of seconds in the year 9999 has no more digits.
