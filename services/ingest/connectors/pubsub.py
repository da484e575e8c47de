"""Google Cloud Pub/Sub: a subscription as a source, a topic as a sink.

    receive ──Pull(limit)──> messages, each leased by the server ──settle──> acknowledged, in groups
                               └── leases are extended until their jobs end

Messages are pulled only when there is capacity for them, so no leased message waits. Order is not kept: Pub/Sub
acknowledges each message by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc

from mesh.process.tasks import end
from mesh.rpc.interceptors import translate
from mesh.rpc.limits import MESSAGE_BYTES
from services.ingest.connectors.google_tokens import Tokens
from services.ingest.connectors.message import Message, Outgoing, Partition
from services.ingest.connectors.progress import PartitionProgress, SourceStatus
from services.ingest.group_commit import Group
from shoal.errors import Code, Internal, InvalidArgument, NotFound, ShoalError, Unavailable
from shoal.remote.v1 import pubsub_pb2 as pb

log = logging.getLogger(__name__)

# The server responds to a pull when there are messages, or after a while without.
_PULL_S = 60.0
_CALL_S = 15.0
_ACK_S = 0.05
# A newly pulled message has its subscription's deadline, at least 10 s, until its lease is extended.
_EXTEND_S = 3.0
_BACKOFF_S = 1.0
_IDS_AT_ONCE = 1_000
_PULLED_AT_ONCE = 1_000
_PUBLISHED_AT_ONCE = 500
_PUBLISHED_BYTES = 8 << 20
_MESSAGE_BYTES = 10_000_000
_ATTRIBUTES, _NAME_BYTES, _VALUE_BYTES = 100, 256, 1_024
KEY = "shoal-key"


@dataclass(frozen=True, slots=True)
class Access:
    """Endpoint and credentials of Pub/Sub."""

    project: str
    endpoint: str
    tokens: Tokens | None = None
    """None: calls are not authenticated, as with an emulator."""
    plaintext: bool = False


class Calls:
    """Client of google.pubsub.v1."""

    def __init__(self, access: Access) -> None:
        self._tokens = access.tokens
        options = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.keepalive_time_ms", 60_000)]
        self._channel = (
            grpc.aio.insecure_channel(access.endpoint, options)
            if access.plaintext
            else grpc.aio.secure_channel(access.endpoint, grpc.ssl_channel_credentials(), options)
        )

    async def close(self) -> None:
        await self._channel.close()

    async def call(self, method: str, request: Any, response: type[Any], timeout_s: float, doing: str) -> Any:
        """Call a method and return its response. Raises ShoalError."""
        stub: Any = self._channel.unary_unary(
            f"/google.pubsub.v1.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        metadata = () if self._tokens is None else await self._tokens.metadata()
        try:
            return await stub(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as err:
            known = translate(err, doing)
            if isinstance(known, NotFound):
                raise Unavailable(f"{known.message}: create it") from err
            raise known from err


class PubSubSource:
    """Source that pulls a subscription; other instances may pull it too."""

    def __init__(self, access: Access, subscription: str, *, lease_s: int) -> None:
        self._access = access
        self._name = f"projects/{access.project}/subscriptions/{subscription}"
        self._subscription = subscription
        self._lease_s = lease_s
        self._partition = Partition(subscription)
        self._leased: dict[str, None] = {}
        self._settled: list[str] = []
        self._count = 0
        self._problems: dict[str, str] = {}
        """Last error of each background task, until the task succeeds."""

    async def __aenter__(self) -> PubSubSource:
        self._calls = Calls(self._access)
        self._tasks = [
            asyncio.create_task(self._extend_leases(), name=f"leases of {self._subscription}"),
            asyncio.create_task(self._acknowledge(), name=f"acknowledgements of {self._subscription}"),
        ]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await end(*self._tasks)
        # A message that is not acknowledged in time is delivered again.
        with contextlib.suppress(ShoalError):
            await self._acknowledge_settled()
            await self._set_deadlines(list(self._leased), 0, "releasing")
        self._partition.mark_revoked()
        await self._calls.close()

    async def receive(self, limit: int) -> Sequence[Message]:
        request = pb.PubSubPullRequest(subscription=self._name, max_messages=min(limit, _PULLED_AT_ONCE))
        while True:
            try:
                response = await self._calls.call(
                    "Subscriber/Pull", request, pb.PubSubPullResponse, _PULL_S, f"pulling {self._name}"
                )
            except ShoalError as err:
                if err.code is not Code.DEADLINE_EXCEEDED:
                    raise
                continue
            if response.received_messages:
                return [self._message(each) for each in response.received_messages]

    def settle(self, message: Message) -> None:
        self._settled.append(message.handle)

    def status(self) -> SourceStatus:
        return SourceStatus((PartitionProgress(self._subscription),), next(iter(self._problems.values()), ""))

    def _message(self, received: Any) -> Message:
        self._count += 1
        self._leased[received.ack_id] = None
        message = received.message
        return Message(
            partition=self._partition,
            position=self._count,
            location=f"{self._subscription}/{message.message_id}",
            value=message.data,
            key=message.ordering_key.encode() or None,
            headers=tuple((name, value.encode()) for name, value in sorted(message.attributes.items())),
            received_ms=message.publish_time.ToMilliseconds(),
            handle=received.ack_id,
        )

    async def _extend_leases(self) -> None:
        while True:
            extension = self._set_deadlines(list(self._leased), self._lease_s, "extending")
            await self._guarded("extend", extension)
            await asyncio.sleep(min(self._lease_s / 3, _EXTEND_S))

    async def _acknowledge(self) -> None:
        while True:
            await asyncio.sleep(_ACK_S)
            if self._settled and not await self._guarded("acknowledge", self._acknowledge_settled()):
                await asyncio.sleep(_BACKOFF_S)

    async def _guarded(self, what: str, act: Any) -> bool:
        try:
            await act
        except ShoalError as err:
            self._problems[what] = err.message
            return False
        self._problems.pop(what, None)
        return True

    async def _acknowledge_settled(self) -> None:
        while ack_ids := self._settled[:_IDS_AT_ONCE]:
            request = pb.PubSubAcknowledgeRequest(subscription=self._name, ack_ids=ack_ids)
            doing = f"acknowledging to {self._name}"
            await self._calls.call("Subscriber/Acknowledge", request, pb.PubSubEmpty, _CALL_S, doing)
            del self._settled[: len(ack_ids)]
            for ack_id in ack_ids:
                self._leased.pop(ack_id, None)

    async def _set_deadlines(self, ack_ids: list[str], seconds: int, action: str) -> None:
        for first in range(0, len(ack_ids), _IDS_AT_ONCE):
            group = ack_ids[first : first + _IDS_AT_ONCE]
            request = pb.PubSubModifyAckDeadlineRequest(
                subscription=self._name, ack_deadline_seconds=seconds, ack_ids=group
            )
            doing = f"{action} leases of {self._name}"
            await self._calls.call("Subscriber/ModifyAckDeadline", request, pb.PubSubEmpty, _CALL_S, doing)


class PubSubSink:
    """Sink that publishes to a topic. The headers of a message become its attributes."""

    def __init__(self, access: Access, topic: str) -> None:
        self._access = access
        self._topic = f"projects/{access.project}/topics/{topic}"
        self._stack = AsyncExitStack()
        self._group: Group[pb.PubSubMessage, None] = Group(
            f"messages for {topic}",
            self._publish,
            max_items=_PUBLISHED_AT_ONCE,
            max_bytes=_PUBLISHED_BYTES,
            size=lambda message: message.ByteSize(),
        )

    async def __aenter__(self) -> PubSubSink:
        self._calls = Calls(self._access)
        self._stack.push_async_callback(self._calls.close)
        await self._stack.enter_async_context(self._group)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def send(self, message: Outgoing) -> None:
        made = pb.PubSubMessage(data=message.value, attributes=_attributes(message))
        if made.ByteSize() > _MESSAGE_BYTES:
            raise InvalidArgument(f"Pub/Sub takes at most {_MESSAGE_BYTES} bytes, and this is {made.ByteSize()}")
        await self._group.put(made)

    async def _publish(self, messages: list[pb.PubSubMessage]) -> Sequence[None]:
        request = pb.PubSubPublishRequest(topic=self._topic, messages=messages)
        doing = f"publishing to {self._topic}"
        response = await self._calls.call("Publisher/Publish", request, pb.PubSubPublishResponse, _CALL_S, doing)
        if len(response.message_ids) != len(messages):
            raise Internal(f"{doing}: {len(messages)} messages were sent, and {len(response.message_ids)} have an id")
        return [None] * len(messages)


def _attributes(message: Outgoing) -> dict[str, str]:
    """Return the headers within Pub/Sub's limits: long values are cut, surplus headers dropped.

    Shoal's own headers are kept first.
    """
    headers = [*message.headers] if message.key is None else [*message.headers, (KEY, message.key)]
    ours_first = sorted(headers, key=lambda header: not header[0].startswith("shoal-"))
    cut = [(name, value[:_VALUE_BYTES].decode(errors="ignore")) for name, value in ours_first]
    return dict([(name, value) for name, value in cut if value and 0 < len(name.encode()) <= _NAME_BYTES][:_ATTRIBUTES])
