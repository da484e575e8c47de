"""Signal that ends a load or a run: nobody wants the model or the results any more, or it takes too long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class GivenUp:
    """Signal to the thread of one load or run. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self.reason = ""
        """Reason of the end; empty until then."""

    def __call__(self) -> bool:
        """Return True once it is given up."""
        return bool(self.reason)

    def set(self, reason: str = "the model was unloaded while it was loading") -> None:
        """Give up, for the first reason."""
        with self._lock:
            self.reason = self.reason or reason
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call `callback` when the block is given up, or was before it, on the thread that gives it up."""
        with self._lock:
            self._callbacks.append(callback)
            is_late = bool(self.reason)
        if is_late:
            callback()
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)

    @contextmanager
    def after(self, seconds: float) -> Iterator[None]:
        """Give up when the block takes longer."""
        timer = threading.Timer(seconds, self.set, (f"loading took more than {seconds:g} s",))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
