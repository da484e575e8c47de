"""One instance of a model: a model process that is restarted whenever it ends.

    STARTING ──loaded──> RUNNING ──ends──> WAITING (backoff) ──> STARTING ...      close() ──> CLOSED
        └── not loaded, the first time: FAILED

One supervisor thread makes all these transitions. Other threads wait for a running process, use it, and may kill it.
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
from services.infer.model_process.shared.shared_process import SharedProcess
from services.infer.model_process.thread_runner import ThreadRunner
from shoal.errors import FailedPrecondition, Unavailable

log = logging.getLogger(__name__)

_RESTART_FIRST_S, _RESTART_MAX_S = 0.05, 30.0
# A process that has run for so long did not fail at its start: the backoff begins again.
_STEADY_S = 10.0
# Time for a model's clean-up code before the process is killed.
_GRACE_S = 5.0
# Interval at which a waiter for the load checks whether loading was given up.
_POLL_S = 0.1
_MIN_RETRY_MS, _MAX_RETRY_MS = 50, 10_000


Runner: TypeAlias = Process | ThreadRunner | SharedProcess
"""Any model runner: a process of its own, a thread, or a shared process."""


class Instance:
    """Supervisor of one model process."""

    def __init__(
        self, start_runner: Callable[[str], Runner], title: str, load: Mapping[str, Any], *, load_timeout_s: float
    ) -> None:
        """Store the arguments; `start` starts the thread.

        Args:
            start_runner: starts a runner; its argument is `title`.
            title: the model's name in the log.
            load: the fields of `hosted.Load`.
        """
        self._start_runner, self._title = start_runner, title
        self._load, self._load_timeout_s = load, load_timeout_s
        self._changed = threading.Condition()
        self._process: Runner | None = None
        self._why = ""
        self._next_start = 0.0
        self._is_failed = self._is_closed = False
        self._must_close = threading.Event()
        self._starting: Runner | None = None
        self._was_running = False
        self.restarts = 0
        self.on_running: Callable[[Runner], None] | None = None
        """Called on the supervisor thread with each loaded process, before `running` returns that process."""
        self._supervisor = threading.Thread(target=self._supervise, name=f"supervisor of {title}", daemon=True)

    def start(self) -> None:
        """Start the supervisor thread, which loads the model."""
        self._supervisor.start()

    def wait_loaded(self, is_given_up: Callable[[], bool] = bool) -> Mapping[str, Any]:
        """Wait until the model is loaded and return its `model_info`. Raises FailedPrecondition when loading fails."""
        with self._changed:
            while not (self._process is not None or self._is_failed or self._is_closed or is_given_up()):
                self._changed.wait(_POLL_S)
            if self._process is None:
                raise FailedPrecondition(self._why or "the model was unloaded while it was loading")
            return self._process.model_info

    def is_running(self) -> bool:
        return self._alive() is not None

    def _alive(self) -> Runner | None:
        process = self._process
        return process if process is not None and not process.died.is_set() else None

    def running(self, patience_s: float = 0.0) -> Runner:
        """Return the running process. Waits `patience_s` at most for a process that is restarting.

        Raises:
            Unavailable: no process is running; `retry_after_ms` is set.
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
                f"the process of model {self._title} is restarting ({why}); retry after {retry_ms} ms",
                retry_after_ms=retry_ms,
            )

    def close(self) -> None:
        """End the process and the supervisor thread. The model's clean-up code has a few seconds to run."""
        self._must_close.set()
        with self._changed:
            process = self._process
        if process is not None:
            try:
                process.request_close()
            except (ChannelClosed, OSError):
                pass
            if not process.died.wait(_GRACE_S):
                log.warning(
                    "model %(model_process)s: its process did not end within %(grace_s).0f s: it is killed",
                    {"event": "model.process_killed", "model_process": self._title, "grace_s": _GRACE_S},
                )
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._supervisor.ident is not None:
            self._end_supervisor()

    def _end_supervisor(self) -> None:
        while self._supervisor.is_alive():
            starting = self._starting
            if starting is not None:
                starting.release("the model is unloaded")
            self._supervisor.join(0.05)

    def _supervise(self) -> None:
        backoff = Backoff(_RESTART_FIRST_S, _RESTART_MAX_S)
        while not self._must_close.is_set():
            started = time.monotonic()
            try:
                why = self._run_once()
            # An internal error: waiters must learn of it, and the next attempt may succeed.
            except Exception:
                log.exception(
                    "model %(model_process)s: internal error while its process was supervised",
                    {"event": "model.supervision_failed", "model_process": self._title},
                )
                why = "internal error: the log of the service has the cause"
            if self._must_close.is_set():
                break
            if time.monotonic() - started > _STEADY_S:
                backoff.reset()
            wait_s = backoff.next_s()
            log.warning(
                "model %(model_process)s: its process ended (%(reason)s); restart in %(wait_s).2f s",
                {"event": "model.process_ended", "model_process": self._title, "reason": why, "wait_s": wait_s},
            )
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
        """Run one process to its end and return the reason of the end."""
        try:
            process = self._start_runner(self._title)
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
        if not process.model_info:
            process.reap()
            process.channel.close()
            return f"the model process ended while it loaded the model ({process.end})"
        if self.on_running is not None:
            self.on_running(process)
        with self._changed:
            self._process, self._was_running = process, True
            self._changed.notify_all()
        process.watch()
        with self._changed:
            self._process, self._why, self._next_start = None, process.end, time.monotonic()
        # `reap` has shut the channel: a thread that holds `using` wakes up and releases the lock.
        with process.using:
            process.channel.close()
        return process.end
