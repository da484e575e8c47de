"""The classification extension: the best classes of an output as text, "value:index[:label]"."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from tests.infer.conformance import wire
from tests.infer.conformance.wire import Given


def classify(stub, model, given, k, kind="int64_param"):
    asked = wire.request(model, given, outputs=["y"])
    wire.put(asked.outputs[0].parameters["classification"], (kind, k))
    return stub.ModelInfer(asked, timeout=wire.PATIENCE_S)


def scores(*rows):
    array = np.array(rows, "<f4")
    return Given("x", "FP32", array.shape, array.tobytes())


def texts(response):
    assert response.outputs[0].datatype == "BYTES"
    return [[text.decode() for text in row] for row in wire.array(response, "y")]


def test_the_best_classes_with_their_labels(stub):
    response = classify(stub, "classes", scores([0.1, 0.5, 0.25, -1, 2]), 3)
    assert list(response.outputs[0].shape) == [1, 3]
    assert texts(response) == [["2.000000:4", "0.500000:1:bee", "0.250000:2:cat"]]


@pytest.mark.parametrize(("k", "given"), [(1, 1), (5, 5), (6, 5), (2**62, 5)])
def test_more_than_there_are_means_all(stub, k, given):
    (row,) = texts(classify(stub, "classes", scores([1, 2, 3, 4, 5]), k))
    assert len(row) == given
    assert row[0] == "5.000000:4"


def test_each_row_has_its_own(stub):
    response = classify(stub, "classes", scores([5, 0, 0, 0, 0], [0, 0, 7, 0, 0]), 1)
    assert list(response.outputs[0].shape) == [2, 1]
    assert texts(response) == [["5.000000:0:ant"], ["7.000000:2:cat"]]


def test_integers_are_written_as_integers(stub):
    given = Given("x", "INT64", (1, 3), np.array([3, -2, 2**62], "<i8").tobytes())
    assert texts(classify(stub, "same_int64", given, 2)) == [[f"{2**62}:2", "3:0"]]
    given = Given("x", "UINT8", (1, 3), bytes([3, 200, 0]))
    assert texts(classify(stub, "same_uint8", given, 2)) == [["200:1", "3:0"]]


@pytest.mark.parametrize(
    ("k", "kind"), [(0, "int64_param"), (-1, "int64_param"), ("2", "string_param"), (True, "bool_param")]
)
def test_a_count_that_is_none(refused, k, kind):
    asked = wire.request("classes", scores([1, 2, 3, 4, 5]), outputs=["y"])
    wire.put(asked.outputs[0].parameters["classification"], (kind, k))
    message = refused("INVALID_ARGUMENT", asked)
    assert "classification" in message
    assert "'y'" in message


def test_text_has_no_classes(refused):
    asked = wire.request("same_bytes", Given("x", "BYTES", (1, 1), wire.packed([b"a"])), outputs=["y"])
    wire.put(asked.outputs[0].parameters["classification"], 1)
    assert "BYTES" in refused("INVALID_ARGUMENT", asked)


def test_one_output_classified_and_the_other_as_it_is(stub):
    asked = wire.request("add", wire.floats("a"), wire.floats("b"), outputs=["sum", "difference"])
    wire.put(asked.outputs[0].parameters["classification"], 1)
    response = stub.ModelInfer(asked, timeout=wire.PATIENCE_S)
    assert [output.datatype for output in response.outputs] == ["BYTES", "FP32"]
    assert wire.unpacked(response.raw_output_contents[0]) == [b"8.000000:3"]
    assert wire.array(response, "difference").tolist() == [[0, 0, 0, 0]]


def test_the_classes_of_a_response_are_bounded(stub):
    given = Given("x", "INT64", (1, 100_001), np.arange(100_001, dtype="<i8").tobytes())
    with pytest.raises(grpc.RpcError) as caught:
        classify(stub, "same_int64", given, 2**62)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "output 'y': a classification of 100001 classes in 1 rows: at most 100000" in caught.value.details()
    (row,) = texts(classify(stub, "same_int64", given, 100_000))
    assert (len(row), row[0]) == (100_000, "100000:100000")
