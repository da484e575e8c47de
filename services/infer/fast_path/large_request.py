"""A large ModelInferRequest whose raw contents are views of its body: protobuf would copy them, and hold the GIL.

    body ──cut──> raw contents, as views of the body
             └──> the other fields ──protobuf──> message      LargeRequest(message, raw contents)

Of 100 MiB, each copy takes 70 to 140 ms; parsing, reading and learning the request would make four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from mesh.rpc.parsing import Parser, varint
from shoal.inference.v2 import inference_pb2 as pb

LARGE_BYTES = 4 << 20
"""A copy of a smaller request takes about a millisecond."""

# A request with more fields is not cut: the walk over so many takes 0.4 ms.
_MAX_FIELDS = 1_024

_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2


class LargeRequest:
    """A ModelInferRequest without its raw contents, and these; all other attributes are the message's."""

    def __init__(self, message: pb.ModelInferRequest, raw_input_contents: Sequence[memoryview]) -> None:
        self._message = message
        self.raw_input_contents = raw_input_contents

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)


def shared_bytes(message: object) -> int:
    """Return the bytes of a message that are views of its body, and no copies."""
    return sum(map(len, message.raw_input_contents)) if isinstance(message, LargeRequest) else 0


class RequestParser(Parser[pb.ModelInferRequest]):
    """Parser of the bodies of ModelInfer. Of a large one it returns a LargeRequest."""

    def __init__(self) -> None:
        super().__init__(pb.ModelInferRequest.FromString)

    def __call__(self, data: bytes, start: int = 0) -> pb.ModelInferRequest:
        if len(data) <= LARGE_BYTES:
            return super().__call__(data, start)
        head, raw = cut(data, start)
        message = super().__call__(head)
        return cast("pb.ModelInferRequest", LargeRequest(message, raw)) if raw else message


PARSER = RequestParser()


def cut(body: bytes, start: int) -> tuple[bytes, list[memoryview]]:
    """Return the message that begins at `start` without its raw contents, and the raw contents.

    A message that is malformed, or has too many fields, is returned whole: its parse reports the error.
    """
    view = memoryview(body)
    head: list[memoryview] = []
    raw: list[memoryview] = []
    at = kept_from = start
    end = len(body)
    try:
        for _ in range(_MAX_FIELDS):
            if at == end:
                return b"".join((*head, view[kept_from:])), raw
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
            at += size
    except IndexError:
        pass
    return body[start:], []
