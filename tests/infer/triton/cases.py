"""What both servers are asked: the same bytes, one call after the other. Each case has a name, by which it is listed.

A difference between the responses is a bug, or a row of docs/compatibility.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import Message

from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conformance import wire
from tests.infer.conformance.wire import Given, floats, request
from tests.infer.triton import repository


@dataclass(frozen=True)
class Case:
    """One call, or one stream of requests."""

    name: str
    method: str
    asked: tuple[Message, ...]
    starts: str = ""
    """How both messages must start, where clients look at them."""
    hides: int = 0
    """So many bytes at the end of each output of a stream are left out: what is in them hangs on a server's haste."""


def every() -> dict[str, Case]:
    """All cases by name."""
    cases = [case for group in _GROUPS for case in group()]
    named = {case.name: case for case in cases}
    assert len(named) == len(cases), "two cases have one name"
    return named


def infer(name: str, asked: pb.ModelInferRequest, starts: str = "") -> Case:
    return Case(name, "ModelInfer", (asked,), starts)


def numbers(datatype: str, rows: int, columns: int) -> Given:
    array = (np.arange(rows * columns) % 2).astype(wire.NUMPY[datatype]).reshape(rows, columns)
    return Given("x", datatype, array.shape, array.tobytes())


def _tensors() -> Iterator[Case]:
    for datatype in repository.DATATYPES:
        model = f"same_{datatype.lower()}"
        for rows, columns in ((1, 1), (2, 3), (8, 2), (1, 0)):
            yield infer(f"{datatype} [{rows},{columns}]", request(model, numbers(datatype, rows, columns)))
        if datatype in wire.CONTENTS:
            values = [bool(n % 2) for n in range(6)] if datatype == "BOOL" else [n % 2 for n in range(6)]
            yield infer(f"{datatype} typed", request(model, Given("x", datatype, (2, 3), values=values)))
            yield infer(f"{datatype} typed, too few", request(model, Given("x", datatype, (2, 3), values=values[:5])))
            yield infer(
                f"{datatype} typed, too many", request(model, Given("x", datatype, (2, 3), values=[*values, values[0]]))
            )
            other = "fp64_contents" if datatype != "FP64" else "fp32_contents"
            wrong = Given("x", datatype, (2, 3), values=[1] * 6, contents=other)
            yield infer(f"{datatype} typed, in {other}", request(model, wrong))
        else:
            half = Given("x", datatype, (2, 3), values=[1] * 6, contents="fp32_contents")
            yield infer(f"{datatype} typed", request(model, half))
        size = np.dtype(wire.NUMPY[datatype]).itemsize
        yield infer(f"{datatype} a byte short", request(model, Given("x", datatype, (1, 2), b"\0" * (2 * size - 1))))
        yield infer(f"{datatype} a byte over", request(model, Given("x", datatype, (1, 2), b"\0" * (2 * size + 1))))
    yield infer("INT8 typed, out of range", request("same_int8", Given("x", "INT8", (1, 1), values=[300])))
    yield infer("UINT16 typed, out of range", request("same_uint16", Given("x", "UINT16", (1, 1), values=[70000])))
    yield infer("BOOL byte 2", request("same_bool", Given("x", "BOOL", (1, 2), b"\x01\x02")))
    special = np.array([[np.nan, np.inf, -np.inf, -0.0, 1e-45]], "<f4")
    yield infer("FP32 special values", request("same_fp32", Given("x", "FP32", special.shape, special.tobytes())))
    texts: dict[str, list[bytes]] = {
        "ascii": [b"one", b"two"],
        "empty element": [b"", b"x"],
        "unicode": ["käse".encode(), "中文".encode()],
        "nul": [b"a\0b", b"\0"],
        "not utf-8": [b"\xff\xfe", b"ok"],
        "long": [b"x" * 100_000, b"y"],
    }
    for what, elements in texts.items():
        yield infer(f"BYTES {what}", request("same_bytes", Given("x", "BYTES", (1, 2), wire.packed(elements))))
        yield infer(f"BYTES {what}, typed", request("same_bytes", Given("x", "BYTES", (1, 2), values=elements)))
    broken = {
        "too few elements": wire.packed([b"one"]),
        "too many elements": wire.packed([b"one", b"two", b"three"]),
        "length beyond the end": b"\x05\0\0\0abc" + b"\0\0\0\0",
        "length cut": wire.packed([b"one"]) + b"\x01\0",
        "no bytes": b"",
        "a byte over": wire.packed([b"one", b"two"]) + b"\0",
    }
    for what, raw in broken.items():
        yield infer(f"BYTES {what}", request("same_bytes", Given("x", "BYTES", (1, 2), raw)))
    yield infer("BYTES no elements", request("same_bytes", Given("x", "BYTES", (1, 0), b"")))
    yield infer("BYTES typed, too few", request("same_bytes", Given("x", "BYTES", (1, 2), values=[b"one"])))


