"""Decoder of header blocks, against two independent encoders, and with invalid blocks."""

from __future__ import annotations

import time

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.h2.frames import ConnectionBroken, Reason
from mesh.h2.headers import LIST_BYTES, LIST_FIELDS, OVERSIZED, Decoder, HeaderCache, _length, encode

NAMES = st.sampled_from(
    [b":path", b":method", b"content-type", b"grpc-timeout", b"te", b"x-shoal-tenant", b"traceparent"]
)
FIELD = st.tuples(NAMES | st.binary(min_size=1, max_size=200), st.binary(max_size=300))
BLOCKS = st.lists(st.lists(FIELD, max_size=8), min_size=1, max_size=6)


def acknowledged() -> tuple[Decoder, hpack.Encoder]:
    """A decoder whose peer has heard that it may use no table, and such a peer."""
    decoder, encoder = Decoder(HeaderCache()), hpack.Encoder()
    decoder.forbid_table()
    encoder.header_table_size = 0
    return decoder, encoder


@given(BLOCKS, st.booleans())
def test_blocks_with_a_table_come_out_as_they_went_in(blocks, huffman):
    decoder, encoder = Decoder(HeaderCache()), hpack.Encoder()
    for fields in [*blocks, *blocks]:
        assert list(decoder.decode(encoder.encode(fields, huffman=huffman)).fields) == fields


@given(BLOCKS, BLOCKS, st.booleans())
def test_blocks_come_out_as_they_went_in_when_the_table_is_forbidden_on_the_way(before, after, huffman):
    decoder, encoder = Decoder(HeaderCache()), hpack.Encoder()
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
    for decoder in (Decoder(HeaderCache()), acknowledged()[0]):
        decoder.decode(b"\x20")
        try:
            found = list(decoder.decode(data).fields)
        except ConnectionBroken:
            continue
        assert found == [(bytes(n), bytes(v)) for n, v in hpack.Decoder().decode(data, raw=True)]


def test_a_peer_that_uses_no_table_need_not_say_that_it_does_not():
    decoder = Decoder(HeaderCache())
    decoder.forbid_table()
    assert list(decoder.decode(encode([(b"x", b"1")])).fields) == [(b"x", b"1")]


def test_a_table_that_was_forbidden_is_not_used():
    decoder, encoder = Decoder(HeaderCache()), hpack.Encoder()
    decoder.decode(encoder.encode([(b"x", b"1")]))
    decoder.forbid_table()
    with pytest.raises(ConnectionBroken) as broken:
        decoder.decode(encoder.encode([(b"x", b"1")]))
    assert broken.value.reason is Reason.COMPRESSION_ERROR


@pytest.mark.parametrize("is_acknowledged", [False, True])
def test_a_block_has_two_table_size_updates_at_the_most(is_acknowledged):
    fields = encode([(b"x", b"1")])
    for updates in (1, 2):
        decoder = acknowledged()[0] if is_acknowledged else Decoder(HeaderCache())
        assert list(decoder.decode(b"\x20" * updates + fields).fields) == [(b"x", b"1")]
    with pytest.raises(ConnectionBroken) as broken:
        decoder.decode(b"\x20" * 3 + fields)
    assert broken.value.reason is Reason.COMPRESSION_ERROR


