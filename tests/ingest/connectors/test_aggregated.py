"""Records of the Kinesis Producer Library, taken apart. The first example was made by another implementation of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.connectors import aggregated
from tests.ingest.connectors.kinesises import aggregate, sealed

# The documentation of ex_kpl (Elixir): one message "data" with the partition key "partition_key".
EXAMPLE = bytes(
    [243, 137, 154, 194, 10, 13, 112, 97, 114, 116, 105, 116, 105, 111, 110, 95, 107, 101, 121, 26, 8, 8, 0, 26, 4, 100,
     97, 116, 97, 208, 54, 153, 218, 90, 34, 47, 163, 33, 8, 173, 27, 217, 85, 161, 78]
)  # fmt: skip


def test_what_another_implementation_has_packed() -> None:
    pack = aggregated.unpack(EXAMPLE)
    assert pack is not None
    assert list(pack) == [(b"partition_key", b"data")]


@given(st.lists(st.tuples(st.text(), st.binary())))
def test_messages_come_out_as_they_were_packed(messages: list[tuple[str, bytes]]) -> None:
    pack = aggregated.unpack(aggregate(messages))
    assert pack is not None
    assert len(pack) == len(messages)
    assert list(pack) == [(key.encode(), value) for key, value in messages]


def test_a_key_that_is_no_text_is_kept() -> None:
    pack = aggregated.unpack(sealed(b"\x0a\x02\xff\xfe\x1a\x05\x08\x00\x1a\x01x"))
    assert pack is not None
    assert list(pack) == [(b"\xff\xfe", b"x")]


def test_explicit_hash_keys_and_tags_are_passed_over() -> None:
    record = b"\x08\x00\x10\x00\x1a\x01x" + b"\x22\x03\x0a\x01t"
    pack = aggregated.unpack(sealed(b"\x0a\x01k" + b"\x12\x03123" + b"\x1a" + bytes([len(record)]) + record))
    assert pack is not None
    assert list(pack) == [(b"k", b"x")]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'{"text": "plain"}',
        EXAMPLE[:4],
        EXAMPLE[:-1],
        EXAMPLE[1:],
        EXAMPLE[:-1] + b"\0",
        sealed(b"\xff\xff"),
        sealed(b"\x1a\x02\x08\x00"),  # A record without data.
        sealed(b"\x1a\x05\x08\x00\x1a\x01x"),  # Its key is not in the table.
        sealed(b"\x0a\x01k\x1a\x0e\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x1a\x01x"),
    ],
    ids=range(10),
)
def test_what_only_looks_like_one_is_a_record_like_any_other(data: bytes) -> None:
    assert aggregated.unpack(data) is None


@given(st.binary())
def test_whatever_is_sealed_is_taken_apart_or_left_as_it_is(body: bytes) -> None:
    pack = aggregated.unpack(sealed(body))
    assert pack is None or len(list(pack)) == len(pack)
