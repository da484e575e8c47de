"""All connectors of an instance: made from the settings, started and stopped together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration
from pymongo.asynchronous.database import AsyncDatabase

from mesh.mongo import Document
from services.ingest.clock import Clock
from services.ingest.connectors import settings
from services.ingest.connectors.checkpoints import CHECKPOINTS
from services.ingest.connectors.connector import Connector, Ends, Submits
from services.ingest.connectors.connector_spec import ConnectorSpec, Endpoints, Sink, Source
from services.ingest.connectors.formats import Format
from services.ingest.connectors.progress import ConnectorProgress
from services.ingest.connectors.reports import ConnectorInfo
from shoal.ingest.v1 import ingest_pb2 as pb

if TYPE_CHECKING:
    from services.ingest.connectors import pubsub


@dataclass(frozen=True, slots=True)
class ConnectorContext:
    """Where connectors run."""

    instance: str
    clock: Clock
    database: AsyncDatabase[Document]


class Connectors:
    """Runs each connector of `configured` for as long as the block lasts."""

    def __init__(
        self,
        configured: Mapping[str, settings.ConnectorSettings],
        intake: Submits,
        endings: Ends,
        place: ConnectorContext,
        *,
        ready: asyncio.Event,
    ) -> None:
        self._connectors = {
            name: Connector(
                spec_of(name, each, place), intake, endings, ready=ready, progress=ConnectorProgress(place.clock)
            )
            for name, each in configured.items()
        }
        self._about = {name: _about(name, each) for name, each in configured.items()}
        self._stack = AsyncExitStack()

    def own(self) -> dict[str, tuple[ConnectorInfo, ConnectorProgress]]:
        """What they are and how they get on, by name."""
        return {name: (self._about[name], connector.progress) for name, connector in self._connectors.items()}

    async def __aenter__(self) -> Connectors:
        for connector in self._connectors.values():
            await self._stack.enter_async_context(connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, err, tb)


def _about(name: str, configured: settings.ConnectorSettings) -> ConnectorInfo:
    return ConnectorInfo(
        name=name,
        source=configured.source.label,
        sink="" if configured.sink is None else configured.sink.label,
        dead_letters=configured.dead_letters.label,
        model_name=configured.model,
        model_version=configured.version,
        tenant=configured.tenant,
    )


def spec_of(name: str, configured: settings.ConnectorSettings, place: ConnectorContext) -> ConnectorSpec:
    """What a connector of these settings does."""
    inputs = dict(configured.inputs)
    form = Format(configured.format, configured.writes, configured.model, configured.version, inputs)
    return ConnectorSpec(
        name=name,
        format=form,
        open=lambda: _parts(name, configured, place),
        tenant=configured.tenant,
        retry=_retry(configured.retry),
        deadline_s=configured.deadline_s,
        labels=tuple(sorted(configured.labels.items())),
        max_in_flight=configured.max_in_flight,
        max_bytes=configured.max_bytes,
    )


def _parts(name: str, configured: settings.ConnectorSettings, place: ConnectorContext) -> Endpoints:
    return Endpoints(
        source=_source(name, configured.source, place),
        dead_letters=_sink(configured.dead_letters),
        sink=None if configured.sink is None else _sink(configured.sink),
    )


# A broker's library is imported only where it is used: each is an extra of its own.


def _source(name: str, given: settings.Source, place: ConnectorContext) -> Source:
    if isinstance(given, settings.KafkaSource):
        from services.ingest.connectors import kafka

        return kafka.KafkaSource(given.brokers, given.topic, given.group, start=given.start, options=given.options)
    if isinstance(given, settings.PubSubSource):
        from services.ingest.connectors import pubsub

        return pubsub.PubSubSource(_google(given), given.subscription, lease_s=given.lease_s)
    from services.ingest.connectors import kinesis

    return kinesis.KinesisSource(
        name,
        kinesis.Access(given.stream, given.region, given.endpoint),
        place.database[CHECKPOINTS],
        me=place.instance,
        clock=place.clock,
        start=given.start,
        lease_ms=given.lease_ms,
        poll_ms=given.poll_ms,
    )


def _sink(given: settings.Sink) -> Sink:
    if isinstance(given, settings.KafkaSink):
        from services.ingest.connectors import kafka

        return kafka.KafkaSink(given.brokers, given.topic, options=given.options)
    if isinstance(given, settings.PubSubSink):
        from services.ingest.connectors import pubsub

        return pubsub.PubSubSink(_google(given), given.topic)
    from services.ingest.connectors import kinesis

    return kinesis.KinesisSink(kinesis.Access(given.stream, given.region, given.endpoint))


def _google(given: settings.PubSubEnd) -> pubsub.Access:
    from services.ingest.connectors import google_tokens, pubsub

    tokens = None if given.plaintext else google_tokens.tokens()
    return pubsub.Access(given.project, given.endpoint, tokens, given.plaintext)


def _retry(given: settings.Retry) -> pb.RetryPolicy:
    return pb.RetryPolicy(
        max_attempts=given.attempts,
        initial_backoff=_duration(given.initial_backoff_ms),
        max_backoff=_duration(given.max_backoff_ms),
    )


def _duration(ms: int) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(milliseconds=ms))
    return duration
