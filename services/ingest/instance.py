"""This instance of ingest, as the parts of it need to know it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from services.ingest.clock import Clock


@dataclass(frozen=True, slots=True)
class Instance:
    """Name, clock and ids of this instance, and the event that lets its background work begin."""

    name: str
    process: str
    """Id of this process, unlike that of any other of the same name."""
    clock: Clock
    new_id: Callable[[], str]
    ready: asyncio.Event
    """Set once the collections exist and the leases of earlier processes of this name have lapsed."""
