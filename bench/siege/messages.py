"""Attacks with messages that cost more to read than to send: compression, protobuf, shapes, elements."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.siege.attack import ATTACKER, Attack
from bench.siege.wire import INFER, Connection, Script, framed, head
from shoal.inference.v2 import inference_pb2

pb: Any = inference_pb2
MIB = 1 << 20
GZIP = (b"grpc-encoding", b"gzip")

# Wire forms of one empty element: the tag of a field with the length 0.
_INPUT, _PARAMETER, _OUTPUT, _RAW = b"\x2a\x00", b"\x22\x00", b"\x32\x00", b"\x3a\x00"


def repeating(
    name: str,
    what: str,
    body: Callable[[], bytes],
    *more: tuple[bytes, bytes],
    in_flight: int = 4,
    **options: Any,
) -> Attack:
    """Return an attack that keeps so many calls with one body in flight on each connection."""
    made = functools.cache(body)

    def script(connection: Connection) -> Script:
        block, data = head(INFER, *more, tenant=ATTACKER), made()
        while True:
            yield from connection.fewer(in_flight)
            connection.tally["calls"] += 1
            yield from connection.call(block, data)

    return Attack(name, what, script, prepare=made, **options)


def named(model: str, rest: bytes = b"") -> bytes:
    """Return a request for `model`, with `rest` in its wire form."""
    return bytes(pb.ModelInferRequest(model_name=model).SerializeToString()) + rest


def gzipped(message: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return framed(packer.compress(message) + packer.flush(), is_compressed=True)


def tensor(model: str, datatype: str, shape: Sequence[int], raw: bytes) -> bytes:
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    request.raw_input_contents.append(raw)
    return bytes(request.SerializeToString())


def _zeros() -> bytes:
    return gzipped(tensor("echo", "FP32", [1, 24 * MIB], bytes(96 * MIB)))


def _noisy_empties() -> bytes:
    """Return empty inputs with enough noise that the message grows less than a bound of the ratio allows."""
    noise = b"\x3a\x64" + os.urandom(100)
    return gzipped(named("echo", b"".join(_INPUT * 4_000 + noise[:2] + os.urandom(100) for _ in range(1000))))


def _nested() -> bytes:
    # Groups of unknown fields, 90 deep, as often as fits.
    nest = b"\x7b" * 90 + b"\x7c" * 90
    return framed(named("echo", nest * (4 * MIB // len(nest))))


def _parameters() -> bytes:
    request = pb.ModelInferRequest(model_name="small")
    for n in range(50_000):
        request.parameters[f"p{n}"].int64_param = n
    return framed(bytes(request.SerializeToString()))


def _tags() -> bytes:
    # An unknown varint field, two bytes each.
    return framed(named("echo", b"\x78\x01" * (4 * MIB)))


def _typed() -> bytes:
    request = pb.ModelInferRequest(model_name="echo")
    values = request.inputs.add(name="x", datatype="FP32", shape=[1, 4 * MIB])
    values.contents.fp32_contents.extend(np.zeros(4 * MIB, np.float32).tolist())
    return framed(bytes(request.SerializeToString()))


def _typed_elements() -> bytes:
    request = pb.ModelInferRequest(model_name="text")
    values = request.inputs.add(name="x", datatype="BYTES", shape=[1, 2 * MIB])
    values.contents.bytes_contents.extend([b""] * (2 * MIB))
    return framed(bytes(request.SerializeToString()))


def _elements() -> bytes:
    return framed(tensor("text", "BYTES", [1, 4 * MIB], bytes(16 * MIB)))


def _texts() -> bytes:
    count = 250_000
    return framed(tensor("text", "BYTES", [1, count], b"".join(b"\4\0\0\0%04d" % (n % 10_000) for n in range(count))))


def _huge_shapes(connection: Connection) -> Script:
    shapes = ([1 << 31], [1, 1 << 31], [1 << 31, 1 << 31], [-1, 4], [1 << 62, 4], [0, 1 << 62], [1] * 10_000)
    bodies = [framed(tensor(model, "FP32", shape, bytes(16))) for shape in shapes for model in ("echo", "small")]
    bodies += [framed(tensor("text", "BYTES", shape, bytes(16))) for shape in shapes]
    block = head(tenant=ATTACKER)
    while True:
        for body in bodies:
            yield from connection.fewer(64)
            connection.tally["calls"] += 1
            yield from connection.call(block, body)


def _classify(classes: int) -> bytes:
    request = pb.ModelInferRequest(model_name="echo")
    request.inputs.add(name="x", datatype="FP32", shape=[1, MIB])
    request.outputs.add(name="y").parameters["classification"].int64_param = classes
    request.raw_input_contents.append(np.random.default_rng(1).random(MIB, np.float32).tobytes())
    return framed(bytes(request.SerializeToString()))


ATTACKS = (
    repeating("gzip-zeros", "96 MiB of zeros, 95 kB compressed", _zeros, GZIP),
    repeating(
        "gzip-empties",
        "gzip of 16 M empty inputs, 32 kB on the wire",
        lambda: gzipped(named("echo", _INPUT * (16 * MIB))),
        GZIP,
    ),
    repeating("gzip-mixed", "gzip of 4 M empty inputs that grows less than 100 times", _noisy_empties, GZIP),
    repeating("proto-empties", "8 M empty inputs", lambda: framed(named("echo", _INPUT * (8 * MIB)))),
    repeating(
        "proto-mixed",
        "2 M each of empty parameters, outputs and raw contents",
        lambda: framed(named("echo", (_PARAMETER + _OUTPUT + _RAW) * (2 * MIB))),
    ),
    repeating("proto-nested", "4 MiB of groups, 90 deep", _nested),
    repeating("proto-tags", "4 M unknown fields", _tags),
    repeating("proto-params", "50,000 parameters", _parameters),
    repeating("typed-floats", "4 M floats in fp32_contents", _typed),
    repeating("typed-bytes", "2 M empty elements in bytes_contents", _typed_elements),
    repeating("raw-bytes", "4 M empty elements of BYTES, raw", _elements),
    repeating("raw-texts", "250,000 elements of BYTES, raw", _texts),
    Attack("huge-shapes", "shapes of up to 2^62 elements with 16 bytes of data", _huge_shapes),
    repeating("classify", "classification of 1 M values", lambda: _classify(MIB), in_flight=2),
    repeating("classes", "the best 100,000 of 1 M values", lambda: _classify(100_000), in_flight=2),
)
