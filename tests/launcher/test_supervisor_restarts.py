"""Restart policy: delays after a sequence of exits and lifetimes."""

from shoal.node.restarts import Restarts


def delays(*lives_s: float) -> list[float]:
    state, found = Restarts(), []
    for lived_s in lives_s:
        state = state.after(lived_s)
        found.append(state.delay_s)
    return found


def test_a_process_killed_after_a_long_run_restarts_immediately() -> None:
    assert delays(3600) == [0.1]


def test_early_exits_double_the_delay_up_to_a_bound() -> None:
    assert delays(*[1.0] * 10) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]


def test_the_wait_stays_bounded_for_ever() -> None:
    assert delays(*[0.0] * 5_000)[-1] == 10.0


def test_a_steady_run_resets_the_early_exits() -> None:
    assert delays(1, 1, 1, 10.0, 1) == [0.1, 0.2, 0.4, 0.1, 0.1]


def test_a_crash_loop_begins_once() -> None:
    state, news = Restarts(), []
    for _ in range(5):
        state = state.after(0.5)
        news.append((state.is_loop, state.begins_loop))
    assert news == [(False, False), (False, False), (True, True), (True, False), (True, False)]
    assert not state.steady().is_loop
