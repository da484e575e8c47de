"""Polling of a repository: a change is served once two scans in a row find it alike.

Files are copied piece by piece. A model that differs at each scan is still being written, and keeps its old form.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from mesh.process.tasks import Background
from services.infer.model_files.wanted_models import WantedModel
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

Found = Mapping[str, WantedModel]


def stood_still(offered: Found, before: Found, now: Found) -> dict[str, WantedModel]:
    """Return the models to offer after two scans: where the scans agree, the newer one; otherwise as `offered`."""
    models = {}
    for name in offered.keys() | now.keys():
        model = now.get(name) if before.get(name) == now.get(name) else offered.get(name)
        if model is not None:
            models[name] = model
    return models


class Poll(Background):
    """Polls a repository. Use as `async with`.

    Args:
        scan: reads the repository. Blocking. A scan that raises ShoalError changes nothing.
        offer: called with all models after each change.
        offered: models that were offered already.
        pause: waits until the next scan is due.
    """

    def __init__(
        self,
        scan: Callable[[], Sequence[WantedModel]],
        offer: Callable[[Sequence[WantedModel]], None],
        offered: Sequence[WantedModel],
        pause: Callable[[], Awaitable[None]],
    ) -> None:
        self._scan = scan
        self._offer = offer
        self._offered: Found = _by_name(offered)
        self._pause = pause

    async def _run(self) -> None:
        before = self._offered
        while True:
            await self._pause()
            try:
                now = _by_name(await asyncio.to_thread(self._scan))
            except ShoalError as err:
                log.warning(
                    "%(error)s: the served models stay as they are",
                    {"event": "repository.unreadable", "error": err.message},
                )
                continue
            models = stood_still(self._offered, before, now)
            before = now
            if models != self._offered:
                self._offered = models
                self._offer([models[name] for name in sorted(models)])


def _by_name(models: Sequence[WantedModel]) -> Found:
    return {model.name: model for model in models}
