"""Time of a stop."""

from __future__ import annotations

import pytest

from mesh.process.exits import cut_s


@pytest.mark.parametrize(("drain_s", "for_calls"), [(0.0, 0.0), (0.5, 0.4), (5.0, 4.0), (20.0, 18.0), (600.0, 598.0)])
def test_a_drain_has_time_for_the_end_of_the_process(drain_s: float, for_calls: float) -> None:
    assert cut_s(drain_s) == pytest.approx(for_calls)
