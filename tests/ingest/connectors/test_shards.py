"""Which shards an instance reads: parents before children, each shard by one instance, shares that are fair."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.ingest.connectors.shards import Checkpoint, Shard, ShardChanges, plan_changes, readable, reads_from_start
from tests.ingest.making import START

LATER = START + timedelta(seconds=10)


def test_children_wait_for_their_parents() -> None:
    shards = [Shard("a", is_closed=True), Shard("b"), Shard("c", ("a",)), Shard("d", ("a", "b")), Shard("e", ("gone",))]
    assert readable(shards, {}) == ["a", "b", "e"]
    assert readable(shards, {"a": Checkpoint("a", "7")}) == ["a", "b", "e"]
    finished = {"a": Checkpoint("a", "7", is_finished=True)}
    assert readable(shards, finished) == ["b", "c", "e"]
    assert readable(shards, {**finished, "b": Checkpoint("b", is_finished=True)}) == ["c", "d", "e"]


def test_one_alone_takes_all_and_a_second_gets_its_half() -> None:
    shards = [Shard(name) for name in "abcd"]
    assert plan_changes(shards, {}, me="x", others=(), held=(), now=START).acquire == ("a", "b", "c", "d")
    held = {name: Checkpoint(name, owner="x", expires_at=LATER) for name in "abcd"}
    assert plan_changes(shards, held, me="y", others=["x"], held=(), now=START) == ShardChanges()
    assert plan_changes(shards, held, me="x", others=["y"], held="abcd", now=START) == ShardChanges(release=("c", "d"))


def test_what_a_dead_instance_held_is_taken_when_its_lease_has_lapsed() -> None:
    shards = [Shard("a")]
    held = {"a": Checkpoint("a", owner="dead", expires_at=LATER)}
    assert plan_changes(shards, held, me="x", others=(), held=(), now=START) == ShardChanges()
    assert plan_changes(shards, held, me="x", others=(), held=(), now=LATER) == ShardChanges(acquire=("a",))


def test_an_instance_takes_back_at_once_what_its_killed_process_held() -> None:
    held = {"a": Checkpoint("a", owner="x", expires_at=LATER)}
    assert plan_changes([Shard("a")], held, me="x", others=(), held=(), now=START) == ShardChanges(acquire=("a",))


def test_a_child_is_read_from_its_beginning_wherever_the_connector_began() -> None:
    assert reads_from_start(Shard("c", ("a",)), {"a": Checkpoint("a", is_finished=True)})
    assert not reads_from_start(Shard("c", ("a",)), {})
    assert not reads_from_start(Shard("a"), {"a": Checkpoint("a")})


@given(st.integers(1, 12), st.integers(1, 5), st.randoms(use_true_random=False))
def test_instances_come_to_fair_shares_and_no_shard_has_two_readers(count: int, workers: int, random: object) -> None:
    shards = [Shard(f"{n:02}") for n in range(count)]
    names = [f"w{n}" for n in range(workers)]
    owners: dict[str, str] = {}
    for _ in range(2 * workers + 2):
        random.shuffle(names)  # type: ignore[attr-defined]
        for me in names:
            known = {shard: Checkpoint(shard, owner=owner, expires_at=LATER) for shard, owner in owners.items()}
            held = {shard for shard, owner in owners.items() if owner == me}
            due = plan_changes(shards, known, me=me, others=set(names) - {me}, held=held, now=START)
            assert not (set(due.acquire) & owners.keys())
            assert set(due.release) <= held
            for shard in due.release:
                del owners[shard]
            owners.update(dict.fromkeys(due.acquire, me))
    assert owners.keys() == {shard.id for shard in shards}
    assert all(list(owners.values()).count(name) <= -(-count // workers) for name in names)