def _shapes() -> Iterator[Case]:
    for shape in ((4,), (1, 5), (1, 3), (1, 1, 4), (0, 4), (9, 4), (100, 4), (), (-1, 4), (1, -4), (-1, -4)):
        elements = int(np.prod([abs(dim) for dim in shape])) if shape else 1
        yield infer(f"double {list(shape)}", request("double", Given("x", "FP32", shape, b"\0" * 4 * elements)))
    for shape in ((2**40, 4), (2**62, 4), (2**63 - 1, 4), (1, 4, 2**62)):
        yield infer(f"double {list(shape)}", request("double", Given("x", "FP32", shape, b"\0" * 16)))
    for shape in ((2, 3), (3, 2), (6,), (1, 2, 3), (2, 4)):
        elements = int(np.prod(shape))
        yield infer(f"flat {list(shape)}", request("flat", Given("x", "FP32", shape, b"\0" * 4 * elements)))
    yield infer("rows of two inputs differ", request("add", floats("a", rows=2), floats("b", rows=3)))
    yield infer("columns of two inputs differ", request("add", floats("a", columns=2), floats("b", columns=3)))


def _inputs() -> Iterator[Case]:
    x = floats()
    yield infer("double", request("double", x, id="r-1"))
    yield infer("8 rows", request("double", floats(rows=8)))
    yield infer("long id", request("double", x, id="i" * 10_000))
    yield infer("two inputs", request("add", floats("a", 2), floats("b", 2)))
    yield infer("two inputs, in the other order", request("add", floats("b", 2), floats("a", 2)))
    yield infer("unknown input", request("double", floats("z")))
    yield infer("unknown input beside a known one", request("double", x, floats("z")))
    yield infer("no inputs", request("double"))
    yield infer("missing input", request("add", floats("a")))
    yield infer("input twice", request("double", x, x))
    yield infer("input without a name", request("double", floats("")))
    for datatype, size in (("FP64", 32), ("INT32", 16), ("fp32", 16), ("", 16), ("NOPE", 16), ("BYTES", 16)):
        wrong = Given("x", datatype, (1, 4), b"\0" * size)
        yield infer(f"datatype '{datatype}' for FP32", request("double", wrong))
    for size in (0, 15, 17, 32):
        yield infer(f"{size} bytes for 16", request("double", Given("x", "FP32", (1, 4), b"\0" * size)))
    both = request("double", x)
    both.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])
    yield infer("raw and contents", both)
    yield infer("no data", request("double", Given("x", "FP32", (1, 4))))
    mixed = request("add", floats("a"), Given("b", "FP32", (1, 4), values=[1, 2, 3, 4]))
    yield infer("one input raw, the other typed", mixed)
    for count in (1, 3):
        wrong_count = request("add", floats("a"), floats("b"))
        wrong_count.raw_input_contents[:] = [wrong_count.raw_input_contents[0]] * count
        yield infer(f"{count} raw contents for 2 inputs", wrong_count)
    yield infer("optional input given", request("optional", floats(columns=2), floats("bias", columns=2)))
    yield infer("optional input left out", request("optional", floats(columns=2)))
    yield infer("optional input alone", request("optional", floats("bias", columns=2)))


