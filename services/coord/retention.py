"""A duty of the leader: it has the store remove what is no longer kept.

The store decides what that is and removes it in small transactions; the leader says when, and lends its fencing token,
so that one that was succeeded removes nothing any more.
"""

from __future__ import annotations

import asyncio
import logging

import grpc

from mesh.election import Election, Term
from mesh.interceptors import translate
from mesh.tasks import Background
from shoal.errors import ShoalError
from shoal.store.v1 import store_pb2, store_pb2_grpc

log = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
"""The store works for about two seconds, and may wait for its database for six, twice."""
_LOOK_S = 1.0
# Whether one still leads is asked so often while there is nothing to do.


class Retention(Background):
    """Asks the store behind `channel`, every `every_s` and while there is more, as long as `election` says to lead."""

    def __init__(self, election: Election, channel: grpc.aio.Channel, every_s: float) -> None:
        self._election = election
        self._store = store_pb2_grpc.StoreServiceStub(channel)
        self._every_s = every_s

    async def _run(self) -> None:
        async for term in self._election.terms():
            was_away = False
            while term.is_current():
                more = False
                try:
                    more = await self._apply(term)
                    was_away = False
                except ShoalError as err:
                    # Told once: a node without a store, or one that is away, goes on for long.
                    (log.debug if was_away else log.info)("retention waits: %s", err)
                    was_away = True
                except Exception:  # A fault of ours must not end the duty for ever.
                    log.exception("applying retention")
                if not more:
                    await self._pause(term)

    async def _apply(self, term: Term) -> bool:
        request = store_pb2.ApplyRetentionRequest(token=term.token)
        try:
            answer = await self._store.ApplyRetention(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as err:
            raise translate(err, "applying retention") from err
        if answer.results or answer.answers or answer.tombstones:
            log.info(
                "retention removed %d results, %d answers, %d tombstones",
                answer.results,
                answer.answers,
                answer.tombstones,
            )
        return bool(answer.more)

    async def _pause(self, term: Term) -> None:
        waited = 0.0
        while waited < self._every_s and term.is_current():
            await asyncio.sleep(min(_LOOK_S, self._every_s - waited))
            waited += _LOOK_S
