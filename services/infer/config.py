"""What the infer service is told: SHOAL_INFER_..."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mesh.process.config import ServiceConfig
from services.infer.response_cache.store import DEFAULT_BYTES
from services.infer.scheduling.queue import QueueLimits
from services.infer.sources import repository
from shoal.errors import FailedPrecondition

_DEFAULT = QueueLimits()


def _names(given: object) -> object:
    return tuple(name.strip() for name in given.split(",") if name.strip()) if isinstance(given, str) else given


class InferConfig(ServiceConfig):
    """Models come from the store, through the mesh, into `cache_dir`; or from the folder `repository`."""

    instance: Annotated[str, Field(pattern=r"^[a-z]+-\d+$")] = "infer-0"
    cache_dir: Path | None = None
    """Where models from the store are kept; all instances of a node may share it. Needs `mesh`."""
    repository: Path | None = None
    """A folder of models in the usual layout, or of bare .onnx files."""
    model_control: Literal["none", "explicit", "poll"] = "none"
    """What is served unasked: all models; only `load_models`; all, and what changes in the folder meanwhile."""
    load_models: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    """With `model_control` explicit: the models to serve at start, with commas between them; `*`: all."""
    poll_ms: Annotated[int, Field(ge=100, le=86_400_000)] = 15_000
    """With `model_control` poll: how often the folder is looked at."""
    share_port: bool = False
    """Other infer processes may listen at the same TCP port: each gets a share of the connections."""
    flights: Path | None = None
    """A file, `<instance>.flights` in the folder of the node's: says what is being executed, should it end of that."""
    shared_dir: Path | None = None
    """A private folder of the infer processes that share models: each such model runs once, in a process of its own."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """For one execution of a model that does not say; 0: as many as this process may use cores."""
    queue_calls: Annotated[int, Field(ge=1, le=1_000_000)] = _DEFAULT.calls
    """Calls that may wait for one model version, where its configuration does not say."""
    queue_bytes: Annotated[int, Field(ge=1)] = _DEFAULT.size_bytes
    """Bytes of inputs that may wait for one model version."""
    response_cache_bytes: Annotated[int, Field(ge=0)] = DEFAULT_BYTES
    """Answers kept in memory for all models that have a response cache; 0: none is kept."""

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
    def queue_limits(self) -> QueueLimits:
        return QueueLimits(self.queue_calls, self.queue_bytes)