def _outputs() -> Iterator[Case]:
    pair = (floats("a"), floats("b"))
    for names in (["sum"], ["difference"], ["difference", "sum"], ["sum", "difference"]):
        yield infer(f"outputs {', '.join(names)}", request("add", *pair, outputs=names))
    yield infer("unknown output", request("double", floats(), outputs=["nope"]))
    yield infer("unknown output beside a known one", request("double", floats(), outputs=["y", "nope"]))
    yield infer("output twice", request("double", floats(), outputs=["y", "y"]))
    yield infer("output without a name", request("double", floats(), outputs=[""]))
    ranks = np.array([[0.1, 0.5, 0.25, -1, 2], [3, 3, 3, 3, 3]], "<f4")
    many = Given("x", "FP32", (2, 5), ranks.tobytes())
    for k in (1, 3, 5, 6, 1000, 0, -1):
        yield infer(f"classification {k}", classified("classes", many, ("int64_param", k)))
    for kind, value in (("string_param", "2"), ("bool_param", True), ("uint64_param", 2), ("double_param", 2.0)):
        yield infer(f"classification as {kind}", classified("classes", many, (kind, value)))
    integers = Given("x", "INT64", (4,), np.array([-7, 2**62, 0, 3], "<i8").tobytes())
    yield infer("classification of INT64 without a batch", classified("scores", integers, ("int64_param", 3)))
    # Of BYTES: not asked, for it ends this Triton. Shoal refuses it.
    flags = Given("x", "BOOL", (1, 3), b"\x00\x01\x00")
    yield infer("classification of BOOL", classified("same_bool", flags, ("int64_param", 2)))
    halves = Given("x", "FP16", (1, 3), np.array([1.5, 2.5, 0.5], "<f2").tobytes())
    yield infer("classification of FP16", classified("same_fp16", halves, ("int64_param", 2)))
    small = Given("x", "UINT8", (1, 3), bytes([3, 200, 1]))
    yield infer("classification of UINT8", classified("same_uint8", small, ("int64_param", 2)))
    tiny = Given("x", "INT8", (1, 3), bytes([3, 200, 1]))
    yield infer("classification of INT8", classified("same_int8", tiny, ("int64_param", 2)))
    wide = Given("x", "FP64", (1, 3), np.array([1e300, 0.1, -0.0], "<f8").tobytes())
    yield infer("classification of FP64", classified("same_fp64", wide, ("int64_param", 3)))
    odd = Given("x", "FP32", (1, 3), np.array([np.inf, 1e-9, -np.inf], "<f4").tobytes())
    yield infer("classification of infinities", classified("same_fp32", odd, ("int64_param", 3)))


def classified(model: str, given: Given, parameter: tuple[str, object], output: str = "y") -> pb.ModelInferRequest:
    asked = request(model, given, outputs=[output])
    wire.put(asked.outputs[0].parameters["classification"], parameter)
    return asked


def _versions() -> Iterator[Case]:
    unknown = "Request for unknown model: "
    yield infer("unknown model", request("nope", floats()), unknown + "'nope' is not found")
    yield infer("unknown model with a version", request("nope", floats(), version="1"), unknown + "'nope'")
    yield infer("no model", request("", floats()), unknown + "'' is not found")
    for version in ("1", "2", "3", ""):
        yield infer(f"version '{version}' of three", request("versions", floats(), version=version))
    yield infer(
        "unknown version", request("double", floats(), version="7"), unknown + "'double' version 7 is not found"
    )
    for version in ("abc", "0", "-1", "1.0", "01", " 1", "1 ", "99999999999999999999", "9223372036854775807"):
        starts = "failed to get model version from specified version string 'abc'" if version == "abc" else ""
        yield infer(f"version '{version}'", request("double", floats(), version=version), starts)
    yield infer("the model raised", request("lookup", Given("i", "INT64", (1, 1), np.int64(9).tobytes())))
    yield infer("the model refused", request("refuse", floats(start=-1)))


