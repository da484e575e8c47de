"""Configuration of the infer service: the SHOAL_INFER_... variables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mesh.process.config import Address, ServiceConfig
from mesh.process.sockets import is_local
from services.infer.response_cache.store import DEFAULT_BYTES
from services.infer.scheduling.queue import QueueLimits
from services.infer.sequences.sequence_table import STATE_BYTES
from services.infer.sources import repository
from shoal.errors import FailedPrecondition

_DEFAULT = QueueLimits()


def _names(value: object) -> object:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


class InferConfig(ServiceConfig):
    """Settings of one infer process. Models are fetched from the store into `cache_dir`, or read from `repository`."""

    instance: Annotated[str, Field(pattern=r"^[a-z]+-\d+$")] = "infer-0"
    http_listen: Address | None = None
    """A second address, for HTTP clients that get one of their own; `listen` serves REST as well."""
    cache_dir: Path | None = None
    """Folder for models from the store; all instances of a node may share it. Needs `mesh`."""
    repository: Path | None = None
    """A folder of models in the usual layout, or of bare .onnx files."""
    model_control: Literal["none", "explicit", "poll"] = "none"
    """Models to serve. none: all, read once; explicit: only `load_models`, and callers may load and unload models;
    poll: all, and the folder is re-read."""
    load_models: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    """With `model_control` explicit: the models to serve at start, separated by commas; `*`: all."""
    poll_ms: Annotated[int, Field(ge=100, le=86_400_000)] = 15_000
    """With `model_control` poll: interval at which the folder is re-read."""
    allow_code: bool | None = None
    """Serve models that run code or read this server's files and variables, and accept the files of a load request.
    Unset: only where no other machine can reach `listen`."""
    body_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 30)] = 776 << 20
    """Most bytes that the process holds for requests, from the first byte to the response: bodies, decompressed, parsed
    and queued copies, tensors between the steps of an ensemble, responses that are being written. One client
    gets at most two thirds, one tenant four fifths, and small requests find room beside them; beyond it, calls get
    RESOURCE_EXHAUSTED. The default admits one request and one response of 128 MiB at once, with their copies."""
    memory_bytes: Annotated[int, Field(ge=1 << 30)] | None = None
    """Most private memory that the process, and each model process, may allocate: a run that needs more fails with
    INTERNAL, and the others go on. Unset: three quarters of the memory of the machine or container, 2 GiB at least;
    with an NVIDIA GPU, no limit."""
    share_port: bool = False
    """Other infer processes may listen at the same TCP port: each gets a share of the connections."""
    crash_journal: Path | None = None
    """File of this instance's crash journal, `<instance>.flights`, in the folder of the node's journals."""
    shared_dir: Path | None = None
    """Private folder of the infer processes that share models: each shared model runs once, in its own process."""
    trial_ms: Annotated[int, Field(ge=1_000, le=86_400_000)] = 900_000
    """Longest time of one trial load, before a model is registered: a GPU may compile a large model for minutes."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads of one execution, unless the model's configuration sets them; 0: one per core of this process."""
    queue_calls: Annotated[int, Field(ge=1, le=1_000_000)] = _DEFAULT.calls
    """Requests that may wait for one model version, unless its configuration sets a bound."""
    queue_bytes: Annotated[int, Field(ge=1)] = _DEFAULT.size_bytes
    """Bytes of inputs that may wait for one model version."""
    policy: Path | None = None
    """Policy of access, as JSON, for a server behind a gateway that verifies callers. The file is re-read when it is
    replaced. `listen` must then be a unix socket, to which only that gateway can connect."""
    limit_processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that share the limits of the file `policy`: each has an equal part."""
    response_cache_bytes: Annotated[int, Field(ge=0)] = DEFAULT_BYTES
    """Size of the response cache, shared by all models that use it; 0: no response is cached."""
    state_bytes: Annotated[int, Field(ge=1 << 20)] = STATE_BYTES
    """Most bytes of the states of all models' sequences. One tenant gets at most two thirds; a step whose new state
    finds no room gets RESOURCE_EXHAUSTED."""

    @model_validator(mode="after")
    def _one_source(self) -> InferConfig:
        if (self.cache_dir is None) == (self.repository is None):
            raise ValueError(
                "set one of SHOAL_INFER_CACHE_DIR (models of the store) and SHOAL_INFER_REPOSITORY (a folder)"
            )
        if self.cache_dir is not None and self.mesh is None:
            raise ValueError(
                "SHOAL_INFER_CACHE_DIR needs SHOAL_INFER_MESH: models come from the store, through the mesh"
            )
        if self.load_models and self.model_control != "explicit":
            raise ValueError("SHOAL_INFER_LOAD_MODELS needs SHOAL_INFER_MODEL_CONTROL=explicit: else all are loaded")
        if self.model_control == "poll" and self.repository is None:
            raise ValueError(
                "SHOAL_INFER_MODEL_CONTROL=poll needs SHOAL_INFER_REPOSITORY: the store is followed anyway"
            )
        return self

    @model_validator(mode="after")
    def _one_policy(self) -> InferConfig:
        if self.policy is not None and self.auth:
            raise ValueError("set one of SHOAL_INFER_POLICY (a file) and SHOAL_INFER_AUTH (the policy of a cluster)")
        return self

    @model_validator(mode="after")
    def _policy_is_behind_a_gateway(self) -> InferConfig:
        others = [each for each in (self.listen, self.http_listen) if each and not each.startswith("unix:")]
        if self.policy is not None and others:
            raise ValueError(
                "SHOAL_INFER_POLICY needs a unix socket as SHOAL_INFER_LISTEN, and no other address: callers at "
                "another one could name themselves whoever they like"
            )
        return self

    @model_validator(mode="after")
    def _second_address_is_as_local(self) -> InferConfig:
        if self.http_listen is not None and not self.insecure and not is_local(self.http_listen):
            raise ValueError(
                f"SHOAL_INFER_HTTP_LISTEN={self.http_listen!r}: other machines can reach this address: "
                "set SHOAL_INFER_INSECURE=true if you trust all of them"
            )
        return self

    @field_validator("repository")
    @classmethod
    def _readable(cls, root: Path | None) -> Path | None:
        if root is not None:
            try:
                repository.check(root)
            except FailedPrecondition as err:
                raise ValueError(err.message) from err
        return root

    @property
    def allows_code(self) -> bool:
        return is_local(self.listen) if self.allow_code is None else self.allow_code

    @property
    def queue_limits(self) -> QueueLimits:
        return QueueLimits(self.queue_calls, self.queue_bytes)
