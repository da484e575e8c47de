"""The processes that serve one address together. One alone may end; of several, each is kept running."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Sequence

from mesh.exits import WRONG_SETTINGS
from mesh.node.parts import Part
from mesh.node.process import Process, spawn
from mesh.node.restarts import Restarts
from mesh.tasks import end


class Workers:
    """Runs `parts` until `stop`, or until they cannot run. `tell(name, status, again_in_s)` hears of restarts."""

    def __init__(self, parts: Sequence[Part], tell: Callable[[str, int, float], None]) -> None:
        self._parts = tuple(parts)
        self._tell = tell
        self._running: dict[str, Process] = {}
        self._stopping = asyncio.Event()

    @property
    def pids(self) -> list[int]:
        """Of the processes that run now."""
        return [process.pid for process in self._running.values()]

    def stop(self) -> None:
        """Asks every process to stop; once more, to stop at once."""
        self._stopping.set()
        for process in self._running.values():
            process.signal(signal.SIGTERM)

    async def run(self) -> int:
        """Returns once all have ended: the exit status of the first that failed, 128 + N for signal N, else 0.

        Raises:
            OSError: no process can be made.
        """
        keeping = [asyncio.create_task(self._keep(part), name=f"keep {part.name}") for part in self._parts]
        try:
            first, _ = await asyncio.wait(keeping, return_when=asyncio.FIRST_COMPLETED)
            if not self._stopping.is_set():  # One that cannot run: the others are told the same.
                self.stop()
            # What the others end with only follows from the first.
            statuses = [*(task.result() for task in first), *await asyncio.gather(*keeping)]
        finally:
            await end(*keeping)
        failed = next((status for status in statuses if status), 0)
        return failed if failed >= 0 else 128 - failed

    async def _keep(self, part: Part) -> int:
        restarts = Restarts()
        while True:
            self._running[part.name] = process = await spawn(part, None)
            if self._stopping.is_set():  # The stop came while the process was made, and missed it.
                process.signal(signal.SIGTERM)
            status = await process.wait()
            del self._running[part.name]
            if self._stopping.is_set() or len(self._parts) == 1 or status == WRONG_SETTINGS:
                return status
            restarts = restarts.after(process.lived_s)
            self._tell(part.name, status, restarts.delay_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), restarts.delay_s)
                return 0
