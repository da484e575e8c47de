"""Connector file: TOML, validated as a whole at start. Each error names its key.

[connectors.reviews]
model = "sentiment"
format = "record"
inputs = { text = "BYTES" }
source = { kind = "kafka", brokers = "localhost:9092", topic = "reviews", group = "shoal" }
sink = { kind = "kafka", brokers = "localhost:9092", topic = "sentiments" }
dead_letters = { kind = "kafka", brokers = "localhost:9092", topic = "reviews-dead" }
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from services.ingest.connectors import tensors
from services.ingest.connectors.secrets import resolve_secret
from services.ingest.limits import (
    LABEL_CHARS,
    LABELS,
    MODEL_NAME_CHARS,
    MODEL_VERSION_CHARS,
    MOST_ATTEMPTS,
)
from shoal.access.policy import TENANT_CHARS

NAME = r"^[a-z0-9][a-z0-9_-]{0,39}$"
_OWN_LABELS = 2
MOST = 100
"""Limit on the connectors of a file, because each has threads and connections."""

Secret: TypeAlias = Annotated[str, AfterValidator(resolve_secret)]


def _with_ports(brokers: str) -> str:
    for broker in brokers.split(","):
        if not 0 < int(broker.rpartition(":")[2]) < 1 << 16:
            raise ValueError(f"{broker}: a port is a number from 1 to 65535")
    return brokers


def _named(topic: str) -> str:
    if topic in (".", ".."):
        raise ValueError(f"Kafka has no topic of the name {topic!r}")
    return topic


Brokers: TypeAlias = Annotated[
    str, Field(pattern=r"^[^\s,/]+:\d{1,5}(,[^\s,/]+:\d{1,5})*$"), AfterValidator(_with_ports)
]
Topic: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$"), AfterValidator(_named)]
_PUBSUB_NAME = r"^[A-Za-z][A-Za-z0-9._~+%-]{2,254}$"
Options: TypeAlias = Mapping[str, str]
_KAFKA_OWN = {
    "bootstrap.servers": "brokers",
    "metadata.broker.list": "brokers",
    "group.id": "group",
    "auto.offset.reset": "start",
}
_KAFKA_FIXED = ("enable.auto.commit", "enable.auto.offset.store", "acks", "request.required.acks", "enable.idempotence")


def _installed(package: str) -> Callable[[str], str]:
    """Return a validator that reports a missing library at start, instead of at the first message."""

    def check(kind: str) -> str:
        if not _is_installed(package):
            raise ValueError(f"{kind} needs a library that is not installed: pip install 'shoal[{kind}]'")
        return kind

    return check


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        # The parent package is not installed.
        return False


class TableSettings(BaseModel):
    """Table of the file; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class KafkaSinkSettings(TableSettings):
    """Kafka topic that is written."""

    kind: Annotated[Literal["kafka"], AfterValidator(_installed("confluent_kafka"))]
    brokers: Brokers
    topic: Topic
    options: Options = {}
    """Options of librdkafka, such as `security.protocol`; a value may be `env:NAME` or `file:PATH`."""

    @property
    def label(self) -> str:
        """Name in messages and reports."""
        return f"{self.kind} {self.topic}"

    @field_validator("options", mode="before")
    @classmethod
    def _resolved(cls, options: Any) -> Any:
        return {key: _option(key, value) for key, value in options.items()} if isinstance(options, dict) else options

    @field_validator("options")
    @classmethod
    def _accepted(cls, options: Options) -> Options:
        _check_options(options, "Producer")
        return options


class KafkaSourceSettings(KafkaSinkSettings):
    """Kafka topic that is read, as a member of a group."""

    group: Annotated[str, Field(min_length=1, max_length=255)]
    start: Literal["earliest", "latest"] = "earliest"
    """Start of a group that has committed nothing yet."""

    @field_validator("options")
    @classmethod
    def _accepted(cls, options: Options) -> Options:
        _check_options({**options, "group.id": "none"}, "Consumer")
        return options

    def reads(self, end: TableSettings) -> bool:
        """Return True when messages written to `end` are read by this source."""
        return isinstance(end, KafkaSinkSettings) and end.topic == self.topic and _share_a_broker(self, end)

    def shares_with(self, other: TableSettings) -> bool:
        """Return True when each message is delivered to only one of the two sources."""
        return isinstance(other, KafkaSourceSettings) and other.group == self.group and self.reads(other)


class KinesisSinkSettings(TableSettings):
    """Kinesis stream that is written. Credentials are found as AWS' own tools find them."""

    kind: Annotated[Literal["kinesis"], AfterValidator(_installed("aiobotocore"))]
    stream: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
    endpoint: Annotated[str, Field(pattern=r"^https?://[^\s]+$")] | None = None
    """URL of a server other than AWS' own."""

    @property
    def label(self) -> str:
        """Name in messages and reports."""
        return f"{self.kind} {self.stream}"


