"""Decoder of header blocks, against two independent encoders, and with invalid blocks."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.h2.frames import ConnectionBroken, Reason
from mesh.h2.headers import LIST_BYTES, Decoder, encode

NAMES = st.sampled_from(
    [b":path", b":method", b"content-type", b"grpc-timeout", b"te", b"x-shoal-tenant", b"traceparent"]
)
FIELD = st.tuples(NAMES | st.binary(min_size=1, max_size=200), st.binary(max_size=300))
BLOCKS = st.lists(st.lists(FIELD, max_size=8), min_size=1, max_size=6)


def acknowledged() -> tuple[Decoder, hpack.Encoder]:
    """A decoder whose peer has heard that it may use no table, and such a peer."""
    decoder, encoder = Decoder(), hpack.Encoder()
    decoder.forbid_table()
    encoder.header_table_size = 0
    return decoder, encoder


@given(BLOCKS, st.booleans())
def test_blocks_with_a_table_come_out_as_they_went_in(blocks, huffman):
    decoder, encoder = Decoder(), hpack.Encoder()
    for fields in [*blocks, *blocks]:
        assert list(decoder.decode(encoder.encode(fields, huffman=huffman)).fields) == fields


@given(BLOCKS, BLOCKS, st.booleans())
def test_blocks_come_out_as_they_went_in_when_the_table_is_forbidden_on_the_way(before, after, huffman):
    decoder, encoder = Decoder(), hpack.Encoder()
    for fields in before:
        assert list(decoder.decode(encoder.encode(fields, huffman=huffman)).fields) == fields
    decoder.forbid_table()
    encoder.header_table_size = 0
    for fields in [*after, *after]:
        assert list(decoder.decode(encoder.encode(fields, huffman=huffman)).fields) == fields


@given(st.lists(FIELD, max_size=8))
def test_encoded_blocks_are_decoded_by_other_decoders(fields):
    assert [(bytes(n), bytes(v)) for n, v in hpack.Decoder().decode(encode(fields), raw=True)] == fields


@given(st.binary(max_size=300))
def test_an_invalid_block_ends_only_its_connection(data):
    for decoder in (Decoder(), acknowledged()[0]):
        decoder.decode(b"\x20")
        try:
            found = list(decoder.decode(data).fields)
        except ConnectionBroken:
            continue
        assert found == [(bytes(n), bytes(v)) for n, v in hpack.Decoder().decode(data, raw=True)]


def test_a_peer_that_uses_no_table_need_not_say_that_it_does_not():
    decoder = Decoder()
    decoder.forbid_table()
    assert list(decoder.decode(encode([(b"x", b"1")])).fields) == [(b"x", b"1")]


def test_a_table_that_was_forbidden_is_not_used():
    decoder, encoder = Decoder(), hpack.Encoder()
    decoder.decode(encoder.encode([(b"x", b"1")]))
    decoder.forbid_table()
    with pytest.raises(ConnectionBroken) as broken:
        decoder.decode(encoder.encode([(b"x", b"1")]))
    assert broken.value.reason is Reason.COMPRESSION_ERROR


@pytest.mark.parametrize("is_acknowledged", [False, True])
def test_a_list_that_is_too_long_is_refused(is_acknowledged):
    decoder, encoder = acknowledged() if is_acknowledged else (Decoder(), hpack.Encoder())
    decoder.decode(encoder.encode([(b"x", b"y")]))
    with pytest.raises(ConnectionBroken) as broken:
        decoder.decode(encoder.encode([(b"n", b"v" * 1000)] * (LIST_BYTES // 1000), huffman=False))
    assert broken.value.reason is Reason.ENHANCE_YOUR_CALM


def test_fields_that_never_come_again_fill_no_memory():
    decoder, encoder = acknowledged()
    for number in range(20_000):
        decoder.decode(encoder.encode([(b"grpc-timeout", b"%du" % number)]))
    assert len(decoder._fields) <= 4096
    assert len(decoder._blocks) <= 512
