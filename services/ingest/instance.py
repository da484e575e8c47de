"""Identity of this ingest instance, for its components."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from mesh.mongo_clock import Clock


@dataclass(frozen=True, slots=True)
class Instance:
    """Name, clock and id generator of this instance, and the event that starts its background work."""

    name: str
    process: str
    """Id of this process, unique among all processes of the same instance name."""
    clock: Clock
    new_id: Callable[[], str]
    ready: asyncio.Event
    """Set once the collections exist and the leases of earlier processes of this name have lapsed."""