class KinesisSourceSettings(KinesisSinkSettings):
    """Kinesis stream that is read; its shards are shared with other instances."""

    start: Literal["earliest", "latest"] = "earliest"
    """Start of a shard that has no checkpoint yet."""
    lease_ms: Annotated[int, Field(ge=1_000, le=600_000)] = 10_000
    """Lease of a shard; after it, the shards of a dead instance go to others."""
    poll_ms: Annotated[int, Field(ge=10, le=60_000)] = 250
    """Poll interval of an empty shard. Kinesis allows five reads a second and shard, by all readers together."""

    def reads(self, end: TableSettings) -> bool:
        """Return True when records written to `end` are read by this source."""
        return isinstance(end, KinesisSinkSettings) and (end.stream, end.region, end.endpoint) == (
            self.stream,
            self.region,
            self.endpoint,
        )

    def shares_with(self, other: TableSettings) -> bool:
        """Return False: each connector has its own checkpoints, so each reads all records."""
        return False


class PubSubEnd(TableSettings):
    """Project of Google Cloud. Credentials are found as Google's own tools find them."""

    kind: Annotated[Literal["pubsub"], AfterValidator(_installed("google.auth"))]
    project: Annotated[str, Field(pattern=r"^[a-z0-9.:-]{1,100}$")]
    endpoint: Annotated[str, Field(pattern=r"^[^\s/]+:\d{1,5}$")] = "pubsub.googleapis.com:443"
    plaintext: bool = False
    """For an emulator: no TLS, no credentials."""


class PubSubSinkSettings(PubSubEnd):
    """Pub/Sub topic that is written."""

    topic: Annotated[str, Field(pattern=_PUBSUB_NAME)]

    @property
    def label(self) -> str:
        """Name in messages and reports."""
        return f"{self.kind} {self.topic}"


class PubSubSourceSettings(PubSubEnd):
    """Pub/Sub subscription that is pulled."""

    subscription: Annotated[str, Field(pattern=_PUBSUB_NAME)]
    lease_s: Annotated[int, Field(ge=1, le=600)] = 60
    """Lease of a message, which is renewed until its job ends; after a kill the message is free when it lapses."""

    def reads(self, end: TableSettings) -> bool:
        """Return False: the topic of a subscription is unknown."""
        return False

    def shares_with(self, other: TableSettings) -> bool:
        """Return True when each message is delivered to only one of the two sources."""
        return isinstance(other, PubSubSourceSettings) and (other.project, other.subscription, other.endpoint) == (
            self.project,
            self.subscription,
            self.endpoint,
        )

    @property
    def label(self) -> str:
        """Name in messages and reports."""
        return f"{self.kind} {self.subscription}"


Source: TypeAlias = Annotated[
    KafkaSourceSettings | KinesisSourceSettings | PubSubSourceSettings, Field(discriminator="kind")
]
Sink: TypeAlias = Annotated[KafkaSinkSettings | KinesisSinkSettings | PubSubSinkSettings, Field(discriminator="kind")]


class Retry(TableSettings):
    """Retry policy of the jobs."""

    attempts: Annotated[int, Field(ge=1, le=MOST_ATTEMPTS)] = 5
    initial_backoff_ms: Annotated[int, Field(ge=0, le=86_400_000)] = 200
    max_backoff_ms: Annotated[int, Field(ge=0, le=86_400_000)] = 30_000

    @model_validator(mode="after")
    def _ordered(self) -> Retry:
        if self.max_backoff_ms < self.initial_backoff_ms:
            raise ValueError(f"max_backoff_ms must be at least initial_backoff_ms ({self.initial_backoff_ms})")
        return self


class ConnectorSettings(TableSettings):
    """Table of one connector."""

    model: Annotated[str, Field(min_length=1, max_length=MODEL_NAME_CHARS)]
    version: Annotated[str, Field(max_length=MODEL_VERSION_CHARS)] = ""
    """Empty: the version that the server chooses."""
    source: Source
    sink: Sink | None = None
    """Destination of answers; None: the answers are only in the store."""
    dead_letters: Sink
    """Destination of messages without an answer, with the reason. Required, so that no message is lost silently."""
    format: Literal["json", "record", "bytes", "protobuf"] = "json"
    """Format of messages."""
    writes: Literal["json", "protobuf"] = "json"
    """Format of answers."""
    inputs: Mapping[str, str] = {}
    """record: the datatype of each input. bytes: the one input that gets the message, as BYTES."""
    tenant: Annotated[str, Field(max_length=TENANT_CHARS)] = ""
    labels: Mapping[Annotated[str, Field(max_length=LABEL_CHARS)], Annotated[str, Field(max_length=LABEL_CHARS)]] = {}
    retry: Retry = Retry()
    deadline_s: Annotated[float, Field(gt=0, le=86_400 * 3_660)] | None = None
    """Time after its submission at which a message's job expires without an answer; None: never."""
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = 256
    """Limit on messages in flight, for each ingest instance. 1 keeps their order."""
    max_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 32 << 20
    """Limit on bytes in flight, for each ingest instance; a larger message passes alone."""

    @field_validator("deadline_s", mode="before")
    @classmethod
    def _as_float(cls, value: Any) -> Any:
        return float(value) if type(value) is int else value

    @model_validator(mode="after")
    def _fits(self) -> ConnectorSettings:
        if self.format == "record" and not self.inputs:
            raise ValueError('inputs: format record needs the model\'s inputs: inputs = { text = "BYTES" }')
        if self.format == "bytes" and list(self.inputs.values()) != ["BYTES"]:
            raise ValueError('inputs: format bytes needs one input, of BYTES: inputs = { image = "BYTES" }')
        if self.format in ("json", "protobuf") and self.inputs:
            raise ValueError(f"inputs: format {self.format} brings its inputs in each message: leave them out")
        for name, datatype in self.inputs.items():
            if datatype not in tensors.DATATYPES:
                raise ValueError(f"inputs.{name}: {datatype!r} is none of {', '.join(tensors.DATATYPES)}")
        for name, end in (("sink", self.sink), ("dead_letters", self.dead_letters)):
            if end is not None and self.source.reads(end):
                raise ValueError(
                    f"{name}: {end.label} is the source: messages written there would be read again, for ever"
                )
        if reserved := {"connector", "source"} & self.labels.keys():
            raise ValueError(f"labels: {', '.join(sorted(reserved))} is set by the connector itself")
        if len(self.labels) > LABELS - _OWN_LABELS:
            raise ValueError(f"labels: at most {LABELS - _OWN_LABELS}, got {len(self.labels)}")
        return self


