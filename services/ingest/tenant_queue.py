"""Tenant queues: the job queue consists of one queue for each tenant, model and priority, each ordered by due time.

    ["acme","digits",0]    due 12:00:01  12:00:01  12:00:02 ...   a million jobs
    ["zeta","digits",0]    due 12:03:07                           one job

A job's document holds the key of its tenant queue as one string (field `lane`), because MongoDB skips from one value of
a *single* field to the next (DISTINCT_SCAN). Finding the queues that have jobs costs one step per queue, however many
jobs wait in each.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

LEAST_PRIORITY = -9
MOST_PRIORITY = 9


class TenantQueueKey(NamedTuple):
    """Key of a tenant queue."""

    tenant: str
    model: str
    priority: int

    @property
    def text(self) -> str:
        """The key as one string. JSON, so that different keys never have equal strings."""
        return _text(self)

    def age(self, due_at: datetime, ageing: timedelta) -> datetime:
        """Return the effective start of a job's wait: each priority level is worth `ageing` of waiting.

        So urgent jobs run first, yet no job starves: a job that is `ageing` older runs before the next level.
        """
        return due_at - self.priority * ageing


@lru_cache(4_096)
def _text(queue: TenantQueueKey) -> str:
    return json.dumps(queue, separators=(",", ":"))


def tenant_queue_of(text: str) -> TenantQueueKey:
    """Return the key whose `TenantQueueKey.text` is `text`."""
    return TenantQueueKey(*json.loads(text))


def range_of(tenant: str) -> dict[str, str]:
    """Return the range condition on the strings of a tenant's queues, which an index can serve."""
    name = json.dumps([tenant])[:-1]
    # "-" is the character after ",", and a quote within a name is escaped.
    return {"$gte": f"{name},", "$lt": f"{name}-"}