def _parameters() -> Iterator[Case]:
    values = {"bool_param": True, "int64_param": 1, "string_param": "1", "double_param": 1.0, "uint64_param": 1}
    names = ("priority", "sequence_id", "sequence_start", "sequence_end", "triton_enable_empty_final_response")
    for name in (*names, "triton_secret", "mine"):
        for kind, value in values.items():
            yield infer(f"{name} as {kind}", request("double", floats(), parameters={name: (kind, value)}))
    for kind, value in {**values, "int64_param": 60_000_000}.items():
        yield infer(f"timeout as {kind}", request("double", floats(), parameters={"timeout": (kind, value)}))
    yield infer("timeout negative", request("double", floats(), parameters={"timeout": -1}))
    yield infer("timeout 0", request("double", floats(), parameters={"timeout": 0}))
    yield infer("priority negative", request("double", floats(), parameters={"priority": -1}))
    yield infer(
        "priority far too high", request("double", floats(), parameters={"priority": ("uint64_param", 2**64 - 1)})
    )
    empty = request("double", floats())
    empty.parameters["mine"].SetInParent()
    yield infer("parameter without a value", empty)
    for where in ("input", "output"):
        shared = request("double", floats(), outputs=["y"])
        tensor = shared.inputs[0] if where == "input" else shared.outputs[0]
        wire.put(tensor.parameters["shared_memory_region"], "nope")
        wire.put(tensor.parameters["shared_memory_byte_size"], 16)
        yield infer(f"shared memory for an {where}", shared)
    binary = request("double", floats(), outputs=["y"])
    wire.put(binary.outputs[0].parameters["binary_data"], True)
    wire.put(binary.inputs[0].parameters["binary_data_size"], 16)
    yield infer("binary data of the HTTP form", binary)


def _models() -> Iterator[Case]:
    for method, asked in (("ModelMetadata", pb.ModelMetadataRequest), ("ModelReady", pb.ModelReadyRequest)):
        models = [name for name in repository.CONFIGS if not name.startswith("same_")] + ["same_bytes", "same_fp16"]
        for name in models if method == "ModelMetadata" else ["double"]:
            yield Case(f"{method} of {name}", method, (asked(name=name),))
    for method in ("ModelMetadata", "ModelReady", "ModelConfig", "ModelStatistics"):
        asked = getattr(pb, f"{method}Request")
        for name, version in (("nope", ""), ("nope", "1"), ("double", "7"), ("double", "abc"), ("double", "0")):
            yield Case(f"{method} of {name} version '{version}'", method, (asked(name=name, version=version),))
        yield (
            Case(f"{method} without a name", method, (asked(),))
            if method != "ModelStatistics"
            else Case("ModelStatistics of a version of every model", method, (asked(version="abc"),))
        )


def _ensembles() -> Iterator[Case]:
    for model in ("chain", "nested", "diamond"):
        for rows in (1, 3, 4, 5, 8, 9):
            yield infer(f"ensemble {model}, {rows} rows", request(model, floats(rows=rows), id="e-1"))
        yield infer(f"ensemble {model}, unknown input", request(model, floats("z")))
        yield infer(f"ensemble {model}, a tensor between its steps", request(model, floats(), outputs=["twice"]))
        yield infer(f"ensemble {model}, wrong datatype", request(model, Given("x", "FP64", (1, 4), b"\0" * 32)))
        yield infer(f"ensemble {model}, wrong shape", request(model, Given("x", "FP32", (1, 5), b"\0" * 20)))
        yield infer(f"ensemble {model}, version '1'", request(model, floats(), version="1"))
        yield infer(f"ensemble {model}, version '2'", request(model, floats(), version="2"))
        yield infer(
            f"ensemble {model}, with parameters", request(model, floats(), parameters={"mine": 7, "priority": 1})
        )
        yield Case(f"ModelMetadata of {model}", "ModelMetadata", (pb.ModelMetadataRequest(name=model),))
        yield Case(f"ModelReady of {model}", "ModelReady", (pb.ModelReadyRequest(name=model),))
    for names in (["s"], ["d"], ["s", "d"]):
        yield infer(f"ensemble diamond, outputs {', '.join(names)}", request("diamond", floats(rows=2), outputs=names))
    yield infer("ensemble diamond, classification", classified("diamond", floats(rows=2), ("int64_param", 2), "s"))
    for i in (0, 2, 9):
        yield infer(f"ensemble lookups, {i}", request("lookups", Given("i", "INT64", (1, 1), np.int64(i).tobytes())))
    for shape in ((2, 3), (8, 1), (9, 2), (1, 5)):
        size = b"\0" * 4 * shape[0] * shape[1]
        asked = request("ragged", Given("a", "FP32", shape, size), Given("b", "FP32", shape, size))
        yield infer(f"ensemble ragged, {list(shape)}", asked)
    yield infer(
        "ensemble ragged, rows that differ",
        request("ragged", Given("a", "FP32", (2, 1), b"\0" * 8), Given("b", "FP32", (3, 1), b"\0" * 12)),
    )
    yield Case("ensemble on a stream", "ModelStreamInfer", (request("chain", floats()), request("diamond", floats())))


