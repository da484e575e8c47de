"""Worker processes of `shoal serve`, which share one address; a process that ends is restarted."""

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
    """Keeps a process of each spec running until `stop`, or until one ends with a final status.

    Args:
        report: called before each restart, with the name, the exit status and the seconds until the restart.
        is_final: returns True for an exit status after which a process is not restarted.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        report: Callable[[str, int, float], None],
        *,
        is_final: Callable[[int], bool],
    ) -> None:
        self._specs = tuple(specs)
        self._report = report
        self._is_final = is_final
        self._running: dict[str, Process] = {}
        self._stopping = asyncio.Event()

    @property
    def pids(self) -> list[int]:
        """Pids of the processes that run now."""
        return [process.pid for process in self._running.values()]

    def stop(self) -> None:
        """Send SIGTERM to every process. A second call makes them stop immediately."""
        self._stopping.set()
        for process in self._running.values():
            process.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill every process now, without restarts."""
        self._stopping.set()
        for process in self._running.values():
            process.kill()

    async def run(self) -> int:
        """Return when all processes have ended: the exit status of the first failure, 128 + N for signal N, else 0.

        Raises:
            OSError: no process can be created.
        """
        keeping = [asyncio.create_task(self._keep(spec), name=f"keep {spec.name}") for spec in self._specs]
        try:
            first, _ = await asyncio.wait(keeping, return_when=asyncio.FIRST_COMPLETED)
            # One ended with a final status: the others would end for the same reason.
            if not self._stopping.is_set():
                self.stop()
            # The first status is the cause of the others.
            statuses = [*(task.result() for task in first), *await asyncio.gather(*keeping)]
        finally:
            await end(*keeping)
        failed = next((status for status in statuses if status), 0)
        return failed if failed >= 0 else 128 - failed

    async def _keep(self, spec: ProcessSpec) -> int:
        restarts = Restarts()
        while True:
            self._running[spec.name] = process = await spawn(spec, None)
            # A stop that arrived during `spawn` has missed the new process.
            if self._stopping.is_set():
                process.signal(signal.SIGTERM)
            status = await process.wait()
            del self._running[spec.name]
            if self._stopping.is_set() or self._is_final(status):
                return status
            restarts = restarts.after(process.lived_s)
            self._report(spec.name, status, restarts.delay_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), restarts.delay_s)
                return 0
