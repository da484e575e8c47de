"""A large ModelInferRequest whose raw contents are views of its body: protobuf would copy them, and hold the GIL.

    body ──cut──> raw contents, as views of the body
             └──> the other fields ──protobuf──> message      LargeRequest(message, raw contents)

Of 100 MiB, each copy takes 70 to 140 ms; parsing, reading and learning the request would make four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mesh.rpc.framing import PREFIX_BYTES
from mesh.rpc.parsing import varint
from shoal.inference.v2 import inference_pb2 as pb

LARGE_BYTES = 1 << 20
"""Copies of smaller requests take less than a millisecond."""

# Fields of the largest request that is accepted: names, parameters, inputs, outputs and raw contents.
_MAX_FIELDS = 16_384

_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2


class LargeRequest:
    """A ModelInferRequest without its raw contents, and these; all other attributes are the message's."""

    def __init__(self, message: pb.ModelInferRequest, raw_input_contents: Sequence[memoryview]) -> None:
        self._message = message
        self.raw_input_contents = raw_input_contents

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)


def cut(body: bytes) -> tuple[bytes, list[memoryview]]:
    """Return the message in `body` without its raw contents, and the raw contents.

    A message that is malformed, or has too many fields, is returned whole: its parse reports the error.
    """
    view = memoryview(body)
    head: list[memoryview] = []
    raw: list[memoryview] = []
    at, end, kept_from = PREFIX_BYTES, len(body), PREFIX_BYTES
    try:
        for _ in range(_MAX_FIELDS):
            if at == end:
                return b"".join((*head, view[kept_from:])), raw
            start = at
            tag, at = varint(body, at)
            # Fields of another wire type are unknown, and rare.
            if tag & 7 != 2:
                break
            size, at = varint(body, at)
            if at + size > end:
                break
            if tag == _RAW_INPUT:
                head.append(view[kept_from:start])
                raw.append(view[at : at + size])
                kept_from = at + size
            at += size
    except IndexError:
        pass
    return body[PREFIX_BYTES:], []
