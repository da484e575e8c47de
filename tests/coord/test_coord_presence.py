"""What Envoy is told of membership while etcd is away, and just after."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from mesh.cluster.etcd import Entry
from mesh.cluster.membership import Instance, State, encode
from mesh.cluster.mirror import Copy
from services.coord.cluster import Cluster
from services.coord.enforcement import Enforcement
from services.coord.presence import Presence, observe, with_own
from tests.breakable import PATIENCE_S

ONE = Instance("infer", "local", "infer-0", "unix:/x", 10, State.READY, 100.0)
TWO = replace(ONE, instance="infer-1", pid=11)
SETTLE_S = 5.0


def seen(*instances: Instance, stale: bool = False, drained: tuple[str, ...] = (), revision: int = 7) -> Cluster:
    return Cluster(instances, drained=frozenset(drained), revision=revision, stale=stale)


def names(presence: Presence) -> list[str]:
    return [instance.instance for instance in presence.instances]


def test_nothing_is_told_before_etcd_was_seen():
    presence = observe(Presence(), seen(stale=True, revision=0), 1.0, SETTLE_S)
    assert not presence.is_known


def test_without_an_outage_it_is_the_membership():
    presence = observe(Presence(), seen(ONE, TWO), 1.0, SETTLE_S)
    assert presence.is_known
    assert names(presence) == ["infer-0", "infer-1"]
    presence = observe(presence, seen(TWO), 2.0, SETTLE_S)
    assert names(presence) == ["infer-1"]


def test_an_outage_changes_nothing_and_whoever_vanished_by_it_has_time_to_come_back():
    presence = observe(Presence(), seen(ONE, TWO, drained=(TWO.name,)), 1.0, SETTLE_S)
    presence = observe(presence, seen(ONE, TWO, stale=True), 2.0, SETTLE_S)
    assert names(presence) == ["infer-0", "infer-1"]
    # etcd is back, and all leases have expired.
    presence = observe(presence, seen(), 12.0, SETTLE_S)
    assert names(presence) == ["infer-0", "infer-1"]
    assert presence.drained == {TWO.name}
    assert presence.remaining_s(12.0) == SETTLE_S
    # One comes back, the other does not.
    presence = observe(presence, seen(ONE), 13.0, SETTLE_S)
    assert names(presence) == ["infer-0", "infer-1"]
    assert presence.remaining_s(13.0) == SETTLE_S - 1
    presence = observe(presence, seen(ONE), 17.0, SETTLE_S)
    assert names(presence) == ["infer-0"]
    assert presence.remaining_s(17.0) is None


def test_whoever_was_replaced_or_was_leaving_is_not_kept():
    presence = observe(Presence(), seen(ONE, replace(TWO, state=State.DRAINING)), 1.0, SETTLE_S)
    presence = observe(presence, seen(stale=True), 2.0, SETTLE_S)
    presence = observe(presence, seen(replace(ONE, pid=99, state=State.STARTING)), 3.0, SETTLE_S)
    assert [(i.pid, i.state) for i in presence.instances] == [(99, State.STARTING)]


def test_a_second_outage_starts_the_time_anew():
    presence = observe(Presence(), seen(ONE), 1.0, SETTLE_S)
    presence = observe(presence, seen(ONE, stale=True), 2.0, SETTLE_S)
    presence = observe(presence, seen(), 3.0, SETTLE_S)
    presence = observe(presence, seen(stale=True), 4.0, SETTLE_S)
    presence = observe(presence, seen(), 20.0, SETTLE_S)
    assert names(presence) == ["infer-0"]
    assert presence.remaining_s(20.0) == SETTLE_S


def lost(presence: Presence) -> list[str]:
    return [each.instance.instance for each in presence.lost]


def test_an_instance_that_disappears_unannounced_is_lost_for_a_time():
    presence = observe(Presence(), seen(ONE, TWO), 1.0, SETTLE_S)
    presence = observe(presence, seen(TWO), 2.0, SETTLE_S)
    presence = observe(presence, seen(), 3.0, SETTLE_S)
    assert (names(presence), lost(presence)) == ([], ["infer-0", "infer-1"])
    assert presence.remaining_s(3.0) == SETTLE_S - 1
    presence = observe(presence, seen(), 7.0, SETTLE_S)
    assert lost(presence) == ["infer-1"]
    presence = observe(presence, seen(), 8.0, SETTLE_S)
    assert lost(presence) == []
    assert presence.remaining_s(8.0) is None


def test_an_instance_that_registers_again_or_is_replaced_is_no_longer_lost():
    presence = observe(Presence(), seen(ONE, TWO), 1.0, SETTLE_S)
    presence = observe(presence, seen(), 2.0, SETTLE_S)
    presence = observe(presence, seen(replace(ONE, pid=99, state=State.STARTING), TWO), 3.0, SETTLE_S)
    assert lost(presence) == []
    presence = observe(presence, seen(TWO), 4.0, SETTLE_S)
    assert lost(presence) == []


def test_an_instance_that_announced_its_end_or_is_drained_or_was_starting_is_not_lost():
    three = replace(ONE, instance="infer-2", state=State.STARTING)
    before = seen(replace(ONE, state=State.DRAINING), TWO, three, drained=(TWO.name,))
    presence = observe(observe(Presence(), before, 1.0, SETTLE_S), seen(), 2.0, SETTLE_S)
    assert lost(presence) == []


def test_an_outage_of_etcd_does_not_count_against_a_lost_instance():
    presence = observe(Presence(), seen(ONE), 1.0, SETTLE_S)
    presence = observe(presence, seen(), 2.0, SETTLE_S)
    presence = observe(presence, seen(stale=True), 3.0, SETTLE_S)
    assert presence.remaining_s(30.0) is None
    presence = observe(presence, seen(), 30.0, SETTLE_S)
    assert lost(presence) == ["infer-0"]
    assert presence.remaining_s(30.0) == SETTLE_S
    presence = observe(presence, seen(), 35.0, SETTLE_S)
    assert (names(presence), lost(presence)) == ([], [])


def test_instances_kept_after_an_outage_are_not_kept_a_second_time():
    presence = observe(Presence(), seen(ONE), 1.0, SETTLE_S)
    presence = observe(presence, seen(stale=True), 2.0, SETTLE_S)
    presence = observe(presence, seen(), 3.0, SETTLE_S)
    presence = observe(presence, seen(), 8.0, SETTLE_S)
    assert (names(presence), lost(presence)) == ([], [])


def test_the_number_of_lost_instances_is_bounded_and_the_newest_stay():
    presence = Presence()
    for number in range(1100):
        presence = observe(presence, seen(replace(ONE, instance=f"infer-{number}")), 1.0, SETTLE_S)
    assert len(presence.lost) == 1024
    assert lost(presence)[-1] == "infer-1098"


def test_a_ready_coord_that_has_lost_its_lease_stays_in_its_own_configuration():
    own = replace(ONE, service="coord", instance="coord-1")
    assert with_own((ONE,), own) == (own, ONE)
    # Its entry in etcd, such as that of a replacement, takes precedence.
    assert with_own((replace(own, pid=99), ONE), own) == (replace(own, pid=99), ONE)
    assert with_own((ONE,), replace(own, state=State.DRAINING)) == (ONE,)
    assert with_own((ONE,), None) == (ONE,)


async def test_a_policy_is_in_force_when_a_lost_instance_and_one_without_its_lease_enforce_it_too():
    behind, ahead = replace(ONE, policy_revision=4), replace(TWO, policy_revision=6)
    mirror: Any = SimpleNamespace(copy=Copy({ahead.key: Entry(ahead.key, encode(ahead), 6, 6, 1)}, 6, stale=False))

    async def after(seen: Copy, timeout_s: float) -> Copy:
        serving.pop()
        return seen

    mirror.after = after
    enforcement = Enforcement(mirror)
    # The entry in etcd is newer than what is remembered of the same instance.
    serving = [replace(ahead, policy_revision=2)]
    enforcement.serving = lambda: serving
    assert await enforcement.lacking(6, 0.0) == ()
    serving.append(behind)
    assert await enforcement.lacking(6, 0.0) == (behind.name,)
    assert await enforcement.lacking(6, PATIENCE_S) == (), "it waits until the instance is no longer known"
    assert serving == [replace(ahead, policy_revision=2)]
    assert await enforcement.lacking(7, 0.0) == ("coord",), "the copy is older than the policy"
