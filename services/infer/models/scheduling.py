"""Choice of a loaded version's scheduler by its configuration.

model_transaction_policy.decoupled ──> DecoupledScheduler    any number of responses
ensemble_scheduling                ──> EnsembleScheduler     requests to other models
sequence_batching                  ──> SequenceScheduler     steps of sequences, in order, each with the last state
nothing                            ──> Scheduler             batches, one result for each request
"""

from __future__ import annotations

import asyncio

from services.infer.ensembles.loading import Composed
from services.infer.ensembles.scheduler import EnsembleScheduler
from services.infer.loading import model_config
from services.infer.loading.loading import Loaded
from services.infer.model_process.session import ProcessSession
from services.infer.models.load_context import LoadContext
from services.infer.remote.session import RemoteSession
from services.infer.scheduling import rules
from services.infer.scheduling.decoupled import DecoupledScheduler
from services.infer.scheduling.execution import Execution, Executor
from services.infer.scheduling.output_sizes import OutputSizes
from services.infer.scheduling.parts_execution import PartsExecution
from services.infer.scheduling.process_execution import ProcessExecution
from services.infer.scheduling.queue import QueueLimits
from services.infer.scheduling.remote_execution import RemoteExecution
from services.infer.scheduling.request_scheduler import RequestScheduler
from services.infer.scheduling.rows_execution import RowsExecution
from services.infer.scheduling.scheduler import Scheduler
from services.infer.scheduling.statistics import Statistics
from services.infer.scheduling.task_worker import TaskWorker
from services.infer.scheduling.worker import ThreadWorker, Worker
from services.infer.sequences.execution import ProcessSequenceExecution, SequenceExecution
from services.infer.sequences.scheduler import SequenceScheduler
from services.infer.sequences.stateful import Stateful


def scheduler_of(
    name: str, number: int, loaded: Loaded, context: LoadContext, statistics: Statistics
) -> RequestScheduler | DecoupledScheduler:
    """Return the scheduler for version `number` of the model `name`. Entering the scheduler starts it."""
    statistics.slo_s = rules.slo_s(loaded.model.config)
    if isinstance(loaded, Composed):
        return _ensemble(loaded, context, statistics)
    if loaded.model.config.model_transaction_policy.decoupled and isinstance(loaded.session, ProcessSession):
        return _decoupled(name, number, loaded, loaded.session, context, statistics)
    if loaded.sequences is not None:
        return _sequencing(name, number, loaded, loaded.sequences, context, statistics)
    return _batching(name, number, loaded, context, statistics)


def _ensemble(loaded: Composed, context: LoadContext, statistics: Statistics) -> EnsembleScheduler:
    return EnsembleScheduler(
        loaded.plan,
        loaded.renew,
        context.limits,
        statistics=statistics,
        outcomes=context.outcomes,
        clock=context.clock,
    )


def _batching(name: str, number: int, loaded: Loaded, context: LoadContext, statistics: Statistics) -> Scheduler:
    config, policy = loaded.model.config, loaded.batch_policy()
    return Scheduler(
        name,
        lambda: _execution(name, number, loaded, context),
        policy,
        context.limits,
        rules.of(config),
        instances=model_config.instances(config),
        statistics=statistics,
        cost=loaded.cost,
        outputs=OutputSizes.of(loaded.model.signature, policy.max_bytes),
        outcomes=context.outcomes,
        clock=context.clock,
        worker=_worker,
    )


def _worker(execution: Executor, loop: asyncio.AbstractEventLoop, name: str) -> Worker:
    if isinstance(execution, RemoteExecution):
        return TaskWorker(execution, loop, name)
    return ThreadWorker(execution, loop, name)


def _execution(name: str, number: int, loaded: Loaded, context: LoadContext) -> Executor:
    session, signature = loaded.session, loaded.model.signature
    assert session is not None, "only ensembles have none"
    # No crash journal: a remote model's requests cannot crash this process.
    if isinstance(session, RemoteSession):
        return RemoteExecution(name, session, signature, context.clock)
    if isinstance(session, ProcessSession):
        made: Execution = ProcessExecution(name, number, session, signature, context.clock)
    elif session.takes_rows:
        made = RowsExecution(name, session, signature, context.clock)
    elif session.gpu_stream is not None:
        made = PartsExecution(name, session, signature, context.clock)
    else:
        made = Execution(name, session, signature, context.clock)
    return context.wrap_execution(name, made)


def _sequencing(
    name: str, number: int, loaded: Loaded, sequences: Stateful, context: LoadContext, statistics: Statistics
) -> SequenceScheduler:
    config, signature = loaded.model.config, loaded.model.signature
    session, settings, first = loaded.session, sequences.settings, sequences.first
    assert session is not None, "an ensemble has no sequences of its own"

    def execution(instance: int) -> Executor:
        if isinstance(session, ProcessSession):
            made: Execution = ProcessSequenceExecution(
                name, number, session, instance, signature, settings, first, context.clock
            )
        else:
            made = SequenceExecution(name, session, signature, settings, first, context.clock)
        return context.wrap_execution(name, made)

    return SequenceScheduler(
        name,
        execution,
        settings,
        context.limits,
        instances=model_config.instances(config),
        weights=rules.of(config).weights,
        first_shapes=tuple(array.shape for array in first.values()),
        outputs=OutputSizes.of(signature, loaded.batch_policy().max_bytes),
        states=context.states,
        statistics=statistics,
        outcomes=context.outcomes,
        clock=context.clock,
    )


def _decoupled(
    name: str, number: int, loaded: Loaded, session: ProcessSession, context: LoadContext, statistics: Statistics
) -> DecoupledScheduler:
    level = rules.of(loaded.model.config).levels[0]
    return DecoupledScheduler(
        name,
        number,
        session,
        QueueLimits(level.calls or context.limits.calls, context.limits.size_bytes),
        default_timeout_s=level.timeout_s,
        statistics=statistics,
        clock=context.clock,
    )
