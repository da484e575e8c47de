"""A large ModelInferRequest whose numbers are views of its body: protobuf would copy them, and hold the GIL.

    body ──cut──> raw contents, and packed fp32_contents and fp64_contents, as views of the body
             └──> the other fields ──protobuf──> message      LargeRequest(message, raw contents, packed contents)

Of 100 MiB, each copy takes 70 to 140 ms; parsing, reading and learning the request would make four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from mesh.rpc.parsing import Parser, varint
from services.infer.requests.response import tag_and_length
from shoal.inference.v2 import inference_pb2 as pb

LARGE_BYTES = 4 << 20
"""A copy of a smaller request takes about a millisecond."""

# A request with more fields is not cut: the walk over so many takes 0.4 ms.
_MAX_FIELDS = 1_024

# Typed contents of a smaller input are not cut out: protobuf copies them in some microseconds.
_LARGE_INPUT_BYTES = 64 << 10

_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2
_INPUT = pb.ModelInferRequest.INPUTS_FIELD_NUMBER << 3 | 2
_CONTENTS = pb.ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER << 3 | 2
# Names and element sizes of the contents that are little-endian numbers on the wire, by their tag.
_NUMBERS = {
    pb.InferTensorContents.FP32_CONTENTS_FIELD_NUMBER << 3 | 2: ("fp32_contents", 4),
    pb.InferTensorContents.FP64_CONTENTS_FIELD_NUMBER << 3 | 2: ("fp64_contents", 8),
}


class LargeRequest:
    """A ModelInferRequest without its raw and packed contents, and these; all other attributes are the message's."""

    def __init__(
        self,
        message: pb.ModelInferRequest,
        raw_input_contents: Sequence[memoryview],
        packed_contents: Mapping[int, tuple[str, memoryview]] = MappingProxyType({}),
    ) -> None:
        self._message = message
        self.raw_input_contents = raw_input_contents
        self.packed_contents = packed_contents
        """Field and data of typed contents, by the index of their input."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)


def shared_bytes(message: object) -> int:
    """Return the bytes of a message that are views of its body, and no copies."""
    if not isinstance(message, LargeRequest):
        return 0
    return sum(map(len, message.raw_input_contents)) + sum(len(data) for _, data in message.packed_contents.values())


class RequestParser(Parser[pb.ModelInferRequest]):
    """Parser of the bodies of ModelInfer. Of a large one it returns a LargeRequest."""

    def __init__(self) -> None:
        super().__init__(pb.ModelInferRequest.FromString)

    def __call__(self, data: bytes, start: int = 0) -> pb.ModelInferRequest:
        if len(data) <= LARGE_BYTES:
            return super().__call__(data, start)
        head, raw, packed = cut(data, start)
        message = super().__call__(head)
        return cast("pb.ModelInferRequest", LargeRequest(message, raw, packed)) if raw or packed else message


PARSER = RequestParser()


def cut(body: bytes, start: int) -> tuple[bytes, list[memoryview], dict[int, tuple[str, memoryview]]]:
    """Return the message that begins at `start` without its raw and packed contents, the raw and the packed contents.

    A message that is malformed, or has too many fields, is returned whole: its parse reports the error.
    """
    view = memoryview(body)
    head: list[bytes | memoryview] = []
    raw: list[memoryview] = []
    packed: dict[int, tuple[str, memoryview]] = {}
    inputs = 0
    at = kept_from = start
    end = len(body)
    try:
        for _ in range(_MAX_FIELDS):
            if at == end:
                return b"".join((*head, view[kept_from:])), raw, packed
            field_at = at
            tag, at = varint(body, at)
            # Fields of another wire type are unknown, and rare.
            if tag & 7 != 2:
                break
            size, at = varint(body, at)
            if at + size > end:
                break
            if tag == _RAW_INPUT:
                head.append(view[kept_from:field_at])
                raw.append(view[at : at + size])
                kept_from = at + size
            elif tag == _INPUT:
                if size > _LARGE_INPUT_BYTES and (found := _packed(body, at, at + size)) is not None:
                    name, contents_at, data_at, data_end = found
                    packed[inputs] = name, view[data_at:data_end]
                    before = tag_and_length(_INPUT, size - (data_end - contents_at))
                    head += (view[kept_from:field_at], before, view[at:contents_at])
                    kept_from = data_end
                inputs += 1
            at += size
    except IndexError:
        pass
    return body[start:], [], {}


def _packed(body: bytes, at: int, end: int) -> tuple[str, int, int, int] | None:
    """Find the contents of an input that are only packed numbers.

    Return the field's name, the place of the contents, and that of the numbers: their start and end. None: the contents
    have another form. Raises IndexError for a malformed input.
    """
    contents = None
    while at < end:
        field_at = at
        tag, at = varint(body, at)
        if tag & 7 != 2:
            return None
        size, at = varint(body, at)
        if tag == _CONTENTS:
            # protobuf would merge several.
            if contents is not None:
                return None
            contents = field_at, at, at + size
        at += size
    if at != end or contents is None:
        return None
    contents_at, at, data_end = contents
    tag, at = varint(body, at)
    size, at = varint(body, at)
    name, element = _NUMBERS.get(tag, ("", 1))
    return (name, contents_at, at, data_end) if name and at + size == data_end and not size % element else None
