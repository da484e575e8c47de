"""Processes that serve one address together; one that ends is started again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Sequence

from mesh.process.tasks import end
from shoal.node.process import Process, spawn
from shoal.node.processes import ProcessSpec
from shoal.node.restarts import Restarts


class Workers:
    """Runs `parts` until `stop`, or until one ends for good.

    Args:
        tell: is called with the name, the status and the pause before each restart.
        is_final: returns whether a process that ended with this status is not started again.
    """

    def __init__(
        self, parts: Sequence[ProcessSpec], tell: Callable[[str, int, float], None], *, is_final: Callable[[int], bool]
    ) -> None:
        self._parts = tuple(parts)
        self._tell = tell
        self._is_final = is_final
        self._running: dict[str, Process] = {}
        self._stopping = asyncio.Event()

    @property
    def pids(self) -> list[int]:
        """The pids of the processes that run now."""
        return [process.pid for process in self._running.values()]

    def stop(self) -> None:
        """Ask every process to stop; once more, to stop at once."""
        self._stopping.set()
        for process in self._running.values():
            process.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill every process now, for good."""
        self._stopping.set()
        for process in self._running.values():
            process.kill()

    async def run(self) -> int:
        """Return once all have ended: the exit status of the first that failed, 128 + N for signal N, else 0.

        Raises:
            OSError: no process can be made.
        """
        keeping = [asyncio.create_task(self._keep(part), name=f"keep {part.name}") for part in self._parts]
        try:
            first, _ = await asyncio.wait(keeping, return_when=asyncio.FIRST_COMPLETED)
            # One has ended for good: the others would end for the same reason.
            if not self._stopping.is_set():
                self.stop()
            # The first status is the cause of the others.
            statuses = [*(task.result() for task in first), *await asyncio.gather(*keeping)]
        finally:
            await end(*keeping)
        failed = next((status for status in statuses if status), 0)
        return failed if failed >= 0 else 128 - failed

    async def _keep(self, part: ProcessSpec) -> int:
        restarts = Restarts()
        while True:
            self._running[part.name] = process = await spawn(part, None)
            # A stop that came while the process was made has missed it.
            if self._stopping.is_set():
                process.signal(signal.SIGTERM)
            status = await process.wait()
            del self._running[part.name]
            if self._stopping.is_set() or self._is_final(status):
                return status
            restarts = restarts.after(process.lived_s)
            self._tell(part.name, status, restarts.delay_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), restarts.delay_s)
                return 0
