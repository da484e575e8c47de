"""The file of connectors: what is wrong is named by its key."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from services.ingest.connectors import settings
from services.ingest.connectors.message import Message, Partition, job_key
from services.ingest.connectors.secrets import resolve_secret
from services.ingest.connectors.settings import of_document, read
from services.ingest.limits import KEY_CHARS

KAFKA = {"kind": "kafka", "brokers": "localhost:9092", "topic": "t"}
KINESIS = {"kind": "kinesis", "region": "eu-1"}
PUBSUB = {"kind": "pubsub", "project": "p"}
GOOD: dict[str, Any] = {
    "model": "m",
    "source": {**KAFKA, "group": "g"},
    "sink": {**KAFKA, "topic": "out"},
    "dead_letters": {**KAFKA, "topic": "dead"},
}
READ = {**KINESIS, "stream": "s"}


def changed(path: str, value: Any) -> dict[str, Any]:
    """A good file with one key set, or (None) left out."""
    document = {"connectors": {"c": copy.deepcopy(GOOD)}}
    *steps, last = path.split(".")
    table: Any = document["connectors"]["c"]
    for step in steps:
        table = table.setdefault(step, {})
    table.pop(last, None)
    if value is not None:
        table[last] = value
    return document


def test_the_least_that_is_needed() -> None:
    one = of_document(changed("sink", None))["c"]
    assert one.source.kind == "kafka"
    assert one.sink is None
    assert one.format == "json"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model", None, "connectors.c.model is required"),
        ("model", "", "connectors.c.model: should have at least 1 character"),
        ("modle", "m", "connectors.c.modle is not a key of this table"),
        ("dead_letters", None, "connectors.c.dead_letters is required"),
        ("source", None, "connectors.c.source is required"),
        ("source.topic", None, "connectors.c.source.topic is required"),
        ("source.group", None, "connectors.c.source.group is required"),
        ("source.kind", "kafak", "connectors.c.source.kind: should be kafka, kinesis or pubsub"),
        ("source.kind", None, "connectors.c.source.kind is required"),
        ("source.options", {"no.such": "1"}, "connectors.c.source.options: No such configuration property"),
        ("source.options", {"fetch.min.bytes": "x"}, "connectors.c.source.options: Invalid value"),
        ("source.options", {"metadata.broker.list": "x:1"}, "set the key brokers"),
        ("dead_letters.options", {"linger.ms": "x"}, "connectors.c.dead_letters.options: Invalid value"),
        ("source.brokers", "localhost", "connectors.c.source.brokers: should match"),
        ("source.start", "middle", "connectors.c.source.start: should be 'earliest' or 'latest'"),
        ("source.brokers", "a:1,b:65536", "connectors.c.source.brokers: b:65536: a port is a number from 1 to 65535"),
        ("sink.topic", "..", "connectors.c.sink.topic: Kafka has no topic of the name"),
        ("sink.topic", "t", "connectors.c: sink: kafka t is the source: messages written there would be read again"),
        (
            "dead_letters",
            {**KAFKA, "brokers": "b:1,localhost:9092"},
            "connectors.c: dead_letters: kafka t is the source",
        ),
        ("sink.topic", "no spaces", "connectors.c.sink.topic: should match"),
        ("sink.group", "g", "connectors.c.sink.group is not a key of this table"),
        ("source.options", {"group.id": "x"}, "connectors.c.source.options: group.id is not an option here"),
        ("source.options", {"enable.auto.commit": True}, "enable.auto.commit cannot be changed"),
        ("source.options", {"a": []}, "connectors.c.source.options: a: expected a text"),
        ("source.options", {"sasl.password": "env:SHOAL_NO_SUCH"}, "SHOAL_NO_SUCH: this variable is not set"),
        ("format", "xml", "connectors.c.format: should be 'json'"),
        ("format", "record", "connectors.c: inputs: format record needs"),
        ("format", "bytes", "connectors.c: inputs: format bytes needs one input"),
        ("inputs", {"x": "FP32"}, "connectors.c: inputs: format json brings its inputs"),
        ("labels", {"source": "mine"}, "connectors.c: labels: source is set by the connector"),
        ("labels", {"a": 3}, "connectors.c.labels.a: should be a valid string"),
        ("max_in_flight", 0, "connectors.c.max_in_flight: should be greater than or equal to 1"),
        ("max_in_flight", "8", "connectors.c.max_in_flight: should be a valid integer"),
        ("deadline_s", -1, "connectors.c.deadline_s: should be greater than 0"),
        ("retry", {"attempts": 1_000}, "connectors.c.retry.attempts: should be less than or equal to 100"),
        ("retry", {"max_backoff_ms": 1}, "connectors.c.retry: max_backoff_ms must be at least"),
        ("sink", KINESIS, "connectors.c.sink.stream is required"),
        (
            "sink",
            {**KINESIS, "stream": "s", "topic": "t"},
            "connectors.c.sink.topic is not a key",
        ),
        ("sink", PUBSUB, "connectors.c.sink.topic is required"),
        (
            "source",
            {**PUBSUB, "subscription": "1"},
            "connectors.c.source.subscription: should match",
        ),
        (
            "source",
            {**PUBSUB, "subscription": "sub", "plaintext": "yes"},
            "connectors.c.source.plaintext",
        ),
        ("tenant", "t" * 65, "connectors.c.tenant: should have at most 64"),
    ],
    ids=range(42),
)
def test_what_is_wrong_is_named_by_its_key(path: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"(?m)^{re.escape(words)}" if words.startswith("connectors") else words):
        of_document(changed(path, value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "connectors is required"),
        ("[connectors]", "connectors"),
        ("connectors = 3", "connectors"),
        ("[connectors.'Bad Name']\nmodel = 'm'", "connectors.Bad Name"),
        ("[connectors.c", "is no TOML"),
        ("other = 1", "other is not a key"),
    ],
    ids=range(6),
)
def test_a_file_that_is_none_of_connectors(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "connectors.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read(tmp_path / "none.toml")


def test_a_stream_of_kinesis_is_not_written_back_to_where_it_is_read() -> None:
    one = {**GOOD, "source": READ, "sink": {**READ, "region": "eu-2"}}
    assert of_document({"connectors": {"c": one}})["c"].sink is not None
    with pytest.raises(ValueError, match="dead_letters: kinesis s is the source"):
        of_document({"connectors": {"c": {**one, "dead_letters": READ}}})


@pytest.mark.parametrize(
    ("source", "other"),
    [
        (GOOD["source"], {**GOOD["source"], "group": "h"}),
        ({**PUBSUB, "subscription": "sub"}, {**PUBSUB, "subscription": "sub2"}),
    ],
)
def test_two_connectors_do_not_share_out_the_messages(source: dict[str, Any], other: dict[str, Any]) -> None:
    def both(second: dict[str, Any]) -> dict[str, Any]:
        return {"connectors": {"a": {**GOOD, "source": source}, "b": {**GOOD, "source": second}}}

    assert len(of_document(both(other))) == 2
    with pytest.raises(ValueError, match=r"connectors: a and b read (kafka t|pubsub sub) as one, so each message"):
        of_document(both(source))


def test_two_connectors_may_read_one_stream_of_kinesis() -> None:
    one = {**GOOD, "source": READ}
    assert len(of_document({"connectors": {"a": one, "b": one}})) == 2


def test_a_library_that_is_not_installed_is_named_and_its_options_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "_is_installed", lambda package: False)
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(ValueError, match=r"pip install 'shoal\[kafka\]'"):
        of_document(changed("source.options", {"fetch.min.bytes": "1"}))


def test_every_mistake_is_told_at_once() -> None:
    document = changed("model", None)
    document["connectors"]["c"]["tenant"] = 3
    with pytest.raises(ValueError, match=r"model is required\nconnectors\.c\.tenant"):
        of_document(document)


def test_secrets_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from a file\n")
    assert resolve_secret("plain") == "plain"
    assert resolve_secret("env:KEY", {"KEY": "from the environment"}) == "from the environment"
    assert resolve_secret(f"file:{tmp_path / 'key'}") == "from a file"
    with pytest.raises(ValueError, match="cannot be read"):
        resolve_secret(f"file:{tmp_path / 'none'}")


def test_the_key_of_a_message_is_where_it_lies_and_what_it_is() -> None:
    def key(place: str = "t/0/7", value: bytes = b"v", name: str = "c", **more: Any) -> str:
        return job_key(name, Message(Partition("0"), 7, place, value, **more))

    assert key() == key()
    assert key().startswith("c/t/0/7/")
    assert (
        len({key(), key("t/0/8"), key(value=b"w"), key(name="d"), key(received_ms=5), key(key=b"v"), key(value=b"")})
        == 7
    )
    assert key(key=b"a", value=b"bc") != key(key=b"ab", value=b"c")
    long = key("t" * 249 + "/0/7")
    assert len(long) <= KEY_CHARS
    assert long != key("t" * 249 + "/0/8")
