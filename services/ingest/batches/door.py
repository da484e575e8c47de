"""Batches where they can be had: they need Arrow, which a small installation leaves out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import grpc
from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document
from services.ingest.batches.calling import Model
from services.ingest.clock import Clock
from services.ingest.config import IngestConfig

if TYPE_CHECKING:
    from services.ingest.batches.room import Batches


def batches_of(
    config: IngestConfig,
    database: AsyncDatabase[Document],
    channel: grpc.aio.Channel,
    model: Model,
    *,
    clock: Clock,
    new_id: Callable[[], str],
    ready: asyncio.Event,
) -> Batches | None:
    """The batches of an instance; None where Arrow is not installed."""
    if find_spec("pyarrow") is None:
        return None
    from services.ingest.batches.room import Batches

    return Batches(config, database, channel, model, clock=clock, new_id=new_id, ready=ready)
