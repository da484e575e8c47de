"""Large JSON is parsed in steps, with the result and the errors of a parse at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.rest import json_text, long_lists, tensor_json
from mesh.rest.json_text import MAX_VALUES
from shoal.errors import InvalidArgument
from shoal.oip.datatypes import BY_NAME
from tests.long_form import by_form


def parsed(text: bytes) -> tuple[Any, int]:
    """Return the document, and the number of steps."""
    steps = long_lists.parse(text)
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, count
        count += 1


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is parsed at once."""
    found: list[int] = []
    parse = json_text.JsonParser.__call__

    def observed(self: json_text.JsonParser, data: bytes, start: int = 0) -> Any:
        found.append(len(data))
        return parse(self, data, start)

    monkeypatch.setattr(json_text.JsonParser, "__call__", observed)
    return found


def request(data: bytes) -> bytes:
    return b'{"id":"a","inputs":[{"name":"x","shape":[4],"data":' + data + b'},{"name":"y","data":[1,2]}],"more":[]}'


@pytest.mark.parametrize(
    "data",
    [
        b"[" + b"0.12345678," * (MAX_VALUES - 10) + b"1]",
        b"[" + b"[1, 2,3],\n" * 90_000 + b"[4, 5,6] ]",
        b"[[" + b"0.5," * 200_000 + b"1],[" + b"2.5," * 200_000 + b"3]]",
        b"[" + b"NaN,Infinity,-1," * 50_000 + b"1e5]",
        b"[" + b"true,false," * 100_000 + b"true]",
    ],
    ids=["flat", "rows", "two rows", "not finite", "booleans"],
)
def test_a_long_list_is_parsed_in_pieces_of_less_than_a_tenth(data: bytes, pieces: list[int]) -> None:
    text = request(data)
    document, steps = parsed(text)
    assert repr(document) == repr(json.loads(text))
    assert max(pieces) < 70_000
    assert steps >= len(pieces) >= len(text) // 70_000


def test_long_lists_may_be_members_of_the_document_and_some_tensors(pieces: list[int]) -> None:
    numbers = b"[" + b"7," * 100_000 + b"7]"
    text = b'{"a":%b,"inputs":[{"data":%b},{"data":%b,"name":"\\"["}],"text":"[%b]\\\\"}' % (
        *(numbers,) * 3,
        b"1," * 99_999,
    )
    document, _ = parsed(text)
    assert document == json.loads(text)
    # The text is no list, and parsed with the rest.
    assert max(pieces) < 210_000


ODD = {
    "a comma at the end": request(b"[" + b"1," * 70_000 + b"]"),
    "a value missing": request(b"[" + b"1," * 32_768 + b"," + b"1," * 70_000 + b"1]"),
    "no end": request(b"[" + b"1," * 70_000 + b"1"),
    "two ends": request(b"[" + b"1," * 70_000 + b"1]]"),
    "ends and begins": request(b"[[" + b"1," * 40_000 + b"1]],[[" + b"1," * 70_000 + b"1]]"),
    "no number": request(b"[" + b"1," * 70_000 + b"x]"),
    "an object": request(b"[" + b"1," * 70_000 + b"{}]"),
    "two lists": request(b"[[1],[" + b"1," * 70_000 + b"1]]"),
    "lists and a text": request(b"[[1],[" + b"1," * 70_000 + b'1],"a"]'),
    "deep": request(b"[" * 100 + b"1," * 70_000 + b"1" + b"]" * 100),
    "no object": b'["a",[' + b"1," * 20_000 + b"1],[2]]",
    "inputs": b'{"inputs":[' + b"1," * 70_000 + b"1]}",
    "escaped quotes": b'{"id":"' + b'\\"' * 70_001 + b'\\\\","inputs":[{"data":[' + b"1," * 70_000 + b"1]}]}",
}


@pytest.mark.parametrize("case", ODD)
def test_other_json_gives_the_same_document_or_an_error(case: str) -> None:
    text = ODD[case]
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(InvalidArgument, match="failed to parse the request JSON buffer"):
            parsed(text)
        return
    assert parsed(text)[0] == expected


def test_a_long_list_where_no_request_has_one_is_refused_and_so_are_many_values_beside_lists() -> None:
    with pytest.raises(InvalidArgument, match="neither the data of an input"):
        parsed(b'{"a":{"b":[' + b"1," * 70_000 + b"1]}}")
    with pytest.raises(InvalidArgument, match="neither the data of an input"):
        parsed(b'["a",[' + b"1," * 70_000 + b"1]]")
    with pytest.raises(InvalidArgument, match="values beside its long lists"):
        parsed(request(b"[" + b'"a",' * (MAX_VALUES - 10) + b"1]"))


numbers = st.one_of(st.integers(-(10**6), 10**6), st.floats(allow_nan=False), st.booleans(), st.none())
nested = st.recursive(st.lists(numbers, max_size=8), lambda inner: st.lists(st.one_of(inner, numbers), max_size=6))


@settings(max_examples=by_form(100, 1000), deadline=None)
@given(
    data=st.lists(nested, min_size=1, max_size=5), ids=st.text(max_size=10), piece=st.integers(1, 40), gap=st.booleans()
)
def test_any_document_is_parsed_as_at_once(data: list[Any], ids: str, piece: int, *, gap: bool) -> None:
    document = {"id": ids, "inputs": [{"name": ids, "data": each} for each in data], "more": data}
    text = json.dumps(document, separators=(", ", ": ") if gap else (",", ":")).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_lists, "_LONG", piece)
        assert parsed(text)[0] == document


async def test_many_values_are_searched_and_flattened_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0

    def observed(function: Any, values: list[Any]) -> Iterator[Any]:
        nonlocal longest
        longest = max(longest, len(values))
        return map(function, values)

    monkeypatch.setattr(tensor_json, "map", observed, raising=False)
    data = [[1, [2, 3]]] * 50_000
    raw = await tensor_json.to_raw(data, BY_NAME["INT8"], 150_000, 3, "x")
    assert raw == bytes([1, 2, 3]) * 50_000
    assert 0 < longest <= 1 << 16


def test_the_end_of_a_long_list_is_found_without_a_look_at_each_byte() -> None:
    """A search for both brackets takes 60 ms for a number of 8 MB, and delays all callers; one for the end 1 ms."""
    text = b"[" + b"1" * (8 << 20) + b"]}"
    took = []
    for _ in range(5):
        began = time.thread_time()
        assert long_lists._end_of_list(text, 0, len(text), 0) == len(text) - 1
        took.append(time.thread_time() - began)
    assert min(took) < 0.02


def test_lists_nested_too_deep_are_given_up_at_the_first_end(pieces: list[int]) -> None:
    text = b'{"inputs":' + b"[" * 99_000 + b"]" * 99_000 + b"}"
    assert long_lists._end_of_list(text, 10, len(text), 0) == -1
    with pytest.raises(InvalidArgument, match="depth limit exceeded"):
        parsed(text)
    assert pieces == [len(text)]
