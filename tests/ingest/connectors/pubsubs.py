"""A server that speaks google.pubsub.v1 as its reference has it: leases that lapse, ack ids for each delivery."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from shoal.remote.v1 import pubsub_pb2 as pb
from tests.ingest.connectors.brokers import Received

PROJECT = "test"
_LONGEST_PULL_S = 2.0


@dataclass
class Kept:
    """A message of a subscription."""

    message: Any
    leased_until: float = 0.0
    ack_id: str = ""
    deliveries: int = 0


@dataclass
class Subscription:
    """Messages that are not acknowledged yet, by id."""

    lease_s: float
    kept: dict[str, Kept] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    most_leased: int = 0


class PubSubServer:
    """Topics and subscriptions, served at `address`."""

    def __init__(self) -> None:
        self.subscriptions: dict[str, Subscription] = {}
        self.topics: dict[str, list[str]] = {}
        self.published: dict[str, list[Any]] = {}
        self.authorizations: set[str] = set()
        self.refuse: grpc.StatusCode | None = None
        self._news = asyncio.Condition()

    async def __aenter__(self) -> PubSubServer:
        self._server = grpc.aio.server()
        methods = {
            "Subscriber": {
                "Pull": (self.pull, pb.PubSubPullRequest),
                "Acknowledge": (self.acknowledge, pb.PubSubAcknowledgeRequest),
                "ModifyAckDeadline": (self.modify, pb.PubSubModifyAckDeadlineRequest),
            },
            "Publisher": {"Publish": (self.publish, pb.PubSubPublishRequest)},
        }
        for service, named in methods.items():
            handlers = {
                name: grpc.unary_unary_rpc_method_handler(
                    self._checked(act), request.FromString, lambda answer: answer.SerializeToString()
                )
                for name, (act, request) in named.items()
            }
            generic = grpc.method_handlers_generic_handler(f"google.pubsub.v1.{service}", handlers)
            self._server.add_generic_rpc_handlers([generic])
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._server.stop(0)

    def make(self, topic: str, *subscriptions: str, lease_s: float = 10.0) -> None:
        names = [f"projects/{PROJECT}/subscriptions/{name}" for name in subscriptions]
        self.topics[f"projects/{PROJECT}/topics/{topic}"] = names
        self.published[f"projects/{PROJECT}/topics/{topic}"] = []
        self.subscriptions.update({name: Subscription(lease_s) for name in names})

    def _checked(self, act: Any) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            self.authorizations |= {value for key, value in context.invocation_metadata() if key == "authorization"}
            if self.refuse is not None:
                await context.abort(self.refuse, "as the test wants it")
            return await act(request, context)

        return answer

    async def publish(self, request: Any, context: Any) -> Any:
        if request.topic not in self.topics:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Resource not found (resource={request.topic}).")
        ids = []
        for message in request.messages:
            if not message.data and not message.attributes:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a message needs data or attributes")
            message.message_id = uuid.uuid4().hex
            message.publish_time.GetCurrentTime()
            ids.append(message.message_id)
            self.published[request.topic].append(message)
            for name in self.topics[request.topic]:
                self.subscriptions[name].kept[message.message_id] = Kept(message)
        async with self._news:
            self._news.notify_all()
        return pb.PubSubPublishResponse(message_ids=ids)

    async def pull(self, request: Any, context: Any) -> Any:
        subscription = self.subscriptions.get(request.subscription)
        if subscription is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Resource not found (resource={request.subscription}).")
        give_up_at = time.monotonic() + _LONGEST_PULL_S
        while not (free := self._free(subscription)) and time.monotonic() < give_up_at:
            async with self._news:
                try:
                    await asyncio.wait_for(self._news.wait(), 0.1)
                except TimeoutError:
                    pass
        delivered = []
        for kept in free[: request.max_messages]:
            kept.ack_id, kept.leased_until = uuid.uuid4().hex, time.monotonic() + subscription.lease_s
            kept.deliveries += 1
            delivered.append(pb.PubSubReceived(ack_id=kept.ack_id, message=kept.message))
        leased = sum(kept.leased_until > time.monotonic() for kept in subscription.kept.values())
        subscription.most_leased = max(subscription.most_leased, leased)
        return pb.PubSubPullResponse(received_messages=delivered)

    def _free(self, subscription: Subscription) -> list[Kept]:
        return [kept for kept in subscription.kept.values() if kept.leased_until <= time.monotonic()]

    async def acknowledge(self, request: Any, context: Any) -> Any:
        subscription, wanted = self.subscriptions[request.subscription], set(request.ack_ids)
        done = [name for name, kept in subscription.kept.items() if kept.ack_id in wanted]
        for name in done:
            del subscription.kept[name]
            subscription.acknowledged.add(name)
        return pb.PubSubEmpty()

    async def modify(self, request: Any, context: Any) -> Any:
        for kept in self.subscriptions[request.subscription].kept.values():
            if kept.ack_id in request.ack_ids:
                kept.leased_until = time.monotonic() + request.ack_deadline_seconds
        return pb.PubSubEmpty()


class PubSub:
    """Three topics, and a subscription of the first."""

    keeps_order = False

    def __init__(self, server: PubSubServer) -> None:
        mark = uuid.uuid4().hex[:12]
        self._server = server
        self._in, self._out, self._dead = (f"{name}-{mark}" for name in ("in", "out", "dead"))
        self.subscription = f"sub-{mark}"
        # A killed instance's messages are free after this.
        server.make(self._in, self.subscription, lease_s=3.0)
        server.make(self._out)
        server.make(self._dead)
        common = {"kind": "pubsub", "project": PROJECT, "endpoint": server.address, "plaintext": True}
        self.table: dict[str, dict[str, Any]] = {
            "source": {**common, "subscription": self.subscription, "lease_s": 3},
            "sink": {**common, "topic": self._out},
            "dead_letters": {**common, "topic": self._dead},
        }

    @property
    def kept(self) -> Subscription:
        return self._server.subscriptions[f"projects/{PROJECT}/subscriptions/{self.subscription}"]

    async def publish(self, values: Sequence[bytes]) -> None:
        messages = [pb.PubSubMessage(data=value) for value in values]
        topic = f"projects/{PROJECT}/topics/{self._in}"
        await self._server.publish(pb.PubSubPublishRequest(topic=topic, messages=messages), None)

    async def answers(self) -> list[Received]:
        return self._received(self._out)

    async def dead(self) -> list[Received]:
        return self._received(self._dead)

    async def settled(self) -> int:
        return len(self.kept.acknowledged)

    def _received(self, topic: str) -> list[Received]:
        published = self._server.published[f"projects/{PROJECT}/topics/{topic}"]
        return [Received(message.data, dict(message.attributes)) for message in published]
