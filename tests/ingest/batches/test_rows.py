"""From cells to tensors and back: every value keeps its meaning, or its row fails and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.batches.batch import Format
from services.ingest.batches.mapping import (
    RequestedColumns,
    available_columns,
    check_file,
    kept_arrays,
    kept_schema,
    map_columns,
    object_columns,
)
from services.ingest.batches.outputs.columns import Columns
from services.ingest.batches.outputs.part import OutputPart
from services.ingest.batches.outputs.part_summary import RowError, RowOrigins
from services.ingest.batches.readers import rows_of
from services.ingest.batches.rows.fitting import fit
from services.ingest.batches.rows.signature import Signature, TensorSpec, signature_of
from services.ingest.batches.rows.stacking import STACK_BYTES, Stack, stacks
from services.ingest.batches.rows.wire import ModelTarget, outputs_of, request_of
from shoal.errors import DataLoss, FailedPrecondition, InvalidArgument
from shoal.inference.v2 import inference_pb2 as oip
from shoal.inference.v2 import model_config_pb2
from shoal.oip.datatypes import DTYPES
from tests.ingest.batches.making import locations, write_lines, write_npz, write_parquet

X4 = TensorSpec("x", "FP32", (4,))


@pytest.mark.parametrize(
    ("spec", "cell", "row"),
    [
        (TensorSpec("x", "FP32", ()), 1.5, 1.5),
        (TensorSpec("x", "FP32", (1,)), 1.5, [1.5]),
        (X4, [1, 2, 3, 4], [1, 2, 3, 4]),
        (TensorSpec("x", "FP32", (2, 2)), [1, 2, 3, 4], [[1, 2], [3, 4]]),
        (TensorSpec("x", "FP32", (2, 2)), [[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        (TensorSpec("x", "INT64", (-1,)), [1, 2, 3], [1, 2, 3]),
        (TensorSpec("x", "INT64", (-1, 2)), [[1, 2]], [[1, 2]]),
        (TensorSpec("x", "UINT8", ()), 255.0, 255),
        (TensorSpec("x", "BOOL", ()), True, True),
        (TensorSpec("x", "BYTES", ()), "ü", "ü".encode()),
        (TensorSpec("x", "BYTES", (1,)), b"\0", [b"\0"]),
        (TensorSpec("x", "BYTES", (2,)), ["a", "bc"], [b"a", b"bc"]),
        (TensorSpec("x", "FP16", ()), 0.1, np.float16(0.1)),
        (TensorSpec("x", "BF16", ()), 1.0, 0x3F80),
        (TensorSpec("x", "UINT64", ()), 2**64 - 1, 2**64 - 1),
    ],
    ids=str,
)
def test_a_cell_that_fits(spec: TensorSpec, cell: Any, row: Any) -> None:
    fitted = fit(spec, [cell])
    assert not fitted.errors
    assert fitted.stacked([0]).tolist() == [row if not isinstance(row, np.generic) else row.item()]


@pytest.mark.parametrize(
    ("spec", "cell", "words"),
    [
        (X4, [1, 2, 3], r"expected the shape \[4\], got \[3\]"),
        (X4, None, "no value"),
        (X4, "a", r"expected FP32 \[4\], got"),
        (X4, [1, 2, 3, None], "expected FP32"),
        (X4, [1, 2, [3], 4], "expected FP32"),
        (X4, {"a": 1}, "expected FP32"),
        (X4, [1, 2, 3, 1e300], "is not FP32"),
        (TensorSpec("x", "INT8", ()), 300, "300 is not INT8"),
        (TensorSpec("x", "INT8", ()), 1.5, "1.5 is not INT8"),
        (TensorSpec("x", "INT64", ()), 2**80, "expected INT64"),
        (TensorSpec("x", "INT32", ()), float("nan"), "is not INT32"),
        (TensorSpec("x", "UINT8", ()), -1, "-1 is not UINT8"),
        (TensorSpec("x", "INT64", (-1, 4)), [1, 2, 3, 4], "expected the shape"),
        (TensorSpec("x", "BYTES", ()), 7, "expected BYTES"),
        (TensorSpec("x", "BYTES", ()), "\ud800", "not text"),
        (TensorSpec("x", "BYTES", (2,)), ["a", 1], "expected BYTES"),
        (TensorSpec("x", "FP32", (0,)), [1], "expected the shape"),
    ],
    ids=str,
)
def test_a_cell_that_does_not_fit_fails_alone(spec: TensorSpec, cell: Any, words: str) -> None:
    good = {"BYTES": "ok"}.get(spec.datatype, 1)
    fine: Any = good
    for size in reversed(spec.shape):
        fine = [fine] * (1 if size < 0 else size)
    fitted = fit(spec, [fine, cell, fine])
    assert [*fitted.errors] == [1]
    import re

    assert re.search(words, fitted.errors[1]), fitted.errors[1]
    assert len(fitted.stacked([0, 2])) == 2


@given(
    values=st.lists(
        st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
    ),
    datatype=st.sampled_from([*DTYPES, "BYTES"]),
)
def test_whatever_comes_is_kept_or_fails(values: list[Any], datatype: str) -> None:
    if not values:
        return
    spec = TensorSpec("x", datatype, ())
    fitted = fit(spec, values)
    for row, value in enumerate(values):
        single = fit(spec, [value])
        assert (row in fitted.errors) == bool(single.errors), (value, fitted.errors, single.errors)
        if row in fitted.errors:
            continue
        got = fitted.stacked([row])[0]
        if datatype == "BYTES":
            assert got == value.encode()
        elif DTYPES[datatype].kind in "iub" and datatype != "BF16":
            assert got == value
        elif datatype in ("FP32", "FP64", "FP16"):
            assert np.isnan(value) if np.isnan(got) else np.isinf(value) == np.isinf(got)


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=40),
    most=st.integers(1, 6),
    bad=st.sets(st.integers(0, 39)),
)
def test_stacks_hold_every_good_row_once_and_one_shape_each(lengths: list[int], most: int, bad: set[int]) -> None:
    cells = [[float(n)] * length for n, length in enumerate(lengths)]
    fitted = fit(TensorSpec("x", "FP32", (-1,)), cells)
    good = [row for row in range(len(cells)) if row not in bad]
    found = list(stacks([fitted], good, most))
    assert [row for stack in found for row in stack.rows] == good
    for stack in found:
        assert 1 <= len(stack.rows) <= most
        array = fitted.stacked(stack.rows)
        assert array.shape == (len(stack.rows), lengths[stack.rows[0]])
        assert array[:, 0].tolist() == list(stack.rows)


def test_stacks_end_before_they_are_too_large() -> None:
    rows = np.zeros((5, STACK_BYTES // 8), np.float32)
    fitted = fit(TensorSpec("x", "FP32", (STACK_BYTES // 8,)), rows)
    assert [len(stack.rows) for stack in stacks([fitted], range(5), 64)] == [2, 2, 1]
    texts = fit(TensorSpec("x", "BYTES", ()), ["a" * (STACK_BYTES // 2)] * 3)
    assert [len(stack.rows) for stack in stacks([texts], range(3), 64)] == [2, 1]


def metadata(**shapes: Any) -> oip.ModelMetadataResponse:
    found = oip.ModelMetadataResponse(name="m")
    found.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
    found.inputs.add(name="z", datatype="BYTES", shape=[-1, 1])
    found.outputs.add(name="y", datatype="FP32", shape=[-1, 4])
    found.outputs.add(name="label", datatype="BYTES", shape=[-1])
    return found


def config(**fields: Any) -> model_config_pb2.ModelConfig:
    found = model_config_pb2.ModelConfig(name="m", max_batch_size=8, **fields)
    found.input.add(name="x")
    found.input.add(name="z", optional=True)
    return found


def test_a_signature_is_that_of_a_row() -> None:
    found = signature_of(metadata(), config(), [])
    assert found == Signature(
        (X4, TensorSpec("z", "BYTES", (1,), True)), (TensorSpec("y", "FP32", (4,)), TensorSpec("label", "BYTES", ())), 8
    )
    assert [spec.name for spec in signature_of(metadata(), config(), ["label"]).outputs] == ["label"]
    with pytest.raises(InvalidArgument, match="no output 'nope'"):
        signature_of(metadata(), config(), ["nope"])


def test_models_that_no_batch_can_use_are_refused() -> None:
    decoupled = config(model_transaction_policy=model_config_pb2.ModelTransactionPolicy(decoupled=True))
    with pytest.raises(FailedPrecondition, match="decoupled"):
        signature_of(metadata(), decoupled, [])
    stateful = config(sequence_batching=model_config_pb2.ModelSequenceBatching())
    with pytest.raises(FailedPrecondition, match="stateful"):
        signature_of(metadata(), stateful, [])


def test_a_request_and_its_answer() -> None:
    signature = signature_of(metadata(), config(), [])
    inputs = [fit(X4, [[1, 2, 3, 4], [5, 6, 7, 8]]), fit(TensorSpec("z", "BYTES", (1,), True), ["a", "bc"])]
    request = oip.ModelInferRequest.FromString(request_of(ModelTarget("m", "", signature), inputs, Stack((0, 1))))
    assert [list(tensor.shape) for tensor in request.inputs] == [[2, 4], [2, 1]]
    assert request.raw_input_contents[1] == b"\1\0\0\0a\2\0\0\0bc"
    answer = oip.ModelInferResponse()
    answer.outputs.add(name="label", datatype="BYTES", shape=[2])
    answer.outputs.add(name="y", datatype="FP32", shape=[2, 4])
    answer.raw_output_contents.extend([b"\1\0\0\0p\0\0\0\0", request.raw_input_contents[0]])
    outputs = outputs_of(signature, answer, 2)
    assert outputs["label"].tolist() == [b"p", b""]
    assert outputs["y"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_model_without_a_batch_dimension_gets_a_row_as_it_is() -> None:
    signature = Signature((X4,), (TensorSpec("y", "FP32", (4,)),), 0)
    request = oip.ModelInferRequest.FromString(
        request_of(ModelTarget("m", "", signature), [fit(X4, [[1, 2, 3, 4]])], Stack((0,)))
    )
    assert list(request.inputs[0].shape) == [4]
    answer = oip.ModelInferResponse()
    tensor = answer.outputs.add(name="y", datatype="FP32", shape=[4])
    tensor.contents.fp32_contents.extend([1, 2, 3, 4])
    assert outputs_of(signature, answer, 1)["y"].tolist() == [[1, 2, 3, 4]]
    text = Signature((TensorSpec("z", "BYTES", ()),), (), 0)
    request = oip.ModelInferRequest.FromString(
        request_of(ModelTarget("m", "", text), [fit(text.inputs[0], ["a"])], Stack((0,)))
    )
    assert (list(request.inputs[0].shape), request.raw_input_contents[0]) == ([], b"\1\0\0\0a")


@pytest.mark.parametrize(
    ("shape", "datatype", "raw"),
    [
        ([3, 4], "FP32", bytes(48)),
        ([2, 2, 2], "FP32", bytes(32)),
        ([2, 4], "FP64", bytes(64)),
        ([2, 4], "FP32", bytes(31)),
        ([-2, -4], "FP32", bytes(32)),
    ],
)
def test_an_answer_that_breaks_the_models_promise_is_none(shape: list[int], datatype: str, raw: bytes) -> None:
    signature = Signature((X4,), (TensorSpec("y", "FP32", (4,)),), 8)
    answer = oip.ModelInferResponse(raw_output_contents=[raw])
    answer.outputs.add(name="y", datatype=datatype, shape=shape)
    with pytest.raises(DataLoss):
        outputs_of(signature, answer, 2)
    with pytest.raises(DataLoss, match="without its output"):
        outputs_of(signature, oip.ModelInferResponse(), 2)


SIGNATURE = Signature((X4, TensorSpec("z", "BYTES", (), True)), (TensorSpec("y", "FP32", (4,)),), 8)


def test_columns_feed_inputs_by_name_or_as_told() -> None:
    assert map_columns("m", SIGNATURE, {}, ["x", "q"]) == ((X4, "x"),)
    assert [column for _, column in map_columns("m", SIGNATURE, {"z": "q"}, ["x", "q"])] == ["x", "q"]
    with pytest.raises(InvalidArgument, match="needs a column 'x', and the inputs have the columns a, b: say which"):
        map_columns("m", SIGNATURE, {}, ["b", "a"])
    with pytest.raises(InvalidArgument, match="needs a column 'nope'"):
        map_columns("m", SIGNATURE, {"z": "nope"}, ["x"])
    with pytest.raises(InvalidArgument, match="no input 'w': it takes x FP32"):
        map_columns("m", SIGNATURE, {"w": "x"}, ["x"])
    assert object_columns("m", Signature((TensorSpec("i", "BYTES", ()),), (), 8), {})[0][1] == "content"
    with pytest.raises(InvalidArgument, match="needs a column 'x'"):
        object_columns("m", SIGNATURE, {})
    with pytest.raises(InvalidArgument, match="the model takes x FP32"):
        object_columns("m", SIGNATURE, {"x": "content"})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"y": [1]}, "no column 'x'"),
        ({"x": ["a"]}, "holds string, and the model takes x FP32"),
        ({"x": [[[1.0]]]}, "holds list"),
        ({"x": [1]}, "holds int64, and the model takes x FP32"),
        ({"x": pa.array([[1, 2, 3]], pa.list_(pa.int8(), 3))}, "holds fixed_size_list"),
        ({"x": [[1, 2, 3, 4]]}, ""),
        ({"x": pa.array([[1, 2, 3, 4]], pa.list_(pa.int8(), 4))}, ""),
    ],
    ids=["missing", "text", "deep", "scalar", "short", "list", "fixed"],
)
def test_parquet_is_looked_at_before_anything_runs(table: Any, words: str, tmp_path: Path) -> None:
    requested = RequestedColumns(((X4, "x"),), pa.schema([]))
    with locations().open(locations().stat(write_parquet(tmp_path / "a.parquet", table))) as file:
        if words:
            with pytest.raises(InvalidArgument, match=words):
                check_file(Format.PARQUET, file, requested)
        else:
            check_file(Format.PARQUET, file, requested)


def test_npz_is_looked_at_before_anything_runs(tmp_path: Path) -> None:
    requested = RequestedColumns(((X4, "x"),), pa.schema([pa.field("id", pa.int64())]))
    cases = [
        ({"x": np.ones((3, 4)), "id": np.arange(3)}, ""),
        ({"x": np.ones((3, 4))}, "no array 'id'"),
        ({"x": np.ones((3, 4)), "id": np.arange(2)}, "different numbers of rows"),
        ({"x": np.ones((3, 5)), "id": np.arange(3)}, "expected the shape"),
        ({"x": np.ones((3, 4)), "id": np.ones(3)}, "is not int64"),
        ({"x": np.array(["a"]), "id": np.arange(1)}, "holds <U1"),
    ]
    for n, (arrays, words) in enumerate(cases):
        with locations().open(locations().stat(write_npz(tmp_path / f"{n}.npz", **arrays))) as file:
            if words:
                with pytest.raises(InvalidArgument, match=words):
                    check_file(Format.NPZ, file, requested)
            else:
                check_file(Format.NPZ, file, requested)


def test_lines_are_refused_when_none_of_the_first_is_fit(tmp_path: Path) -> None:
    requested = RequestedColumns(((X4, "x"),), pa.schema([]))
    some = write_lines(tmp_path / "some.jsonl", [{"x": 1}, {"x": [1, 2, 3, 4]}])
    none = write_lines(tmp_path / "none.jsonl", [{"x": 1}, {"y": 1}])
    with locations().open(locations().stat(some)) as file:
        check_file(Format.JSONL, file, requested)
    with (
        locations().open(locations().stat(none)) as file,
        pytest.raises(InvalidArgument, match="none of the first 2 rows"),
    ):
        check_file(Format.JSONL, file, requested)


def test_kept_columns_have_the_types_of_the_first_file(tmp_path: Path) -> None:
    rows = [{"x": 1, "i": 1, "f": 1.5, "s": "a", "m": [1], "b": True}, {"x": 1, "i": None, "f": 2, "s": "b", "m": "t"}]
    others = [{"i": "no", "f": 1, "s": "c"}, {"i": 1.5}, {"i": True}, {"i": 2.0, "f": 2**60 + 1}, {"i": 3}]
    url = write_lines(tmp_path / "a.jsonl", [*rows, *({"x": 1, **row} for row in others)])
    with locations().open(locations().stat(url)) as file:
        assert available_columns(Format.JSONL, file) == ["b", "f", "i", "m", "s", "x"]
        with pytest.raises(InvalidArgument, match="no column 'nope': there are"):
            kept_schema(Format.JSONL, file, ["nope"])
    short = write_lines(tmp_path / "b.jsonl", rows)
    with locations().open(locations().stat(short)) as file:
        schema = kept_schema(Format.JSONL, file, ["i", "f", "s", "m", "b"])
    assert [str(kind) for kind in schema.types] == ["int64", "double", "string", "string", "bool"]
    requested = RequestedColumns((), pa.ipc.read_schema(pa.BufferReader(schema.serialize())))
    reader = rows_of(Format.JSONL, locations().open(locations().stat(url)), requested.columns)
    arrays, errors = kept_arrays(requested, reader.read(10))
    assert sorted(errors) == [2, 3, 4, 5]
    assert all("is not int64" in errors[row] for row in (2, 3, 4))
    assert "is not double" in errors[5]
    assert arrays["m"].to_pylist() == ["[1]", '"t"', *[None] * 5]
    assert arrays["i"].to_pylist() == [1, None, None, None, None, 2, 3]


COLUMNS = Columns(
    (
        TensorSpec("y", "FP32", (2, 2)),
        TensorSpec("h", "BF16", ()),
        TensorSpec("label", "BYTES", ()),
        TensorSpec("raw", "BYTES", (-1,)),
        TensorSpec("half", "FP16", ()),
    ),
    frozenset({"label"}),
    {"id": pa.int64()},
)


def outputs(n: int) -> dict[str, Any]:
    raw = np.empty((n, 2), object)
    raw[:] = b"\xff"
    return {
        "y": np.arange(4 * n, dtype=np.float32).reshape(n, 2, 2),
        "h": np.full(n, 0x3F80, np.uint16),
        "label": np.array(["ü".encode()] * n, object),
        "raw": raw,
        "half": np.full(n, 0.5, np.float16),
    }


def test_a_part_has_the_rows_in_their_order_and_types(tmp_path: Path) -> None:
    with OutputPart(tmp_path, "p", COLUMNS) as part:
        for first in (0, 3):
            about = RowOrigins(range(first, first + 3), ["file:///a"] * 3, range(3))
            part.add(about, {"id": pa.array([7, None, 9])}, outputs(3))
        part.add_failed(
            RowOrigins([6, 7], ["file:///a"] * 2, [6, 7]), [RowError("INTERNAL", "boom", 5), RowError("X", "\ud800")]
        )
        written = part.finish()
        table, dead = pq.read_table(part.file), pq.read_table(part.dead_file)
    assert (written.rows, written.failed, dict(written.codes)) == (6, 2, {"INTERNAL": 1, "X": 1})
    assert table.column("row").to_pylist() == list(range(6))
    assert table.column("y").to_pylist()[1] == [[4, 5], [6, 7]]
    assert table.column("h").to_pylist() == [1.0] * 6
    assert table.column("label").to_pylist() == ["ü"] * 6
    assert table.column("raw").to_pylist() == [[b"\xff", b"\xff"]] * 6
    assert table.column("id").to_pylist() == [7, None, 9] * 2
    assert dead.column("reason").to_pylist() == ["boom", "?"]
    assert not list(tmp_path.iterdir()), "what is not taken away is removed"


def test_a_text_that_is_none_is_said_so(tmp_path: Path) -> None:
    bad = {**outputs(1), "label": np.array([b"\xff"], object)}
    with OutputPart(tmp_path, "p", COLUMNS) as part, pytest.raises(ValueError, match="utf-8"):
        part.add(RowOrigins([0], ["a"], [0]), {"id": pa.array([1])}, bad)


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="two columns of the results would be named 'row'"):
        Columns((TensorSpec("row", "FP32", ()),), frozenset(), {}).schema()


def test_a_part_of_many_rows_keeps_little_in_memory(tmp_path: Path) -> None:
    wide = Columns((TensorSpec("y", "FP32", (1 << 18,)),), frozenset(), {})
    with OutputPart(tmp_path, "p", wide) as part:
        for n in range(40):
            part.add(RowOrigins([n], ["a"], [n]), {}, {"y": np.full((1, 1 << 18), n, np.float32)})
            assert part._held < 18 << 20
        part.finish()
        assert pq.ParquetFile(part.file).metadata.num_row_groups > 1
        assert pq.read_table(part.file).num_rows == 40
