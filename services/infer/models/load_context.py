"""Context shared by the loads of all versions: runtimes, threads, limits, caches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.h2.memory_account import MemoryAccount, TenantShares
from mesh.rpc.tenant_turns import TenantTurns
from services.infer.ensembles.other_models import OtherModels
from services.infer.models.objectives import Objectives
from services.infer.response_cache.store import DEFAULT_BYTES, ResponseStore
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.runtime import Runtime
from services.infer.scheduling.delivery import OutcomeQueue
from services.infer.scheduling.execution import Execution, Executor
from services.infer.scheduling.queue import QueueLimits
from services.infer.sequences.sequence_table import STATE_BYTES


def identity(model: str, execution: Execution) -> Executor:
    """Return `execution` unchanged."""
    return execution


def load_turns(loads: int) -> TenantTurns:
    """Return turns of which one tenant alone has `loads` at a time: half as many again are left to others."""
    return TenantTurns(loads + (loads + 1) // 2, leaves_room=True)


@dataclass(frozen=True)
class LoadContext:
    """Parts that every version is loaded and run with."""

    runtime: Runtime | Runtimes
    threads: int
    """Threads of one execution, unless the model's configuration sets them."""
    limits: QueueLimits
    at_once: TenantTurns
    """Bounds the loads at the same time, because loading takes cores and memory, and may take minutes."""
    clock: Callable[[], float] = time.monotonic
    responses: ResponseStore = field(default_factory=ResponseStore)
    """Results of all models with a response cache."""
    wrap_execution: Callable[[str, Execution], Executor] = identity
    """Wraps each execution of a model, by the model's name."""
    states: TenantShares = field(default_factory=lambda: TenantShares(MemoryAccount(STATE_BYTES)))
    """Memory of the states of all models' sequences."""
    outcomes: OutcomeQueue = field(default_factory=OutcomeQueue)
    """Delivers the outcomes of all models' requests."""
    drain_s: float = 5.0
    """Longest time, in seconds, that a stop waits for requests; the same default as SHOAL_INFER_DRAIN_MS."""
    allow_code: bool = True
    """False rejects models that run code or read the server's files and variables."""
    allow_remote: bool = True
    """False rejects models on other servers, whose addresses a configuration names."""
    objectives: Objectives = field(default_factory=Objectives)
    """Objectives that the policy states."""
    other_models: OtherModels | None = None
    """The other models, for ensembles."""

    @classmethod
    def of(
        cls,
        runtime: Runtime | Runtimes,
        limits: QueueLimits,
        *,
        threads: int = 0,
        response_cache_bytes: int = DEFAULT_BYTES,
        state_bytes: int = STATE_BYTES,
        wrap_execution: Callable[[str, Execution], Executor] = identity,
        drain_ms: int = 5_000,
        allow_code: bool = True,
    ) -> LoadContext:
        """Return a context. `threads` 0 means the number of cores that this process may use."""
        cores, responses = len(os.sched_getaffinity(0)), ResponseStore(response_cache_bytes)
        return cls(
            runtime,
            threads or cores,
            limits,
            load_turns(cores),
            responses=responses,
            states=TenantShares(MemoryAccount(state_bytes)),
            wrap_execution=wrap_execution,
            drain_s=drain_ms / 1000,
            allow_code=allow_code,
        )