def _repository() -> Iterator[Case]:
    yield Case("ServerLive", "ServerLive", (pb.ServerLiveRequest(),))
    yield Case("ServerReady", "ServerReady", (pb.ServerReadyRequest(),))
    yield Case("index", "RepositoryIndex", (pb.RepositoryIndexRequest(),))
    yield Case("index of what is ready", "RepositoryIndex", (pb.RepositoryIndexRequest(ready=True),))
    yield Case(
        "index of a repository with a name", "RepositoryIndex", (pb.RepositoryIndexRequest(repository_name="r"),)
    )
    load, unload = pb.RepositoryModelLoadRequest, pb.RepositoryModelUnloadRequest
    yield Case("load of an unknown model", "RepositoryModelLoad", (load(model_name="nope"),), "failed to load 'nope'")
    yield Case("load of a loaded model", "RepositoryModelLoad", (load(model_name="add"),))
    yield Case("load without a name", "RepositoryModelLoad", (load(),))
    for what, name, value in (
        ("a config that is no JSON", "config", "{"),
        ("a config of another type", "config", 1),
        ("a config with an unknown field", "config", '{"nope": 1}'),
        ("an unknown parameter", "mine", "1"),
        ("a file without a config", "file:1/model.py", "no"),
    ):
        asked = load(model_name="add")
        parameter = asked.parameters[name]
        if isinstance(value, int):
            parameter.int64_param = value
        else:
            parameter.string_param = value
        yield Case(f"load with {what}", "RepositoryModelLoad", (asked,))
    yield Case("unload of an unknown model", "RepositoryModelUnload", (unload(model_name="nope"),))
    yield Case("unload without a name", "RepositoryModelUnload", (unload(),))
    for kind in ("System", "Cuda"):
        status = getattr(pb, f"{kind}SharedMemoryStatusRequest")
        yield Case(f"{kind}SharedMemoryStatus", f"{kind}SharedMemoryStatus", (status(),))
    yield Case("TraceSetting", "TraceSetting", (pb.TraceSettingRequest(),))
    yield Case("LogSettings", "LogSettings", (pb.LogSettingsRequest(),))


def _streams() -> Iterator[Case]:
    final = {"triton_enable_empty_final_response": True}
    yield stream("stream of one", [request("double", floats(), id="a")])
    yield stream("stream of one, final asked for", [request("double", floats(), id="a", parameters=final)])
    yield stream("stream of three", [request("double", floats(start=n), id=str(n)) for n in range(3)])
    yield stream("stream of none", [])
    wrong = [request("double", floats("z"), id="w"), request("nope", floats(), id="n")]
    yield stream("stream of one wrong", wrong[:1])
    yield stream("stream of one to an unknown model", wrong[1:])
    yield stream(
        "stream with a wrong one in the middle", [request("double", floats()), wrong[0], request("double", floats())]
    )
    yield stream("stream of one that raises", [request("refuse", floats(start=-1), id="r")])
    for times in (0, 1, 3, -1):
        for asks in (False, True):
            asked = repeat(times, **(final if asks else {}))
            yield stream(f"decoupled, {times} responses{', final asked for' if asks else ''}", [asked])
    yield infer(
        "decoupled through ModelInfer",
        repeat(1),
        "ModelInfer RPC doesn't support models with decoupled transaction policy",
    )


def repeat(times: int, **parameters: object) -> pb.ModelInferRequest:
    count = Given("times", "INT32", (1,), np.int32(times).tobytes())
    return request(
        "repeat", Given("x", "FP32", (2,), np.float32([5, 6]).tobytes()), count, id="d", parameters=parameters
    )


