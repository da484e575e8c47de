"""Paths that services serve over REST, and the RPC of gRPC that each belongs to: one table for all readers.

The Open Inference Protocol, and streams of responses as JSON. JSON calls of unary methods are transcoded (mesh.xds).

Servers find a request's operation here, policies its group, and gateways their routes. No other path is served.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

PREFIX: Final = "/v2"
"""Prefix of the paths of the inference protocol."""

_RPC = "/inference.GRPCInferenceService/"
_MODEL = f"{PREFIX}/models/{{model}}"
_ANY_VERSION = (_MODEL, f"{_MODEL}/versions/{{version}}")


@dataclass(frozen=True)
class RestPath:
    """One path; a name in braces stands for one segment, or for its beginning."""

    operation: str
    method: str
    template: str
    rpc: str

    @property
    def segments(self) -> tuple[str, ...]:
        return tuple(self.template.split("/")[1:])

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods of its requests. HEAD is GET without the body of the response (RFC 9110, section 9.3.2)."""
        return ("GET", "HEAD") if self.method == "GET" and self not in STREAM_PATHS else (self.method,)

    @property
    def pattern(self) -> str:
        """Regular expression of RE2 for the path of a request, with its query."""
        return re.sub(r"\{\w+\}", "[^/?]+", self.template) + r"(?:\?.*)?"


def _paths(operation: str, method: str, rpc: str, *templates: str) -> Iterator[RestPath]:
    for template in templates:
        yield RestPath(operation, method, template, _RPC + rpc)


def _of_versions(operation: str, method: str, rpc: str, end: str) -> Iterator[RestPath]:
    yield from _paths(operation, method, rpc, *(template + end for template in _ANY_VERSION))


def _shared_memory(kind: str) -> Iterator[RestPath]:
    rpc, root = f"{kind}SharedMemory", f"{PREFIX}/{kind.lower()}sharedmemory"
    region = f"{root}/region/{{region}}"
    yield from _paths("shared memory", "GET", rpc + "Status", f"{root}/status", f"{region}/status")
    yield from _paths("shared memory", "POST", rpc + "Register", f"{region}/register")
    yield from _paths("shared memory", "POST", rpc + "Unregister", f"{root}/unregister", f"{region}/unregister")


# In the order of matching: a plain segment comes before a model's name.
REST_PATHS: tuple[RestPath, ...] = (
    *_paths("live", "GET", "ServerLive", f"{PREFIX}/health/live"),
    *_paths("ready", "GET", "ServerReady", f"{PREFIX}/health/ready"),
    *_paths("metadata", "GET", "ServerMetadata", PREFIX),
    *_paths("statistics", "GET", "ModelStatistics", f"{PREFIX}/models/stats"),
    *_of_versions("infer", "POST", "ModelInfer", "/infer"),
    *_of_versions("generate", "POST", "ModelInfer", "/generate"),
    *_of_versions("generate stream", "POST", "ModelStreamInfer", "/generate_stream"),
    *_of_versions("model metadata", "GET", "ModelMetadata", ""),
    *_of_versions("model ready", "GET", "ModelReady", "/ready"),
    *_of_versions("model config", "GET", "ModelConfig", "/config"),
    *_of_versions("statistics", "GET", "ModelStatistics", "/stats"),
    *_paths("index", "POST", "RepositoryIndex", f"{PREFIX}/repository/index"),
    *_paths("load", "POST", "RepositoryModelLoad", f"{PREFIX}/repository/models/{{model}}/load"),
    *_paths("unload", "POST", "RepositoryModelUnload", f"{PREFIX}/repository/models/{{model}}/unload"),
    *(
        path
        for method in ("GET", "POST")
        for path in (
            *_paths("trace setting", method, "TraceSetting", f"{PREFIX}/trace/setting", f"{_MODEL}/trace/setting"),
            *_paths("log settings", method, "LogSettings", f"{PREFIX}/logging"),
        )
    ),
    *_shared_memory("System"),
    *_shared_memory("Cuda"),
)


STREAM_PATHS: tuple[RestPath, ...] = (
    RestPath("watch job", "GET", "/shoal/v1/jobs/{id}:watch", "/shoal.ingest.v1.IngestService/WatchJob"),
    RestPath("stream results", "GET", "/shoal/v1/results:stream", "/shoal.store.v1.StoreService/StreamResults"),
)
"""Paths of streams of responses as JSON. The other fields of a request are in the query."""

INFER_PATHS: tuple[RestPath, ...] = tuple(path for path in REST_PATHS if path.operation == "infer")
"""Paths of inference, which become jobs with ASYNC_PREFERENCE."""

ASYNC_PREFERENCE: Final = r'(?i)((?:[^",]|"(?:[^"\\]|\\.)*")*,)*[ \t]*respond-async[ \t]*(;.*|,.*)?'
"""Regular expression of RE2 for a header Prefer with respond-async (RFC 7240), and others beside it."""


def patterns_of(rpcs: Iterable[str]) -> list[str]:
    """Return the regular expressions of the paths of `rpcs`, without repetition."""
    wanted = frozenset(rpcs)
    return list(dict.fromkeys(path.pattern for path in (*REST_PATHS, *STREAM_PATHS) if path.rpc in wanted))


def model_path(model: str) -> str:
    """Return the path of a model, as clients encode its name."""
    return f"{PREFIX}/models/{quote(model, safe='')}"


def found(segments: tuple[str, ...]) -> Iterator[tuple[RestPath, dict[str, str]]]:
    """Yield the paths that match the `segments` of a request, each with the values of its names; nothing is decoded."""
    for path in _BY_LENGTH.get(len(segments), ()):
        values: dict[str, str] = {}
        for want, got in zip(path.segments, segments, strict=True):
            if want[:1] == "{":
                name, _, end = want[1:].partition("}")
                if not got.endswith(end) or got == end:
                    break
                values[name] = got.removesuffix(end)
            elif want != got:
                break
        else:
            yield path, values


_BY_LENGTH: dict[int, list[RestPath]] = {}
for _path in (*REST_PATHS, *STREAM_PATHS):
    _BY_LENGTH.setdefault(len(_path.segments), []).append(_path)
