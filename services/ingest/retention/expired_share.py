"""Share of the ended jobs that the rules would remove at a given time, estimated from a sample."""

from __future__ import annotations

from datetime import datetime

from pymongo.asynchronous.collection import AsyncCollection

from mesh.mongo import Document, translated
from mesh.removal_guard import SAMPLE
from services.ingest.job import FINAL, State
from services.ingest.retention.retention_repository import RetentionRepository


class ExpiredShare:
    """Ended jobs: the `Removal` that ingest's removal guard watches."""

    def __init__(self, jobs: AsyncCollection[Document], repository: RetentionRepository) -> None:
        self._jobs = jobs
        self._repository = repository

    async def newest(self) -> datetime | None:
        """Return the time of the last change of the job that was submitted last."""
        with translated("looking for the newest job"):
            document = await self._jobs.find_one({}, {"updated_at": 1}, sort=[("_id", -1)])
        return None if document is None else document["updated_at"]

    async def share(self, now: datetime) -> float:
        rules = await self._repository.read()
        stages = [{"$sample": {"size": SAMPLE}}, {"$project": {"tenant": 1, "state": 1, "updated_at": 1}}]
        with translated("estimating the share of expired jobs"):
            found = await (await self._jobs.aggregate(stages)).to_list()
        ended = [one for one in found if State(one["state"]) in FINAL]
        expired = sum(
            rules.is_past_retention(one["tenant"], State(one["state"]), one["updated_at"], now) for one in ended
        )
        return expired / len(ended) if ended else 0.0

    async def rules_version(self) -> str:
        return await self._repository.version()
