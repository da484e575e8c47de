"""`client.instances`: take an instance out of traffic, and put it back."""

from __future__ import annotations

from shoal.client.status import Instance, of_instance
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.coord.v1 import coord_pb2 as coord

TIMEOUT_S = 10.0


class AsyncInstances:
    """Client of the drain marks. `client.status()` lists the instances."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def drain(self, name: str, *, timeout: float | None = TIMEOUT_S) -> Instance:
        """Take an instance out of traffic until it is undrained or replaced; its open calls finish.

        Args:
            name: `<node>/<service>-<n>`; `<service>-<n>` is enough where it is unambiguous.

        Raises:
            NotFound: no such instance. Unavailable: etcd cannot be reached.
        """
        request = coord.DrainInstanceRequest(name=name)
        return of_instance((await self._caller.call(methods.DRAIN_INSTANCE, request, timeout_s=timeout)).instance)

    async def undrain(self, name: str, *, timeout: float | None = TIMEOUT_S) -> Instance:
        """Put a drained instance back into traffic. Raises as `drain` does."""
        request = coord.UndrainInstanceRequest(name=name)
        return of_instance((await self._caller.call(methods.UNDRAIN_INSTANCE, request, timeout_s=timeout)).instance)
