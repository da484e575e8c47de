"""Ids have the form of the specification, and rise."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.ingest.ulid import Ulids, encode, floor, is_ulid


def test_the_example_of_the_specification() -> None:
    # https://github.com/ulid/spec: 1469918176385 is 01ARYZ6S41.
    assert Ulids(lambda: 1469918176385, lambda n: b"\xff" * n).new() == "01ARYZ6S41" + "Z" * 16
    assert floor(1469918176385) == "01ARYZ6S41" + "0" * 16
    assert encode((1 << 128) - 1) == "7" + "Z" * 25


@given(st.lists(st.integers(0, 2**48 - 2), min_size=1, max_size=50), st.binary(min_size=10, max_size=10))
def test_ids_rise_whatever_the_clock_does(times: list[int], noise: bytes) -> None:
    clock = iter(times)
    ulids = Ulids(lambda: next(clock), lambda n: noise)
    made = [ulids.new() for _ in times]
    assert made == sorted(set(made))
    assert all(map(is_ulid, made))


def test_an_overflow_borrows_the_next_millisecond() -> None:
    ulids = Ulids(lambda: 5, lambda n: b"\xff" * n)
    assert ulids.new() < ulids.new() == floor(6)


def test_what_is_no_id() -> None:
    for text in ("", "01ARYZ6S41", "81ARYZ6S41" + "Z" * 16, "01aryz6s41" + "z" * 16, "01ARYZ6S4I" + "Z" * 16, "Ж" * 26):
        assert not is_ulid(text)
    assert not is_ulid(floor(1) + "\n")
