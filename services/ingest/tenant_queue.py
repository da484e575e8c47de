"""Lanes: the queue is a bundle of them, one for each tenant, model and priority, and each is in order of its due times.

    lane ["acme","digits",0]    due 12:00:01  12:00:01  12:00:02 ...   a million
    lane ["zeta","digits",0]    due 12:03:07                           one

A job carries its lane as one text, because MongoDB skips from one value of a *single* field to the next
(DISTINCT_SCAN): finding which lanes have jobs costs one step a lane, however many jobs wait in each.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

LEAST_PRIORITY = -9
MOST_PRIORITY = 9


class TenantQueueKey(NamedTuple):
    """Whose jobs, for which model, how urgent."""

    tenant: str
    model: str
    priority: int

    @property
    def text(self) -> str:
        """As a job carries it. JSON, so that no name can pass for two."""
        return _text(self)

    def age(self, due_at: datetime, ageing: timedelta) -> datetime:
        """Since when a job of this lane counts as waiting: each level of priority is worth `ageing` of waiting.

        So urgent jobs go first, and still no job waits for ever: whatever is `ageing` older goes before the next level.
        """
        return due_at - self.priority * ageing


@lru_cache(4_096)
def _text(lane: TenantQueueKey) -> str:
    return json.dumps(lane, separators=(",", ":"))


def lane_of(text: str) -> TenantQueueKey:
    """The lane of a text that `TenantQueueKey.text` made."""
    return TenantQueueKey(*json.loads(text))


def range_of(tenant: str) -> dict[str, str]:
    """What the texts of a tenant's lanes are compared with to be found by an index."""
    name = json.dumps([tenant])[:-1]
    return {"$gte": f"{name},", "$lt": f"{name}-"}  # "-" comes after ",", and a quote within a name is escaped.
