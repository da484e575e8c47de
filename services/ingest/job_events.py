"""Events about jobs inside one instance: published by those that write jobs, subscribed to in one place (`app.py`).

    recorder ──changed, recorded──┐
    intake ──accepted─────────────┼──> watches, endings, cascade, dispatcher
    cascade, dead letters ──due───┘

A subscriber is called at once, in the order of subscription; it must not block. An event is a hint: what a subscriber
misses (it was made elsewhere, or the process died), it finds by itself later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, ParamSpec

from services.ingest.job import Job
from shoal.store.v1 import store_pb2

P = ParamSpec("P")


class Event(Generic[P]):
    """One kind of event; called to publish it."""

    def __init__(self) -> None:
        self._subscribers: tuple[Callable[P, None], ...] = ()

    def subscribe(self, *subscribers: Callable[P, None]) -> None:
        """Call these at each event from now on, after those that have subscribed before."""
        self._subscribers += subscribers

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        for subscriber in self._subscribers:
            subscriber(*args, **kwargs)


class JobEvents:
    """The events of one instance."""

    def __init__(self) -> None:
        self.changed: Event[[str]] = Event()
        """The state of the job with this id was written here; it may have ended."""
        self.recorded: Event[[Job, store_pb2.Result]] = Event()
        """The store has recorded this result of the job: it stands."""
        self.accepted: Event[[Sequence[Job]]] = Event()
        """These new jobs are durable, inserted here."""
        self.due_again: Event[[Sequence[Job]]] = Event()
        """These jobs are in the queue again: requeued, or released by the jobs that they waited for."""
