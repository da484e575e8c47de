"""Events about jobs inside one instance: published by code that writes jobs, subscribed to in `areas.subscribe`.

    recorder ──changed, recorded──┐
    intake ──accepted─────────────┼──> watches, endings, cascade, dispatcher
    cascade, dead letters ──due───┘

Subscribers are called immediately, in the order of subscription, and must not block. An event is a hint: a subscriber
finds changes by other instances, and changes before a crash, by its own later reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, ParamSpec

from services.ingest.job import Job
from shoal.store.v1 import store_pb2

P = ParamSpec("P")


class Event(Generic[P]):
    """One kind of event. A call publishes one event."""

    def __init__(self) -> None:
        self._subscribers: tuple[Callable[P, None], ...] = ()

    def subscribe(self, *subscribers: Callable[P, None]) -> None:
        """Call `subscribers` at each later event, after the earlier subscribers."""
        self._subscribers += subscribers

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        for subscriber in self._subscribers:
            subscriber(*args, **kwargs)


class JobEvents:
    """The events of one instance."""

    def __init__(self) -> None:
        self.changed: Event[[str]] = Event()
        """This instance wrote the state of the job with this id; the job may have ended."""
        self.recorded: Event[[Job, store_pb2.Result]] = Event()
        """The store has recorded this result of the job, as its first."""
        self.accepted: Event[[Sequence[Job]]] = Event()
        """This instance inserted these new jobs, which are durable now."""
        self.due_again: Event[[Sequence[Job]]] = Event()
        """These jobs are in the queue again: requeued, or unblocked by their dependencies."""
