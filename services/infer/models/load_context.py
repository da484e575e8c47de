"""What every version of every model is loaded and run with."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from services.infer.ensembles.other_models import OtherModels
from services.infer.response_cache.store import DEFAULT_BYTES, ResponseStore
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.runtime import Runtime
from services.infer.scheduling.execution import Execution, Executor
from services.infer.scheduling.queue import QueueLimits


def identity(model: str, execution: Execution) -> Executor:
    """Puts nothing around an execution."""
    return execution


@dataclass(frozen=True)
class LoadContext:
    """What every version is loaded and run with."""

    runtime: Runtime | Runtimes
    threads: int
    """For one execution, where the model does not say."""
    limits: QueueLimits
    at_once: asyncio.Semaphore
    """Loading takes cores and memory: so many at a time."""
    clock: Callable[[], float] = time.monotonic
    responses: ResponseStore = field(default_factory=ResponseStore)
    """Where the models with a response cache keep answers."""
    around: Callable[[str, Execution], Executor] = identity
    """What stands around each execution of a model, by the model's name."""
    neighbours: OtherModels | None = None
    """The other models, for ensembles."""

    @classmethod
    def of(
        cls,
        runtime: Runtime | Runtimes,
        limits: QueueLimits,
        *,
        threads: int = 0,
        response_cache_bytes: int = DEFAULT_BYTES,
        around: Callable[[str, Execution], Executor] = identity,
    ) -> LoadContext:
        """With `threads` 0: as many as this process may use cores."""
        cores, responses = len(os.sched_getaffinity(0)), ResponseStore(response_cache_bytes)
        return cls(runtime, threads or cores, limits, asyncio.Semaphore(cores), responses=responses, around=around)
