"""Parse of requests: what protobuf is given is bounded, and large messages leave iterations of the loop to others."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rpc import parsing
from mesh.rpc.heavy_work import HeavyWork
from mesh.rpc.parsing import MAX_ELEMENTS, MAX_FIELDS, PACKED_BYTES, UNSCANNED_BYTES, Parser, parse_in_turn, scan
from shoal.errors import InvalidArgument
from shoal.inference.v2 import inference_pb2 as pb

PARSER = Parser(pb.ModelInferRequest.FromString)
MESSAGE = pb.ModelInferRequest.DESCRIPTOR
NAME = b"\x0a\x01m"


def field(number: int, data: bytes) -> bytes:
    """Return a length-delimited field."""
    return tagged(number << 3 | 2, data)


def tagged(tag: int, data: bytes) -> bytes:
    size, out = len(data), bytearray([tag])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes([*out, size]) + data


def contents(data: bytes) -> bytes:
    """Return a request with one input of these typed contents."""
    return NAME + field(5, field(1, b"x") + field(5, data))


def scanned(data: bytes) -> int:
    """Scan a request, and return the number of slices."""
    return sum(1 for _ in scan(data, MESSAGE))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (NAME + b"\x2a\x00" * 200_000, f"more than {MAX_FIELDS} fields and submessages.*ModelInferRequest.inputs"),
        (NAME + b"\x32\x00" * 200_000, f"more than {MAX_FIELDS} .*ModelInferRequest.outputs"),
        (NAME + b"\x22\x00" * 200_000, f"more than {MAX_FIELDS} .*ModelInferRequest.parameters"),
        (NAME + b"\x3a\x01x" * 400_000, f"more than {MAX_ELEMENTS} elements.*raw_input_contents"),
        (contents(b"\x42\x01x" * 400_000), f"more than {MAX_ELEMENTS} elements.*bytes_contents"),
        (contents(b"\x18\x01" * 200_000), f"more than {MAX_FIELDS} .*InferTensorContents.int64_contents"),
        (contents(b"\x35\0\0\0\0" * 200_000), f"more than {MAX_FIELDS} .*InferTensorContents.fp32_contents"),
        (contents(field(3, b"\1" * (PACKED_BYTES + 1))), f"more than {PACKED_BYTES} bytes of packed.*int64_contents"),
        (contents(field(1, b"\1" * (PACKED_BYTES + 1))), f"more than {PACKED_BYTES} bytes of packed.*bool_contents"),
        (NAME + b"\x78\x01" * 200_000, f"more than {MAX_FIELDS} .*field 15 of inference.ModelInferRequest"),
        (NAME + b"\x2a\x00\x3a\x01x" * 100_000, f"more than {MAX_FIELDS} "),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[-30:],
)
def test_a_message_beyond_a_bound_is_rejected_with_the_field_and_the_bound(data: bytes, named: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"ModelInferRequest of {len(data)} bytes has {named}"):
        scanned(data)


@pytest.mark.parametrize(
    "data",
    [
        contents(field(8, b"a string of thirty characters.") * 10_000),
        contents(field(8, b"x" * 200) * 50_000),
        contents(field(6, bytes(4 * 4_000_000))),
        contents(field(3, b"\1" * PACKED_BYTES)),
        NAME + field(5, field(1, b"x") + field(3, b"\1\xff\1")) + field(7, bytes(4 << 20)),
        NAME + (field(5, field(1, b"x")) + field(7, bytes(10_000))) * 1_000,
        field(1, "é".encode() * (1 << 20)),
    ],
    ids=["strings", "long strings", "fp32", "int64", "raw", "many raw", "text"],
)
def test_a_large_message_in_bounds_passes(data: bytes) -> None:
    assert len(data) > UNSCANNED_BYTES
    scanned(data)
    PARSER(data)


def test_the_scan_of_a_large_tensor_ends_behind_the_tensor() -> None:
    assert scanned(NAME + field(7, bytes(4 << 20)) + b"\x2a\x00" * (UNSCANNED_BYTES // 2 - 8)) == 0


@pytest.mark.parametrize(
    "tail",
    [b"\x2a", b"\x2a\xff", b"\x2e\x00", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x08" + b"\xff" * 11],
)
def test_a_malformed_message_is_rejected(tail: bytes) -> None:
    data = NAME + b"\x2a\x00" * 80_000 + tail
    with pytest.raises(InvalidArgument, match="are not a message of the expected type"):
        scanned(data)
    with pytest.raises(DecodeError):
        pb.ModelInferRequest.FromString(data)


TENSOR = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=st.text(max_size=200),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    contents=st.builds(
        pb.InferTensorContents,
        int64_contents=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
        bool_contents=st.lists(st.booleans(), max_size=4),
        fp64_contents=st.lists(st.floats(), max_size=4),
        bytes_contents=st.lists(st.binary(max_size=300), max_size=6),
    ),
)
REQUEST = st.builds(
    pb.ModelInferRequest,
    model_name=st.text(max_size=5),
    inputs=st.lists(TENSOR, max_size=4),
    parameters=st.dictionaries(st.text(max_size=5), st.builds(pb.InferParameter, string_param=st.text(max_size=200))),
    raw_input_contents=st.lists(st.binary(max_size=300), max_size=6),
)


@settings(max_examples=100, deadline=None)
@given(request=REQUEST, cut=st.integers(0, 60), unscanned=st.integers(0, 40))
def test_the_scan_accepts_what_protobuf_writes_and_rejects_only_what_protobuf_rejects(
    request: pb.ModelInferRequest, cut: int, unscanned: int
) -> None:
    data = request.SerializeToString()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "UNSCANNED_BYTES", unscanned)
        scanned(data)
        part = data[: max(len(data) - cut, 0)]
        try:
            scanned(part)
        except InvalidArgument:
            with pytest.raises(DecodeError):
                pb.ModelInferRequest.FromString(part)


async def iterations_until(done: asyncio.Future[object]) -> int:
    count = 0
    while not done.done():
        await asyncio.sleep(0)
        count += 1
    return count


def parsed(heavy: HeavyWork, data: bytes, tenant: bytes = b"") -> asyncio.Future[pb.ModelInferRequest]:
    return asyncio.ensure_future(parse_in_turn(heavy, tenant, PARSER, data))


async def test_a_large_message_leaves_iterations_of_the_loop_to_others() -> None:
    # Each look at the clock takes a millisecond: a turn has one slice.
    ticks = itertools.count()
    heavy = HeavyWork(clock=lambda: next(ticks) / 1000)
    done = parsed(heavy, NAME + field(5, field(1, b"x")) * 40_000)
    assert await iterations_until(done) > 30
    assert len((await done).inputs) == 40_000


async def test_small_messages_do_not_wait_for_large_ones() -> None:
    heavy = HeavyWork()
    large = [parsed(heavy, NAME + b"\x2a\x00" * 80_000) for _ in range(3)]
    await asyncio.sleep(0)
    small = parsed(heavy, NAME)
    assert await iterations_until(small) <= 2
    assert not large[0].done()
    await asyncio.gather(*large)


async def test_a_message_of_another_tenant_does_not_wait_for_the_scans_of_the_first() -> None:
    heavy = HeavyWork()
    async with asyncio.timeout(30):
        others = [parsed(heavy, NAME + b"\x2a\x00" * 80_000) for _ in range(3)]
        await asyncio.sleep(0)
        await parsed(heavy, NAME + field(5, field(1, b"x")) * 8 + field(7, bytes(4 << 20)), b"another")
        assert not others[1].done()
        await asyncio.gather(*others)


async def test_a_message_that_is_rejected_gives_its_turn_back() -> None:
    heavy = HeavyWork()
    rejected, accepted = (parsed(heavy, NAME + b"\x2a\x00" * count) for count in (200_000, 80_000))
    with pytest.raises(InvalidArgument, match="more than"):
        await rejected
    assert len((await asyncio.wait_for(accepted, 30)).inputs) == 80_000


def test_a_function_that_is_no_parse_of_a_message_has_no_bounds() -> None:
    parse: Callable[[bytes], int] = len
    parser = Parser(parse)
    assert parser.message is None
    assert parser(b"123") == 3
