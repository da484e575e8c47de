"""All attacks by name; the last runs several at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench.siege import (
    connections,
    floods,
    header_attacks,
    http1,
    job_attacks,
    memory,
    messages,
    scheduling,
    store_attacks,
)
from bench.siege.attack import Attack

_EACH = (
    *messages.ATTACKS,
    *header_attacks.ATTACKS,
    *floods.ATTACKS,
    *memory.ATTACKS,
    *connections.ATTACKS,
    *scheduling.ATTACKS,
    *http1.ATTACKS,
    *job_attacks.ATTACKS,
    *store_attacks.ATTACKS,
)
_AT_ONCE = (
    "gzip-zeros",
    "proto-empties",
    "headers-55k",
    "rapid-reset",
    "windows",
    "half-bodies",
    "unread",
    "idle-streams",
    "shapes",
    "full-queue",
    "expire-rows",
    "slow-senders",
    "h1-pipelining",
    "h1-half-bodies",
    "json-containers",
)

CATALOGUE: Mapping[str, Sequence[Attack]] = {
    **{attack.name: (attack,) for attack in _EACH},
    "all-at-once": tuple(replace(attack, connections=2) for attack in _EACH if attack.name in _AT_ONCE),
}


def described(name: str) -> str:
    """Return what an attack is, in one line."""
    attacks = CATALOGUE[name]
    return attacks[0].what if len(attacks) == 1 else ", ".join(attack.name for attack in attacks)


def attacks_at(front: str) -> Sequence[str]:
    """Return the names of the attacks for a front: those of jobs need a node's gateway."""
    return [name for name, attacks in CATALOGUE.items() if front == "gateway" or not is_of_jobs(name)]


def is_of_jobs(name: str) -> bool:
    """Return True for an attack on ingest or store."""
    return any(attack.is_of_jobs for attack in CATALOGUE[name])
