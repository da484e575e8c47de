"""All connectors of an instance: built from the settings, started and stopped together."""

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
from mesh.mongo_clock import Clock
from services.ingest.connectors import settings
from services.ingest.connectors.checkpoints import CHECKPOINTS
from services.ingest.connectors.connector import Connector, JobCompletions, JobIntake
from services.ingest.connectors.connector_spec import ConnectorSpec, Endpoints, Sink, Source
from services.ingest.connectors.formats import Format
from services.ingest.connectors.progress import ConnectorProgress
from services.ingest.connectors.reports import ConnectorInfo
from shoal.ingest.v1 import ingest_pb2 as pb

if TYPE_CHECKING:
    from services.ingest.connectors import pubsub


@dataclass(frozen=True, slots=True)
class ConnectorContext:
    """Environment of the connectors: the instance, its clock and its database."""

    instance: str
    clock: Clock
    database: AsyncDatabase[Document]


class Connectors:
    """Runs each connector of `connectors` while the block lasts."""

    def __init__(
        self,
        connectors: Mapping[str, settings.ConnectorSettings],
        intake: JobIntake,
        endings: JobCompletions,
        context: ConnectorContext,
        *,
        ready: asyncio.Event,
    ) -> None:
        self._connectors = {
            name: Connector(
                spec_of(name, each, context), intake, endings, ready=ready, progress=ConnectorProgress(context.clock)
            )
            for name, each in connectors.items()
        }
        self._info = {name: _info(name, each) for name, each in connectors.items()}
        self._stack = AsyncExitStack()

    def own(self) -> dict[str, tuple[ConnectorInfo, ConnectorProgress]]:
        """Return the configuration and progress of this instance's connectors, by name."""
        return {name: (self._info[name], connector.progress) for name, connector in self._connectors.items()}

    async def __aenter__(self) -> Connectors:
        for connector in self._connectors.values():
            await self._stack.enter_async_context(connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, err, tb)


def _info(name: str, table: settings.ConnectorSettings) -> ConnectorInfo:
    return ConnectorInfo(
        name=name,
        source=table.source.label,
        sink="" if table.sink is None else table.sink.label,
        dead_letters=table.dead_letters.label,
        model_name=table.model,
        model_version=table.version,
        tenant=table.tenant,
    )


def spec_of(name: str, table: settings.ConnectorSettings, context: ConnectorContext) -> ConnectorSpec:
    """Return the specification of a connector from its table of the file."""
    inputs = dict(table.inputs)
    form = Format(table.format, table.writes, table.model, table.version, inputs)
    return ConnectorSpec(
        name=name,
        format=form,
        open=lambda: _endpoints(name, table, context),
        tenant=table.tenant,
        retry=_retry(table.retry),
        deadline_s=table.deadline_s,
        labels=tuple(sorted(table.labels.items())),
        max_in_flight=table.max_in_flight,
        max_bytes=table.max_bytes,
    )


def _endpoints(name: str, table: settings.ConnectorSettings, context: ConnectorContext) -> Endpoints:
    return Endpoints(
        source=_source(name, table.source, context),
        dead_letters=_sink(table.dead_letters),
        sink=None if table.sink is None else _sink(table.sink),
    )


# A broker's library is imported only where it is used, because each is an optional extra.


def _source(name: str, end: settings.Source, context: ConnectorContext) -> Source:
    if isinstance(end, settings.KafkaSourceSettings):
        from services.ingest.connectors import kafka

        return kafka.KafkaSource(end.brokers, end.topic, end.group, start=end.start, options=end.options)
    if isinstance(end, settings.PubSubSourceSettings):
        from services.ingest.connectors import pubsub

        return pubsub.PubSubSource(_google(end), end.subscription, lease_s=end.lease_s)
    from services.ingest.connectors import kinesis

    return kinesis.KinesisSource(
        name,
        kinesis.Access(end.stream, end.region, end.endpoint),
        context.database[CHECKPOINTS],
        me=context.instance,
        clock=context.clock,
        start=end.start,
        lease_ms=end.lease_ms,
        poll_ms=end.poll_ms,
    )


def _sink(end: settings.Sink) -> Sink:
    if isinstance(end, settings.KafkaSinkSettings):
        from services.ingest.connectors import kafka

        return kafka.KafkaSink(end.brokers, end.topic, options=end.options)
    if isinstance(end, settings.PubSubSinkSettings):
        from services.ingest.connectors import pubsub

        return pubsub.PubSubSink(_google(end), end.topic)
    from services.ingest.connectors import kinesis

    return kinesis.KinesisSink(kinesis.Access(end.stream, end.region, end.endpoint))


def _google(end: settings.PubSubEnd) -> pubsub.Access:
    from services.ingest.connectors import google_tokens, pubsub

    tokens = None if end.plaintext else google_tokens.tokens()
    return pubsub.Access(end.project, end.endpoint, tokens, end.plaintext)


def _retry(retry: settings.Retry) -> pb.RetryPolicy:
    return pb.RetryPolicy(
        max_attempts=retry.attempts,
        initial_backoff=_duration(retry.initial_backoff_ms),
        max_backoff=_duration(retry.max_backoff_ms),
    )


def _duration(ms: int) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(milliseconds=ms))
    return duration
