"""Commits: never past what is under way, whatever the order in which messages are settled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.ingest.connectors.offset_tracker import OffsetTracker


def test_a_commit_waits_for_the_first_message() -> None:
    ledger = OffsetTracker()
    for position in (5, 6, 9):
        ledger.received(position)
    ledger.settled(6)
    assert ledger.settled_up_to is None
    ledger.settled(5)
    assert ledger.settled_up_to == 6
    ledger.settled(9)
    assert ledger.settled_up_to == 9
    assert ledger.in_flight == 0


def test_what_is_delivered_again_counts_once_and_what_was_never_delivered_not_at_all() -> None:
    ledger = OffsetTracker()
    ledger.received(1)
    ledger.received(1)
    ledger.settled(7)
    ledger.settled(1)
    ledger.received(1)
    assert ledger.in_flight == 0
    assert ledger.settled_up_to == 1


@given(st.lists(st.integers(0, 10_000), unique=True, max_size=60), st.randoms(use_true_random=False))
def test_all_up_to_the_commit_are_settled_and_the_next_is_not(positions: list[int], random: object) -> None:
    ledger, received, settled = OffsetTracker(), sorted(positions), set[int]()
    for position in received:
        ledger.received(position)
    order = list(received)
    random.shuffle(order)  # type: ignore[attr-defined]
    for position in order:
        settled.add(position)
        ledger.settled(position)
        to = ledger.settled_up_to
        first_open = next((each for each in received if each not in settled), None)
        before = [each for each in received if first_open is None or each < first_open]
        assert to == (before[-1] if before else None)
        assert ledger.in_flight == len(received) - len(settled)
