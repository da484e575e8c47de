"""Commits: never past what is under way, whatever the order in which messages are settled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.ingest.connectors.offset_tracker import OffsetTracker


def test_a_commit_waits_for_the_first_message() -> None:
    offsets = OffsetTracker()
    for position in (5, 6, 9):
        offsets.received(position)
    offsets.settled(6)
    assert offsets.settled_up_to is None
    offsets.settled(5)
    assert offsets.settled_up_to == 6
    offsets.settled(9)
    assert offsets.settled_up_to == 9
    assert offsets.in_flight == 0


def test_what_is_delivered_again_counts_once_and_what_was_never_delivered_not_at_all() -> None:
    offsets = OffsetTracker()
    offsets.received(1)
    offsets.received(1)
    offsets.settled(7)
    offsets.settled(1)
    offsets.received(1)
    assert offsets.in_flight == 0
    assert offsets.settled_up_to == 1


@given(st.lists(st.integers(0, 10_000), unique=True, max_size=60), st.randoms(use_true_random=False))
def test_all_up_to_the_commit_are_settled_and_the_next_is_not(positions: list[int], random: object) -> None:
    offsets, received, settled = OffsetTracker(), sorted(positions), set[int]()
    for position in received:
        offsets.received(position)
    order = list(received)
    random.shuffle(order)  # type: ignore[attr-defined]
    for position in order:
        settled.add(position)
        offsets.settled(position)
        to = offsets.settled_up_to
        first_open = next((each for each in received if each not in settled), None)
        before = [each for each in received if first_open is None or each < first_open]
        assert to == (before[-1] if before else None)
        assert offsets.in_flight == len(received) - len(settled)