class File(TableSettings):
    """Root table of the file."""

    connectors: Annotated[
        dict[Annotated[str, Field(pattern=NAME)], ConnectorSettings], Field(min_length=1, max_length=MOST)
    ]

    @field_validator("connectors")
    @classmethod
    def _each_reads_all(cls, tables: dict[str, ConnectorSettings]) -> dict[str, ConnectorSettings]:
        for (name, one), (other, another) in itertools.combinations(tables.items(), 2):
            if one.source.shares_with(another.source):
                raise ValueError(
                    f"{name} and {other} read {one.source.label} as one, so each message would reach only one of them: "
                    "give each a group, or subscription, of its own"
                )
        return tables


def read(path: Path) -> dict[str, ConnectorSettings]:
    """Return the connectors of a file, by name.

    Raises:
        ValueError: the file cannot be read, or is invalid; one line for each error, with its key.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as err:
        raise ValueError(f"cannot be read: {getattr(err, 'strerror', None) or err}") from None
    except tomllib.TOMLDecodeError as err:
        raise ValueError(f"is no TOML: {err}") from None
    return of_document(document)


def of_document(document: Mapping[str, Any]) -> dict[str, ConnectorSettings]:
    """Return the connectors of a parsed file, by name.

    Raises:
        ValueError: the document is invalid; one line for each error, with its key.
    """
    try:
        return File.model_validate(document).connectors
    except ValidationError as err:
        raise ValueError(
            "\n".join(_explained(each["loc"], each["type"], each["msg"]) for each in err.errors())
        ) from None


def _share_a_broker(one: KafkaSinkSettings, other: KafkaSinkSettings) -> bool:
    return not {*one.brokers.split(",")}.isdisjoint(other.brokers.split(","))


def _option(key: str, value: Any) -> str:
    if key in _KAFKA_OWN:
        raise ValueError(f"{key} is not an option here: set the key {_KAFKA_OWN[key]}")
    if key in _KAFKA_FIXED:
        raise ValueError(f"{key} cannot be changed: without it messages could be lost")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{key}: expected a text, a number, true or false")
    return resolve_secret(value)


def _check_options(options: Options, client: str) -> None:
    """Validate options with the library, by making a client without brokers, which connects nowhere."""
    # A missing library is reported by the validator of `kind`.
    if not _is_installed("confluent_kafka"):
        return
    import confluent_kafka

    try:
        getattr(confluent_kafka, client)({**options, "log_level": "0"})
    except (confluent_kafka.KafkaException, TypeError, ValueError) as err:
        cause = err.args[0]
        raise ValueError(cause.str() if isinstance(cause, confluent_kafka.KafkaError) else str(cause)) from None


def _explained(loc: Iterable[int | str], kind: str, message: str) -> str:
    steps = [str(step) for step in loc]
    # pydantic adds a step with the kind for a union of tables, and marks an invalid key with a step "[key]".
    path = ".".join(
        step
        for before, step in zip(["", *steps], steps, strict=False)
        if step != "[key]" and not (before in ("source", "sink", "dead_letters") and step in KINDS)
    )
    if kind in ("missing", "union_tag_not_found"):
        return f"{path}{'.kind' * (kind != 'missing')} is required"
    if kind == "union_tag_invalid":
        return f"{path}.kind: should be {', '.join(KINDS[:-1])} or {KINDS[-1]}"
    if kind == "extra_forbidden":
        return f"{path} is not a key of this table"
    text = re.sub(r"^(Value error, |String should |Input should )", "", message)
    return f"{path}: should {text}" if message.startswith(("String", "Input")) else f"{path}: {text}"


KINDS = ("kafka", "kinesis", "pubsub")
