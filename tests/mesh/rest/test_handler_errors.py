"""An error of a gRPC handler that a call over REST runs keeps its status, its time to retry, and the limit it names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from mesh.rest.handlers import _raised
from shoal.errors import ResourceExhausted


def test_a_refusal_by_a_limit_keeps_the_headers_that_name_it() -> None:
    trailing = (("retry-after-ms", "200"), ("x-ratelimit-limit", '5, 5;w=1;name="few/bytes"'), ("other", "x"))
    context: Any = SimpleNamespace(status=(8, "few"), trailing=trailing, cause="")
    with pytest.raises(ResourceExhausted, match="few") as raised, _raised(context):
        raise grpc.aio.AbortError("ended")
    assert (raised.value.retry_after_ms, raised.value.trailing) == (200, trailing[1:2])


def test_a_refusal_keeps_the_trace_of_the_call_or_of_its_cause() -> None:
    own, cause = "4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c"
    for trailing, expected in ((("shoal-trace", own),), own), ((), cause):
        context: Any = SimpleNamespace(status=(8, "few"), trailing=trailing, cause=cause)
        with pytest.raises(ResourceExhausted) as raised, _raised(context):
            raise grpc.aio.AbortError
        assert raised.value.trace_id == expected