def test_a_list_that_is_too_long_ends_a_connection_that_may_use_a_table():
    decoder, encoder = Decoder(HeaderCache()), hpack.Encoder()
    with pytest.raises(ConnectionBroken) as broken:
        decoder.decode(encoder.encode([(b"n", b"v" * 1000)] * (LIST_BYTES // 1000), huffman=False))
    assert broken.value.reason is Reason.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    "fields",
    [
        [(b"n", b"v" * 1000)] * (LIST_BYTES // 1000),
        [(b"n", b"v" * LIST_BYTES)],
        [(b"n", b"")] * (LIST_FIELDS + 1),
    ],
    ids=["many values", "a long value", "many fields"],
)
def test_an_oversized_list_harms_no_other_block(fields):
    decoder, encoder = acknowledged()
    assert decoder.decode(encoder.encode(fields, huffman=False)) is OVERSIZED
    assert list(decoder.decode(encoder.encode([(b"x", b"1")])).fields) == [(b"x", b"1")]


# Codes of "a" (5 bits) eight times, and of a byte 249 (28 bits) twice.
@pytest.mark.parametrize(("code", "chars"), [(b"\x18\xc6\x31\x8c\x63", 8), (b"\xff\xff\xfe\xef\xff\xff\xee", 2)])
@pytest.mark.parametrize("times", [1, 3, 6])
def test_an_oversized_huffman_coded_value_harms_no_other_block(code, chars, times):
    decoder, encoder = acknowledged()
    text = code * (times * LIST_BYTES // chars)
    assert decoder.decode(b"\x00\x01n" + _length(len(text), 0x80) + text) is OVERSIZED
    assert list(decoder.decode(encoder.encode([(b"x", b"1")])).fields) == [(b"x", b"1")]


@pytest.mark.parametrize("size", [1, 1_000, LIST_BYTES - 100])
def test_a_value_of_any_size_is_decoded(size):
    decoder, encoder = acknowledged()
    value = (bytes(range(32, 127)) * (size // 95 + 1))[:size]
    assert decoder.decode(encoder.encode([(b"x", value)])).by_name == {b"x": value}


def test_a_full_header_costs_much_less_than_a_decoder_in_python():
    blocks = [hpack.Encoder().encode([(b"x-%d" % n, b"%d" % n + b"value" * 11_000)]) for n in range(2)]

    def cost_s(decode):
        began = time.process_time()
        for block in blocks:
            decode(block)
        return time.process_time() - began

    plain = hpack.Decoder(max_header_list_size=LIST_BYTES)
    assert cost_s(acknowledged()[0].decode) < cost_s(plain.decode) / 10


def test_fields_that_never_come_again_fill_no_memory():
    decoder, encoder = acknowledged()
    cache = decoder._cache
    for number in range(20_000):
        decoder.decode(encoder.encode([(b"grpc-timeout", b"%du" % number)]))
        assert cache.field_bytes <= 2 << 20
        assert cache.block_bytes <= 6 << 20
    assert 0 < len(cache.fields) < 8_000
    assert 0 < len(cache.blocks) < 8_000


def test_headers_of_a_thousand_callers_are_decoded_once():
    decoder, encoder = acknowledged()
    # A gateway passes eight fields that all callers share, and the claims of the caller.
    shared = [(b"x-%d" % number, b"value") for number in range(8)]
    made = [encoder.encode([*shared, (b"x-shoal-caller", b"%d" % number + b"a" * 350)]) for number in range(1_000)]
    decoded = [decoder.decode(block) for block in made]
    assert all(decoder.decode(block) is known for block, known in zip(made, decoded, strict=True))


def test_long_values_are_not_cached():
    decoder, encoder = acknowledged()
    for number in range(100):
        decoder.decode(encoder.encode([(b"x", b"%d" % number + b"a" * 1_100)]))
    assert not decoder._cache.fields
    assert not decoder._cache.blocks


def test_blocks_of_all_connections_to_envoy_are_one():
    decoder, encoder = acknowledged()
    before, after = (b":path", b"/t.T/Call"), (b"x-shoal-caller", b"someone")
    blocks = [encoder.encode([before, (b"x-shoal-connection", number), after]) for number in (b"7", b"12", b"7")]
    found = [(decoder.decode(block), decoder.connection) for block in blocks]
    assert [number for _, number in found] == [b"7", b"12", b"7"]
    assert list(found[0][0].fields) == [before, after]
    # A number that is met for the first time is decoded with its block.
    assert found[2][0] is found[1][0]
    third, number = decoder.decode(encoder.encode([before, after])), decoder.connection
    assert list(third.fields) == [before, after]
    assert number is None


CONNECTION = st.tuples(st.just(b"x-shoal-connection"), st.sampled_from([b"1", b"2", b"31", b"bad\n"]))
INSIDE = st.tuples(
    st.just(b"user-agent"), st.sampled_from([encode([(b"x-shoal-connection", b"1")]), encode([(b"te", b"x" * 40)])])
)


@given(st.lists(st.lists(CONNECTION | INSIDE | FIELD, max_size=6), min_size=1, max_size=6), st.booleans())
def test_a_known_block_with_another_connection_is_what_a_new_decoder_finds(blocks, huffman):
    decoder, encoder = acknowledged()
    for fields in [*blocks, *blocks]:
        block = encoder.encode(fields, huffman=huffman) if huffman else encode(fields)
        fresh, _ = acknowledged()
        expected, found = fresh.decode(block), decoder.decode(block)
        assert (found.fields, found.is_malformed) == (expected.fields, expected.is_malformed)
        assert decoder.connection == fresh.connection == dict(fields).get(b"x-shoal-connection")
