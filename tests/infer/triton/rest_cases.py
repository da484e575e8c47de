"""Requests over REST for both servers. Each case has a name, by which docs/compatibility.md lists a difference."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.infer.triton import repository


@dataclass(frozen=True)
class RestCase:
    """One request."""

    name: str
    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def every() -> dict[str, RestCase]:
    """All cases by name."""
    cases = [
        case
        for group in (_plain, _paths, _json, _values, _outputs, _binary, _compressed, _generate)
        for case in group()
    ]
    named = {case.name: case for case in cases}
    assert len(named) == len(cases), "two cases have one name"
    return named


def _tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4], **changes}


def _infer(name: str, document: Any, model: str = "double", **headers: str) -> RestCase:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return RestCase(name, "POST", f"/v2/models/{model}/infer", body, headers)


def _plain() -> Iterator[RestCase]:
    for name, path in {
        "live": "health/live",
        "ready": "health/ready",
        "model ready": "models/double/ready",
        "version ready": "models/double/versions/1/ready",
        "unknown model ready": "models/none/ready",
        "unknown version ready": "models/double/versions/7/ready",
        "metadata": "models/double",
        "metadata of a version": "models/double/versions/1",
        "metadata of an unknown model": "models/none",
        "metadata of an unknown version": "models/double/versions/7",
        "metadata of an ensemble": "models/chain",
        "config of an unknown model": "models/none/config",
        "statistics of an unknown model": "models/none/stats",
    }.items():
        yield RestCase(name, "GET", f"/v2/{path}")
    yield RestCase("index", "POST", "/v2/repository/index")
    yield RestCase("index of ready models", "POST", "/v2/repository/index", b'{"ready": true}')
    yield RestCase("load of an unknown model", "POST", "/v2/repository/models/none/load")
    yield RestCase("unload of an unknown model", "POST", "/v2/repository/models/none/unload")


def _paths() -> Iterator[RestCase]:
    for path in (
        "/",
        "/v2/nothing",
        "/v2/models/double/nothing",
        "/v2/models/double/versions/abc",
        "/v1/models/double",
    ):
        yield RestCase(f"path {path}", "GET", path)
    yield RestCase("path with dots", "GET", "/v2/models/../health/live")
    yield RestCase("path with encoded dots", "GET", "/v2/models/%2e%2e/ready")
    yield RestCase("method: POST of ready", "POST", "/v2/health/ready")
    yield RestCase("method: GET of infer", "GET", "/v2/models/double/infer")
    yield RestCase("method: PUT of infer", "PUT", "/v2/models/double/infer", b"{}")
    yield RestCase("method: GET of the index", "GET", "/v2/repository/index")
    yield RestCase("method: FOO of infer", "FOO", "/v2/models/double/infer", b"{}")
    yield RestCase("name, percent-encoded", "GET", "/v2/models/dou%62le/ready")


def _json() -> Iterator[RestCase]:
    yield _infer("infer", {"inputs": [_tensor()]})
    yield _infer("infer with an id", {"id": "i", "inputs": [_tensor()]})
    yield _infer(
        "infer with parameters", {"parameters": {"a": 1, "b": "x", "c": True, "d": 1.5}, "inputs": [_tensor()]}
    )
    yield _infer("infer of an unknown model", {"inputs": [_tensor()]}, "none")
    yield RestCase(
        "infer of a version",
        "POST",
        "/v2/models/versions/versions/2/infer",
        json.dumps({"inputs": [_tensor(shape=[1, 4])]}).encode(),
    )
    yield RestCase(
        "infer of an unknown version",
        "POST",
        "/v2/models/double/versions/7/infer",
        json.dumps({"inputs": [_tensor()]}).encode(),
    )
    yield _infer("infer of a decoupled model", {"inputs": [_tensor()]}, "repeat")
    yield _infer("infer of an ensemble", {"inputs": [_tensor()]}, "chain")
    yield _infer(
        "the model raised", {"inputs": [_tensor(name="i", datatype="INT64", shape=[1, 1], data=[7])]}, "lookup"
    )
    for name, body in {
        "json: cut": b"{",
        "json: a list": b"[]",
        "json: no inputs": b"{}",
        "json: inputs are a number": b'{"inputs": 5}',
        "json: an input is a number": b'{"inputs": [5]}',
        "json: followed by more": b'{"inputs": []} x',
        "json: no inputs given": b'{"inputs": []}',
    }.items():
        yield _infer(name, body)
    for name, tensor in {
        "no name": {"shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]},
        "no shape": {"name": "x", "datatype": "FP32", "data": [1, 2, 3, 4]},
        "no datatype": {"name": "x", "shape": [1, 4], "data": [1, 2, 3, 4]},
        "no data": {"name": "x", "shape": [1, 4], "datatype": "FP32"},
        "data and binary size": _tensor(parameters={"binary_data_size": 16}),
        "too few values": _tensor(data=[1, 2, 3]),
        "too many values": _tensor(data=[1, 2, 3, 4, 5]),
        "data is a number": _tensor(data=7),
        "unknown datatype": _tensor(datatype="FP99"),
        "other datatype": _tensor(datatype="INT32"),
        "shape is text": _tensor(shape="a"),
        "negative shape": _tensor(shape=[1, -4]),
        "shape with a fraction": _tensor(shape=[1, 4.5]),
        "other shape": _tensor(shape=[1, 3], data=[1, 2, 3]),
        "too many rows": _tensor(shape=[9, 4], data=[1] * 36),
        "unknown input": _tensor(name="z"),
    }.items():
        yield _infer(f"input: {name}", {"inputs": [tensor]})
    yield _infer("input: twice", {"inputs": [_tensor(), _tensor()]})
    yield _infer("id is a number", {"id": 7, "inputs": [_tensor()]})
    yield _infer("parameter is a list", {"parameters": {"a": [1]}, "inputs": [_tensor()]})
    yield _infer("parameter is reserved", {"parameters": {"triton_x": 1}, "inputs": [_tensor()]})
    yield _infer("timeout is text", {"parameters": {"timeout": "a"}, "inputs": [_tensor()]})
    yield _infer("input: parameters are null", {"inputs": [_tensor(parameters=None)]})
    good = json.dumps({"inputs": [_tensor()]}).encode()
    yield _infer("json: a member twice", good.replace(b'"data": [', b'"data": [5, 6, 7, 8], "data": ['))
    sequence = b'{"parameters": {"sequence_id": 1, "sequence_id": 2, "sequence_start": true}, '
    step = _tensor(shape=[1, 1], data=[1])
    yield _infer("json: sequence_id twice", sequence + json.dumps({"inputs": [step]}).encode()[1:], "steps")
    yield _infer("json: a byte order mark", b"\xef\xbb\xbf" + good)
    yield _infer("json: nested 5,000 deep", b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b", " + good[1:])
    yield _infer("json: malformed, of a decoupled model", b"{", "repeat")


_VALUES = {"BOOL": [True, False], "FP32": [0.1, -2.5e-38], "FP64": [0.1, 1e300], "BYTES": ["a", 'é中\n"\\']}


def _values() -> Iterator[RestCase]:
    for datatype in (*repository.DATATYPES, "BYTES"):
        model = f"same_{datatype.lower()}"
        values = _VALUES.get(datatype, [1, 0])
        tensor = _tensor(datatype=datatype, shape=[1, 2], data=values)
        yield _infer(f"{datatype} as JSON", {"inputs": [tensor]}, model)
        yield _infer(f"{datatype} as JSON, nested", {"inputs": [{**tensor, "data": [values]}]}, model)
        yield _infer(f"{datatype} as JSON, null", {"inputs": [{**tensor, "data": [values[0], None]}]}, model)
        yield _infer(f"{datatype} as JSON, an object", {"inputs": [{**tensor, "data": [values[0], {}]}]}, model)
        other = [1, 2] if datatype == "BYTES" else ["1", "2"]
        yield _infer(f"{datatype} as JSON, of another kind", {"inputs": [{**tensor, "data": other}]}, model)
        yield _infer(f"{datatype} as JSON, true", {"inputs": [{**tensor, "data": [True, True]}]}, model)
        yield _infer(f"{datatype} as JSON, no elements", {"inputs": [{**tensor, "shape": [1, 0], "data": []}]}, model)
    yield _infer(
        "INT8 as JSON, out of range", {"inputs": [_tensor(datatype="INT8", shape=[1, 1], data=[128])]}, "same_int8"
    )
    yield _infer(
        "UINT8 as JSON, negative", {"inputs": [_tensor(datatype="UINT8", shape=[1, 1], data=[-1])]}, "same_uint8"
    )
    yield _infer(
        "INT8 as JSON, a fraction", {"inputs": [_tensor(datatype="INT8", shape=[1, 1], data=[1.5])]}, "same_int8"
    )
    large = _tensor(datatype="UINT64", shape=[1, 2], data=[2**64 - 1, 2**63])
    yield _infer("UINT64 as JSON, large", {"inputs": [large]}, "same_uint64")
    least = _tensor(datatype="INT64", shape=[1, 2], data=[2**63 - 1, -(2**63)])
    yield _infer("INT64 as JSON, large", {"inputs": [least]}, "same_int64")
    special = (
        b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [NaN, Infinity, -Infinity, 1e39]}]}'
    )
    yield _infer("FP32 as JSON, special values", special)
    for number in ("Inf", "-NaN"):
        yield _infer(f"FP32 as JSON, {number}", special.replace(b"-Infinity", number.encode()))
    yield _infer("data nested unevenly", {"inputs": [_tensor(data=[[1, 2], [3], 4])]})
    yield _infer("data nested otherwise than the shape", {"inputs": [_tensor(data=[[1, 2], [3, 4]])]})
    yield _infer("data nested deeper than the shape", {"inputs": [_tensor(data=[[[1, 2], [3, 4]]])]})


def _outputs() -> Iterator[RestCase]:
    def wanted(name: str, *outputs: dict[str, Any], model: str = "double", **more: Any) -> RestCase:
        tensor = _tensor() if model == "double" else _tensor(shape=[1, 5], data=[1, 5, 2, 4, 3])
        return _infer(f"output: {name}", {"inputs": [tensor], "outputs": list(outputs), **more}, model)

    yield wanted("by name", {"name": "y"})
    yield wanted("unknown", {"name": "z"})
    yield wanted("no name", {})
    yield wanted("binary", {"name": "y", "parameters": {"binary_data": True}})
    yield wanted("as JSON", {"name": "y", "parameters": {"binary_data": False}})
    yield wanted("binary is a number", {"name": "y", "parameters": {"binary_data": 1}})
    yield wanted("all binary", parameters={"binary_data_output": True})
    yield wanted(
        "all binary, but one",
        {"name": "y", "parameters": {"binary_data": False}},
        parameters={"binary_data_output": True},
    )
    yield wanted("all binary is a number", parameters={"binary_data_output": 1})
    yield wanted("classes", {"name": "y", "parameters": {"classification": 2}}, model="classes")
    yield wanted(
        "classes, binary", {"name": "y", "parameters": {"classification": 2, "binary_data": True}}, model="classes"
    )
    yield wanted("classes: none", {"name": "y", "parameters": {"classification": 0}}, model="classes")
    yield wanted("parameters are null", {"name": "y", "parameters": None})
    yield wanted("classes is text", {"name": "y", "parameters": {"classification": "2"}}, model="classes")
    yield _binary_case("output: FP16 as JSON", "same_fp16", "FP16", [1, 2], b"\0\x3c\0\x40")


def _binary_case(
    name: str,
    model: str,
    datatype: str,
    shape: list[int],
    data: bytes,
    *,
    length: str | None = None,
    size: Any = None,
    **more: Any,
) -> RestCase:
    tensor = {
        "name": "x",
        "shape": shape,
        "datatype": datatype,
        "parameters": {"binary_data_size": len(data) if size is None else size},
    }
    head = json.dumps({"inputs": [tensor], **more}).encode()
    header = str(len(head)) if length is None else length
    return RestCase(name, "POST", f"/v2/models/{model}/infer", head + data, {"Inference-Header-Content-Length": header})


def _binary() -> Iterator[RestCase]:
    floats = struct.pack("<4f", 1, 2, 3, 4)
    every_output = {"parameters": {"binary_data_output": True}}
    yield _binary_case("binary to JSON", "double", "FP32", [1, 4], floats)
    yield _binary_case("binary to binary", "double", "FP32", [1, 4], floats, **every_output)
    yield _binary_case("binary FP16", "same_fp16", "FP16", [1, 2], b"\0\x3c\0\x40", **every_output)
    texts = struct.pack("<I", 1) + b"a" + struct.pack("<I", 2) + b"\xff\xfe"
    yield _binary_case("binary BYTES", "same_bytes", "BYTES", [1, 2], texts, **every_output)
    yield _binary_case("output: BYTES that are not UTF-8, as JSON", "same_bytes", "BYTES", [1, 2], texts)
    yield _binary_case("binary: a byte short", "double", "FP32", [1, 4], floats[:-1])
    yield _binary_case("binary: a byte over", "double", "FP32", [1, 4], floats + b"\0", size=16)
    yield _binary_case("binary: size beyond the end", "double", "FP32", [1, 4], floats, size=32)
    yield _binary_case("binary: size is text", "double", "FP32", [1, 4], floats, size="16")
    yield _binary_case("binary: negative size", "double", "FP32", [1, 4], floats, size=-16)
    yield _binary_case("binary: header too short", "double", "FP32", [1, 4], floats, length="7")
    yield _binary_case("binary: header beyond the end", "double", "FP32", [1, 4], floats, length="700000")
    yield _binary_case("binary: header is text", "double", "FP32", [1, 4], floats, length="a")
    yield _binary_case("binary: negative header", "double", "FP32", [1, 4], floats, length="-1")
    yield RestCase("raw request", "POST", "/v2/models/double/infer", floats, {"Inference-Header-Content-Length": "0"})
    yield RestCase(
        "raw request of two inputs", "POST", "/v2/models/add/infer", floats, {"Inference-Header-Content-Length": "0"}
    )
    yield RestCase(
        "raw request of a decoupled model",
        "POST",
        "/v2/models/repeat/infer",
        floats,
        {"Inference-Header-Content-Length": "0"},
    )


def _compressed() -> Iterator[RestCase]:
    body = json.dumps({"inputs": [_tensor()]}).encode()
    for encoding, sent in {
        "gzip": gzip.compress(body),
        "deflate": zlib.compress(body),
        "identity": body,
        "br": body,
    }.items():
        yield _infer(f"compressed by {encoding}", sent, **{"Content-Encoding": encoding})
    packed = gzip.compress(body)
    yield _infer("compressed by GZIP in capitals", packed, **{"Content-Encoding": "GZIP"})
    for name, sent in {
        "cut off": packed[:-9],
        "a wrong checksum": packed[:-8] + bytes(8),
        "bytes behind it": packed + b"junk",
    }.items():
        yield _infer(f"compressed by gzip, {name}", sent, **{"Content-Encoding": "gzip"})
    yield _infer("compressed, but is not", body, **{"Content-Encoding": "gzip"})
    for encoding in ("gzip", "deflate", "br", "gzip, deflate"):
        yield _infer(f"accepts {encoding}", body, **{"Accept-Encoding": encoding})


def _generate() -> Iterator[RestCase]:
    for kind in ("generate", "generate_stream"):
        for name, body in {
            "values": b'{"x": [1, 2, 3, 4]}',
            "too few values": b'{"x": [1, 2, 3]}',
            "unknown list": b'{"z": [1, 2, 3]}',
            "parameters": b'{"x": [1, 2, 3, 4], "parameters": {"a": 1}, "b": "c"}',
            "an id": b'{"id": "i", "x": [1, 2, 3, 4]}',
            "nothing": b"{}",
            "cut": b"{",
        }.items():
            yield RestCase(f"{kind}: {name}", "POST", f"/v2/models/double/{kind}", body)
        yield RestCase(f"{kind} of an unknown model", "POST", f"/v2/models/none/{kind}", b'{"x": 1}')
        for times in (1, 3):
            body = json.dumps({"x": [1], "times": times}).encode()
            yield RestCase(f"{kind} of {times} responses", "POST", f"/v2/models/repeat/{kind}", body)
        yield RestCase(f"{kind}: a scalar", "POST", f"/v2/models/same_bytes/{kind}", b'{"x": "a"}')
