"""One instance of a model: a process that is started again whenever it ends.

    STARTING ──loaded──> RUNNING ──ends──> WAITING (backoff) ──> STARTING ...      close() ──> CLOSED
        └── not loaded, the first time: FAILED

A thread, the keeper, does all of this. Others wait for a running process, use it, and may kill it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mesh.process.backoff import Backoff
from services.infer.model_process.channel import ChannelClosed
from services.infer.model_process.model_runner import NotLoaded
from services.infer.model_process.process import Process
from services.infer.model_process.shared.shared_process import Shared
from services.infer.model_process.thread_runner import ThreadRunner
from shoal.errors import FailedPrecondition, Unavailable

log = logging.getLogger(__name__)

_RESTART_FIRST_S, _RESTART_MAX_S = 0.05, 30.0
_STEADY_S = 10.0
# A process that has run for so long has not failed at its start: the next wait is a first one.
_GRACE_S = 5.0
# For a model's own good-bye.
_LOOK_S = 0.1
# How often somebody who waits for loading looks whether that is still wanted.
_MIN_RETRY_MS, _MAX_RETRY_MS = 50, 10_000


Running: TypeAlias = Process | ThreadRunner | Shared
"""What runs a model: a process, or something that looks like one."""


class Instance:
    """Keeps one model process."""

    def __init__(
        self, begin: Callable[[str], Running], title: str, load: Mapping[str, Any], *, load_timeout_s: float
    ) -> None:
        """`begin` starts a process, given the model's name for the log, `title`; `load` is what it is to load."""
        self._begin, self._title = begin, title
        self._load, self._load_timeout_s = load, load_timeout_s
        self._changed = threading.Condition()
        self._process: Running | None = None
        self._why = ""
        self._next_start = 0.0
        self._is_failed = self._is_closed = False
        self._must_close = threading.Event()
        self._starting: Running | None = None
        self._was_running = False
        self.restarts = 0
        self.on_running: Callable[[Running], None] | None = None
        """Called by the keeper with each process that runs, before anybody else gets it."""
        self._keeper = threading.Thread(target=self._keep, name=f"keeper of {title}", daemon=True)

    def start(self) -> None:
        """Begins to load it."""
        self._keeper.start()

    def wait_loaded(self, is_given_up: Callable[[], bool] = bool) -> Mapping[str, Any]:
        """Waits until it runs; the facts that the model told. Raises FailedPrecondition when it cannot be loaded."""
        with self._changed:
            while not (self._process is not None or self._is_failed or self._is_closed or is_given_up()):
                self._changed.wait(_LOOK_S)
            if self._process is None:
                raise FailedPrecondition(self._why or "it was unloaded while it was loading")
            return self._process.facts

    def is_running(self) -> bool:
        return self._alive() is not None

    def _alive(self) -> Running | None:
        process = self._process
        return process if process is not None and not process.died.is_set() else None

    def running(self, patience_s: float = 0.0) -> Running:
        """Its process. Waits for one that is being started again, for `patience_s` at most.

        Raises:
            Unavailable: there is none; it says when to come back.
        """
        process = self._alive()
        if process is not None:
            return process
        with self._changed:
            self._changed.wait_for(lambda: self.is_running() or self._is_closed, patience_s)
            process = self._alive()
            if process is not None:
                return process
            why = self._process.end if self._process is not None else self._why
            wait_ms = int((self._next_start - time.monotonic()) * 1000)
            retry_ms = min(max(wait_ms, _MIN_RETRY_MS), _MAX_RETRY_MS)
            raise Unavailable(
                f"the process of model {self._title} is being started again ({why}); retry after {retry_ms} ms",
                retry_after_ms=retry_ms,
            )

    def close(self) -> None:
        """Ends it: with its own good-bye, if that does not take long."""
        self._must_close.set()
        with self._changed:
            process = self._process
        if process is not None:
            try:
                process.say_goodbye()
            except (ChannelClosed, OSError):
                pass
            if not process.died.wait(_GRACE_S):
                log.warning("model %s: its process did not end within %.0f s, and is killed", self._title, _GRACE_S)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._keeper.ident is not None:
            self._end_keeper()

    def _end_keeper(self) -> None:
        while self._keeper.is_alive():
            starting = self._starting
            if starting is not None:
                starting.leave("the model is unloaded")
            self._keeper.join(0.05)

    def _keep(self) -> None:
        backoff = Backoff(_RESTART_FIRST_S, _RESTART_MAX_S)
        while not self._must_close.is_set():
            started = time.monotonic()
            try:
                why = self._run_once()
            except Exception:  # A fault of ours: whoever waits must hear, and the next try may work.
                log.exception("model %s: its process could not be kept", self._title)
                why = "internal error: the log of the service has the cause"
            if self._must_close.is_set():
                break
            if time.monotonic() - started > _STEADY_S:
                backoff.reset()
            wait_s = backoff.next_s()
            log.warning("model %s: its process ended (%s); the next one in %.2f s", self._title, why, wait_s)
            with self._changed:
                self._why, self._next_start = why, time.monotonic() + wait_s
                if not self.restarts and not self._was_running:
                    self._is_failed = True
                self._changed.notify_all()
                if self._is_failed:
                    return
            self.restarts += 1
            self._must_close.wait(wait_s)

    def _run_once(self) -> str:
        """Runs a process to its end; says how it ended."""
        try:
            process = self._begin(self._title)
        except OSError as err:
            return f"cannot start a process: {err.strerror}: {err.filename}"
        self._starting = process
        try:
            process.load({"op": "load", "load": dict(self._load)}, self._load_timeout_s)
        except NotLoaded as err:
            process.kill(str(err))
            process.reap()
            process.channel.close()
            return process.end
        if not process.facts:
            process.reap()
            process.channel.close()
            return f"the model process ended while it loaded the model ({process.end})"
        if self.on_running is not None:
            self.on_running(process)
        with self._changed:
            self._process, self._was_running = process, True
            self._changed.notify_all()
        process.attend()
        with self._changed:
            self._process, self._why, self._next_start = None, process.end, time.monotonic()
        with process.using:  # Whoever is in a call of its channel hears of the end, and lets go.
            process.channel.close()
        return process.end