def stream(name: str, asked: Sequence[pb.ModelInferRequest]) -> Case:
    return Case(name, "ModelStreamInfer", tuple(asked))


def step(
    model: str,
    id: object,
    x: float = 1,
    *,
    start: bool = False,
    end: bool = False,
    rows: int = 1,
) -> pb.ModelInferRequest:
    """One request of sequence `id`; None: it names none."""
    given = {"sequence_id": id, "sequence_start": start, "sequence_end": end}
    shape = (1,) if model == "steps_single" else (rows, 1)
    sent = Given("x", "FP32", shape, np.full(shape, x, "<f4").tobytes())
    return request(model, sent, parameters={name: value for name, value in given.items() if value not in (None, False)})


def _sequences() -> Iterator[Case]:
    no_id = "inference request to model 'steps' must specify a non-zero or non-empty correlation ID"
    for what, id in (("no id", None), ("id 0", ("int64_param", 0)), ("an empty id", "")):
        yield infer(f"sequence: {what}", step("steps", id, start=True), no_id)
    start_it = "must specify the START flag on the first request of the sequence"
    for end in (False, True):
        starts = f"inference request for sequence 77 to model 'steps' {start_it}"
        yield infer(f"sequence: not started{', ended' * end}", step("steps", 77, end=end), starts)
    rows = "inference request to model 'steps' must specify batch-size 1 due to requirements of sequence batcher"
    yield infer("sequence: 2 rows", step("steps", 4, start=True, rows=2), rows)
    control = step("steps", 9, start=True, end=True)
    control.inputs.add(name="START", datatype="FP32", shape=[1, 1])
    control.raw_input_contents.append(np.float32(1).tobytes())
    yield infer("sequence: a control as input", control)
    for model in ("steps", "steps_oldest", "steps_single", "steps_uint32"):
        steps = [step(model, 1, 1, start=True), step(model, 1, 2), step(model, 1, 3, end=True)]
        yield _stream(f"sequence: {model}", steps)
        yield _stream(f"sequence: {model}, one step", [step(model, 1, start=True, end=True)])
        restarted = [step(model, 1, 1, start=True), step(model, 1, 5, start=True), step(model, 1, 1, end=True)]
        yield _stream(f"sequence: {model}, restarted", restarted)
        again = [step(model, 1, 1, start=True, end=True), step(model, 1), step(model, 1, 7, start=True, end=True)]
        # Its place in the batch, the last number: Triton may have another slot for it before it has freed the first.
        yield _stream(f"sequence: {model}, after its end, and again", again, hides=4)
    failed = [step("steps", 2, 1, start=True), step("steps", 2, -1), step("steps", 2, 1, end=True)]
    yield _stream("sequence: a step fails", failed)
    begun = [step("steps_failing", 3, -1, start=True), step("steps_failing", 3, 1)]
    yield infer("sequence: its start fails", begun[0], "x is below zero")
    yield infer("sequence: after its start failed", begun[1])
    yield infer("sequence: negative id", step("steps", -1, start=True, end=True))
    for model, id in (("int32", 2**31 - 1), ("int32", -5), ("int32", 2**31), ("uint32", 2**32 - 1), ("uint32", 2**32)):
        yield infer(f"sequence: {id} as {model}", step(f"steps_{model}", id, start=True, end=True))
    yield infer("sequence: text for a number", step("steps_failing", "abc", start=True, end=True))
    for what, id in (("short text", "8"), ("number for text", 8), ("128 characters", "8" * 128)):
        yield infer(f"sequence: {what}", step("steps_text", id, start=True, end=True))
    yield infer("sequence: 129 characters", step("steps_text", "8" * 129, start=True, end=True))


def _stream(name: str, steps: Sequence[pb.ModelInferRequest], hides: int = 0) -> Case:
    return Case(name, "ModelStreamInfer", tuple(steps), hides=hides)


_GROUPS = (
    *(_tensors, _shapes, _inputs, _outputs, _versions, _parameters, _models, _repository, _streams),
    *(_ensembles, _sequences),
)
