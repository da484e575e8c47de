"""Places of open calls are shared between tenants."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from mesh.rpc.places import Places
from shoal.errors import ResourceExhausted


def most(places: Places, tenant: str | None, stack: ExitStack) -> int:
    """Take places until there is none left for `tenant`; return their number."""
    for n in range(1_000):
        try:
            stack.enter_context(places.take(tenant))
        except ResourceExhausted:
            return n
    raise AssertionError("there is no limit")


@pytest.mark.parametrize(("limit", "alone"), [(1, 1), (2, 1), (3, 2), (64, 42), (100, 66)])
def test_a_tenant_alone_gets_two_thirds_and_others_find_room(limit: int, alone: int):
    places = Places(limit, "watches")
    with ExitStack() as stack:
        assert most(places, "a", stack) == alone
        assert limit == 1 or most(places, "b", stack) >= 1
        assert limit < 64 or most(places, "c", stack) >= 1
        most(places, None, stack)
        assert places.taken == limit
    assert places.taken == 0


def test_calls_without_a_tenant_may_take_all():
    places = Places(8, "watches", retry_after_ms=5)
    with ExitStack() as stack:
        assert most(places, "", stack) == 8
        with pytest.raises(ResourceExhausted, match="8 watches are open, which is the limit") as err, places.take("a"):
            pass
        assert err.value.retry_after_ms == 5


def test_a_place_is_free_again_after_an_error():
    places = Places(1, "exports")
    with pytest.raises(KeyError), places.take("a"):
        raise KeyError
    with places.take("b"):
        assert places.taken == 1
