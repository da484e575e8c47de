"""Pub/Sub: leases that are extended and given back, tokens, and what does not fit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from services.ingest.connectors.google_tokens import Tokens
from services.ingest.connectors.message import Message, Outgoing
from services.ingest.connectors.pubsub import Access, PubSubSink, PubSubSource
from shoal.errors import FailedPrecondition, InvalidArgument, Unavailable
from tests.breakable import until
from tests.ingest.connectors.pubsubs import PROJECT, PubSub, PubSubServer


@pytest.fixture
async def server() -> AsyncIterator[PubSubServer]:
    async with PubSubServer() as served:
        yield served


def access(server: PubSubServer, tokens: Tokens | None = None) -> Access:
    return Access(PROJECT, server.address, tokens, plaintext=True)


async def test_a_lease_is_extended_as_long_as_a_job_takes(server: PubSubServer) -> None:
    pubsub = PubSub(server)
    await pubsub.publish([b"slow"])
    async with PubSubSource(access(server), pubsub.subscription, lease_s=3) as source:
        (message,) = await source.receive(10)
        (kept,) = pubsub.kept.kept.values()
        first = kept.leased_until
        await until(lambda: kept.leased_until > first + 3, "two extensions")
        assert kept.deliveries == 1
        source.settle(message)
        await until(lambda: not pubsub.kept.kept, "the acknowledgement")


async def test_what_is_not_settled_is_given_back_when_the_source_closes(server: PubSubServer) -> None:
    pubsub = PubSub(server)
    await pubsub.publish([b"a", b"b"])
    async with PubSubSource(access(server), pubsub.subscription, lease_s=600) as source:
        got = list(await source.receive(10))
        source.settle(next(each for each in got if each.value == b"a"))
    assert got[0].partition.is_revoked
    async with PubSubSource(access(server), pubsub.subscription, lease_s=600) as source:
        assert [each.value for each in await source.receive(10)] == [b"b"]


async def test_a_message_is_known_again_when_it_is_delivered_again(server: PubSubServer) -> None:
    pubsub = PubSub(server)
    await pubsub.publish([b"a"])

    async def once() -> Message:
        async with PubSubSource(access(server), pubsub.subscription, lease_s=10) as source:
            (message,) = await source.receive(1)
            return message

    first, second = await once(), await once()
    assert (first.location, first.received_ms) == (second.location, second.received_ms)
    assert first.handle != second.handle


async def test_no_more_is_asked_for_than_there_is_room_for(server: PubSubServer) -> None:
    pubsub = PubSub(server)
    await pubsub.publish([b"%d" % n for n in range(20)])
    async with PubSubSource(access(server), pubsub.subscription, lease_s=10) as source:
        assert len(await source.receive(3)) == 3
    assert pubsub.kept.most_leased == 3


async def test_an_acknowledgement_that_failed_is_sent_again(server: PubSubServer) -> None:
    pubsub = PubSub(server)
    await pubsub.publish([b"a"])
    async with PubSubSource(access(server), pubsub.subscription, lease_s=10) as source:
        (message,) = await source.receive(1)
        server.refuse = grpc.StatusCode.UNAVAILABLE
        source.settle(message)
        await until(lambda: "as the test wants it" in source.status().problem, "the refusal")
        server.refuse = None
        await until(lambda: not pubsub.kept.kept, "the acknowledgement")
        await until(lambda: source.status().problem == "", "all is well")


async def test_a_subscription_that_is_not_there_is_named(server: PubSubServer) -> None:
    async with PubSubSource(access(server), "none", lease_s=10) as source:
        with pytest.raises(Unavailable, match=r"projects/test/subscriptions/none.*: create it"):
            await source.receive(1)


async def test_headers_are_attributes_within_what_pubsub_allows(server: PubSubServer) -> None:
    pubsub = PubSub(server)
    headers = [("shoal-job-id", b"j"), ("shoal-message", ("ü" * 1_000).encode()), ("n" * 300, b"v"), ("empty", b"")]
    headers += [(f"h{n}", b"\xff%d" % n) for n in range(150)]
    async with PubSubSink(access(server), pubsub.table["sink"]["topic"]) as sink:
        await sink.send(Outgoing(b"x", b"key", tuple(headers)))
        with pytest.raises(InvalidArgument, match="at most 10000000 bytes"):
            await sink.send(Outgoing(b"x" * 10_000_000))
    (sent,) = await pubsub.answers()
    assert len(sent.headers) == 100
    assert sent.headers["shoal-job-id"] == "j"
    assert sent.headers["shoal-key"] == "key"
    assert sent.headers["shoal-message"] == "ü" * 512
    assert sent.headers["h3"] == "3"


class Fleeting:
    """Credentials whose token is good once."""

    def __init__(self) -> None:
        self.token: str | None = None
        self.refreshed = 0
        self.valid = False

    def refresh(self, request: Any) -> None:
        self.refreshed += 1
        self.token, self.valid = f"token-{self.refreshed}", self.refreshed > 1


async def test_each_call_says_who_calls_with_a_token_that_is_good(server: PubSubServer) -> None:
    pubsub, credentials = PubSub(server), Fleeting()
    tokens = Tokens(lambda: credentials, lambda: None)
    async with PubSubSink(access(server, tokens), pubsub.table["sink"]["topic"]) as sink:
        for _ in range(3):
            await sink.send(Outgoing(b"x"))
    assert server.authorizations == {"Bearer token-1", "Bearer token-2"}
    assert credentials.refreshed == 2


async def test_no_credentials_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth import exceptions

    def none() -> Any:
        raise exceptions.DefaultCredentialsError("none found")

    with pytest.raises(FailedPrecondition, match="set GOOGLE_APPLICATION_CREDENTIALS"):
        await Tokens(none, lambda: None).metadata()


async def test_a_token_that_is_not_to_be_had_is_waited_for(server: PubSubServer) -> None:
    from google.auth import exceptions

    class Away(Fleeting):
        def refresh(self, request: Any) -> None:
            raise exceptions.TransportError("no network")

    with pytest.raises(Unavailable, match="no network"):
        await asyncio.wait_for(Tokens(Away, lambda: None).metadata(), 10)
