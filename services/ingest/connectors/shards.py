"""Assignment of a Kinesis stream's shards to instances. Pure functions of the known state and the time.

a shard is readable      when its parents are read to their end (or are deleted), so that the order of a key is kept
a shard is free          when no instance holds it, or its holder's lease has lapsed
fair share               readable shards divided by live instances; an instance that holds more releases the surplus
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard, as Kinesis lists it."""

    id: str
    parents: tuple[str, ...] = ()
    is_closed: bool = False
    """True once the shard was split or merged: it gets no more records."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Position up to which a shard is settled, and the lease of its reader."""

    shard: str
    sequence: str = ""
    """Sequence number up to which all records are settled; empty: none yet."""
    is_finished: bool = False
    """True once a closed shard is read to its end."""
    owner: str = ""
    expires_at: datetime | None = None
    began_at: datetime | None = None
    """Time, by Kinesis' clock, from which a shard is read that was started at its latest record."""

    def is_held(self, now: datetime) -> bool:
        return bool(self.owner) and self.expires_at is not None and now < self.expires_at


@dataclass(frozen=True, slots=True)
class ShardChanges:
    """Shards that an instance should acquire and release."""

    acquire: tuple[str, ...] = ()
    release: tuple[str, ...] = ()


def readable(shards: Sequence[Shard], checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Return the shards that are not finished and whose parents are, sorted."""
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
    """Return the shards that instance `me`, which reads `held`, should acquire and release.

    `others` are the other live instances.
    """
    candidates = readable(shards, checkpoints)
    workers = len(set(others) | {me})
    share = -(-len(candidates) // workers)
    mine = sorted(set(held) & set(candidates))
    if len(mine) > share:
        return ShardChanges(release=tuple(mine[share:]))
    free = [shard for shard in candidates if shard not in held and _is_free(checkpoints.get(shard), me, now)]
    return ShardChanges(acquire=tuple(free[: share - len(mine)]))


def _is_free(checkpoint: Checkpoint | None, me: str, now: datetime) -> bool:
    # A shard that `me` holds and does not read was held by a killed process of the same name.
    return checkpoint is None or checkpoint.owner == me or not checkpoint.is_held(now)


def reads_from_start(shard: Shard, checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Return True when a shard without checkpoint is read from its beginning, whatever the configured start.

    A child of a shard that was read is such a shard: its records follow those of its parent.
    """
    return any(parent in checkpoints for parent in shard.parents)
