"""When a failed call is tried again: the policy by itself, and a Caller that lives by it on a clock of the test."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.transport.retry import RetryPolicy
from shoal.errors import BY_CODE, Code, InvalidArgument, ResourceExhausted, ShoalError, Unavailable

ALWAYS_HALF: Callable[[], float] = lambda: 0.5  # noqa: E731


def wait(error: ShoalError, attempt: int = 1, left: float | None = 100.0, idempotent: bool = True) -> float | None:
    return RetryPolicy().wait_s(error, attempt=attempt, idempotent=idempotent, left_s=left, draw=ALWAYS_HALF)


def test_the_wait_is_drawn_below_a_bound_that_doubles() -> None:
    assert [wait(Unavailable("down"), attempt) for attempt in (1, 2, 3, 4)] == [0.05, 0.1, 0.2, 0.4]
    many = RetryPolicy(attempts=100)
    assert many.wait_s(Unavailable(""), attempt=90, idempotent=True, left_s=None, draw=ALWAYS_HALF) == 1.0


def test_attempts_end() -> None:
    assert wait(Unavailable("down"), attempt=8) is None
    assert (
        RetryPolicy(attempts=1).wait_s(Unavailable(""), attempt=1, idempotent=True, left_s=9, draw=ALWAYS_HALF) is None
    )


def test_a_stream_is_given_more_attempts() -> None:
    policy = RetryPolicy(attempts=2, stream_attempts=3)
    waits = [
        policy.wait_s(Unavailable(""), attempt=n, idempotent=True, left_s=None, draw=ALWAYS_HALF, stream=True)
        for n in (1, 2, 3)
    ]
    assert waits == [0.05, 0.1, None]


def test_only_what_may_be_repeated_is_repeated() -> None:
    assert wait(Unavailable("down"), idempotent=False) is None


@pytest.mark.parametrize("code", [code for code in Code if code not in (Code.OK, Code.UNKNOWN)])
def test_only_two_statuses_are_retried(code: Code) -> None:
    retried = wait(BY_CODE[code]("no")) is not None
    assert retried == (code in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED))


def test_the_server_says_when_to_come_back_and_jitter_comes_on_top() -> None:
    assert wait(ResourceExhausted("full", retry_after_ms=2_000)) == pytest.approx(2.05)


def test_a_message_that_is_too_large_does_not_shrink_by_waiting() -> None:
    assert wait(ResourceExhausted("CLIENT: Sent message larger than max (9 vs. 4)")) is None


def test_never_past_the_deadline() -> None:
    assert wait(Unavailable("down"), left=0.05) is None
    assert wait(ResourceExhausted("full", retry_after_ms=2_000), left=1.0) is None


@given(
    st.integers(1, 10_000),
    st.floats(0, 1e6),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 10**6),
    st.builds(RetryPolicy, attempts=st.integers(1, 10_000)),
)
def test_a_wait_always_ends_before_the_deadline(
    attempt: int, left: float, draw: float, after: int, policy: RetryPolicy
) -> None:
    error = ResourceExhausted("full", retry_after_ms=after)
    got = policy.wait_s(error, attempt=attempt, idempotent=True, left_s=left, draw=lambda: draw)
    assert got is None or (after / 1000 <= got < left and got <= policy.longest_wait_s + after / 1000)


def test_an_error_keeps_its_class() -> None:
    assert wait(InvalidArgument("x")) is None
