"""Real Triton and Shoal get the same requests: their responses are the same, or docs/compatibility.md says why not.

A difference that is not listed fails, and so does a listed one that is none any more.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.inference.v2 import inference_pb2 as pb
from tests.infer.conformance import wire
from tests.infer.conformance.wire import Given, floats, request
from tests.infer.triton import repository
from tests.infer.triton.cases import Case, every, infer, step
from tests.infer.triton.differences import Difference
from tests.infer.triton.seen import Seen, see
from tests.long_form import by_form

CASES = every()
UNDER_LOAD = ("queue full",)
"""Cases that take more than one call: tested one by one below."""


def judge(case: str, triton: Seen, shoal: Seen, known: list[Difference], starts: str = "") -> None:
    """Fails the test unless both saw the same, or differ as it is listed."""
    rows = [row for row in known if row.covers(case)]
    assert len(rows) <= 1, f"'{case}' is listed more than once"
    is_same = triton[:2] == shoal[:2] and triton[2].startswith(starts) and shoal[2].startswith(starts)
    if not rows:
        assert is_same, f"'{case}' differs, and is not listed:\n  Triton {triton}\n  Shoal  {shoal}"
        return
    assert not is_same, f"'{case}' is listed as a difference, but is none any more: {shoal}"
    assert (triton[0], shoal[0]) == (rows[0].triton, rows[0].shoal), f"'{case}':\n  Triton {triton}\n  Shoal  {shoal}"


@pytest.mark.parametrize("name", CASES)
def test_case(triton, shoal, known, name):
    case = CASES[name]
    judge(name, see(triton, case), see(shoal, case), known, case.starts)


def test_every_listed_difference_is_one_of_a_case(known):
    assert known
    for row in known:
        for pattern in row.cases:
            alone = Difference((pattern,), row.triton, row.shoal, row.why)
            assert any(alone.covers(case) for case in (*CASES, *UNDER_LOAD)), f"'{pattern}' is the name of no case"


def test_queue_full(triton, shoal, known):
    """`sleepy` takes one call at a time and lets one wait: of six at once, at least one is refused."""

    def refusal(stub) -> Seen:
        asked = infer("sleepy", request("sleepy", floats(columns=1)))
        with ThreadPoolExecutor(6) as pool:
            seen = list(pool.map(lambda _: see(stub, asked), range(6)))
        assert "OK" in {code for code, _, _ in seen}
        refused = [response for response in seen if response[0] != "OK"]
        assert refused, "nothing was refused"
        assert len({code for code, _, _ in refused}) == 1, refused
        return refused[0]

    judge("queue full", refusal(triton), refusal(shoal), known)


def test_rows_keep_their_places(triton, shoal):
    """Two sequences of `steps`, one call at a time: whoever has nothing to say leaves a row that is not READY."""

    def rows(stub) -> list[int]:
        asked = [
            *(step("steps", 11, start=True), step("steps", 12, start=True), step("steps", 12), step("steps", 11)),
            *(step("steps", 11, end=True), step("steps", 12), step("steps", 12, end=True)),
            step("steps", 13, start=True, end=True),
        ]
        responses = [stub.ModelInfer(each, timeout=wire.PATIENCE_S) for each in asked]
        return [int(wire.array(response, "y")[0, -1]) for response in responses]

    assert rows(triton) == rows(shoal) == [0, 1, 1, 0, 0, 1, 1, 0]


def _sent(model: str, datatype: str, shape: tuple[int, int], off: int, typed: bool) -> pb.ModelInferRequest:
    """[rows, columns] of ones and noughts; raw data is `off` bytes too long (or short)."""
    array = (np.arange(shape[0] * shape[1]) % 2).astype(wire.NUMPY[datatype])
    if typed and datatype in wire.CONTENTS:
        return request(model, Given("x", datatype, shape, values=array.tolist()))
    raw = array.tobytes()
    return request(model, Given("x", datatype, shape, raw + b"\0" * off if off >= 0 else raw[:off]))


@settings(max_examples=by_form(60, 300), database=None)
@given(
    model=st.sampled_from(repository.DATATYPES),
    other=st.none() | st.sampled_from(repository.DATATYPES),
    shape=st.tuples(st.integers(1, 10), st.integers(0, 6)),  # With no rows Triton hangs, or invents one.
    off=st.sampled_from([0, 0, 0, 0, 1, 4, -1, -4]),
    typed=st.booleans(),
    version=st.sampled_from(["", "", "", "1", "2", "x"]),
    outputs=st.sampled_from([[], ["y"], ["z"]]),
)
def test_any_tensor(triton, shoal, model, other, shape, off, typed, version, outputs):
    """A tensor of some datatype and shape for a model of some datatype: both take it, or both refuse it."""
    asked = _sent(f"same_{model.lower()}", other or model, shape, off, typed)
    asked.model_version = version
    for name in outputs:
        asked.outputs.add(name=name)
    judge("any", see(triton, infer("any", asked)), see(shoal, infer("any", asked)), [])


NAMES = st.sampled_from(["a", "a", "a", "b", "b", "b", "c"])


@settings(max_examples=by_form(50, 200), database=None)
@given(
    tensors=st.lists(st.tuples(NAMES, st.integers(1, 9), st.integers(1, 4)), max_size=3),
    outputs=st.sampled_from([[], ["sum"], ["difference"], ["sum", "difference"], ["product"]]),
    id=st.text(max_size=20),
)
def test_any_two_tensors(triton, shoal, tensors, outputs, id):
    """Inputs that are missing, too many, given twice, or of sizes that do not go together."""
    sent = [floats(name, rows, columns) for name, rows, columns in tensors]
    asked = request("add", *sent, outputs=outputs, id=id)
    judge("any", see(triton, infer("any", asked)), see(shoal, infer("any", asked)), [])


def test_both_are_alive_after_all_of_it(triton, shoal):
    for stub in (triton, shoal):
        assert see(stub, Case("live", "ServerLive", (pb.ServerLiveRequest(),)))[:2] == ("OK", {"live": True})
