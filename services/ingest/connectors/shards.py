"""Which shards of a Kinesis stream an instance should hold. Plain functions of what is known and the time.

a shard may be read      when its parents are read to their end (or are gone): resharding keeps the order of a key
it is free               when nobody holds it, or its holder was not heard of until its lease lapsed
an instance's fair share a part of the shards that may be read; who holds more gives some back
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard, as Kinesis lists it."""

    id: str
    parents: tuple[str, ...] = ()
    is_closed: bool = False
    """It was split or merged: it gets no more records, and has an end."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far a shard is read, and who reads it."""

    shard: str
    sequence: str = ""
    """All up to this record are settled; empty: none yet."""
    is_finished: bool = False
    """Read to the end of a closed shard."""
    owner: str = ""
    expires_at: datetime | None = None
    began_at: datetime | None = None
    """Where it was begun with its latest record: by Kinesis' clock, at or before that record."""

    def is_held(self, now: datetime) -> bool:
        return bool(self.owner) and self.expires_at is not None and now < self.expires_at


@dataclass(frozen=True, slots=True)
class ShardChanges:
    """What an instance should do about its shards."""

    take: tuple[str, ...] = ()
    release: tuple[str, ...] = ()


def readable(shards: Sequence[Shard], checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """The shards that are not finished, and whose parents are. Sorted."""
    listed = {shard.id for shard in shards}
    finished = {shard for shard, checkpoint in checkpoints.items() if checkpoint.is_finished}
    return sorted(
        shard.id for shard in shards if shard.id not in finished and not (set(shard.parents) & listed) - finished
    )


def plan_changes(
    shards: Sequence[Shard],
    checkpoints: Mapping[str, Checkpoint],
    *,
    me: str,
    others: Collection[str],
    held: Collection[str],
    now: datetime,
) -> ShardChanges:
    """What instance `me`, which reads `held`, should take and give back. `others` are the instances that live."""
    candidates = readable(shards, checkpoints)
    workers = len(set(others) | {me})
    share = -(-len(candidates) // workers)
    mine = sorted(set(held) & set(candidates))
    if len(mine) > share:
        return ShardChanges(release=tuple(mine[share:]))
    free = [shard for shard in candidates if shard not in held and _is_free(checkpoints.get(shard), me, now)]
    return ShardChanges(take=tuple(free[: share - len(mine)]))


def _is_free(checkpoint: Checkpoint | None, me: str, now: datetime) -> bool:
    # What `me` does not read and yet holds, a killed process of the same name has held.
    return checkpoint is None or checkpoint.owner == me or not checkpoint.is_held(now)


def reads_from_start(shard: Shard, checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether a shard without checkpoint is read from its beginning, wherever the connector began with the stream:
    what was written to it after its parents is not to be missed."""
    return any(parent in checkpoints for parent in shard.parents)
