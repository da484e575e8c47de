"""Submission of batches: the request, inputs, output and model are validated before the batch is stored."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import pyarrow as pa

from mesh.mongo_clock import Clock
from mesh.process.tasks import uninterrupted
from mesh.process.threads import Threads
from mesh.rpc.places import are_for_others
from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from mesh.rpc.tenant_turns import WAIT_S, TenantTurns
from services.ingest.batches.batch import ATTEMPTS, CHUNK_ROWS, Batch, BatchState, BatchStep, Format
from services.ingest.batches.batch_repository import MAX_ACTIVE, BatchRepository, check_same_request
from services.ingest.batches.duties import format_of, input_entries, owner_of
from services.ingest.batches.inputs.locations import Entry, InputLocations, is_within
from services.ingest.batches.mapping import (
    RequestedColumns,
    available_columns,
    check_file,
    kept_schema,
    map_columns,
    object_columns,
    result_columns,
)
from services.ingest.batches.model_metadata import ModelMetadata
from services.ingest.batches.outputs.part_summary import is_reserved_output_name
from services.ingest.batches.readers import naming_file, open_pinned
from services.ingest.batches.rows.signature import Signature
from services.ingest.intake.submission import at_most, digest_of, labels_of
from services.ingest.job_access import checked_caller
from services.ingest.limits import KEY_CHARS, MODEL_NAME_CHARS, MODEL_VERSION_CHARS, MOST_ATTEMPTS
from shoal.access.policy import TENANT_CHARS
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from shoal.ingest.v1 import ingest_pb2 as pb

INPUTS = 1_000
NAMES = 256
MAX_CHUNK_ROWS = 1_000_000
SUBMITS_AT_ONCE = 4
"""Submits that one instance checks at a time, each in a thread: looking up a thousand long paths takes a second."""
# Names below a prefix that are checked: to infer the format, to find a file with rows, to find existing results.
_MAX_INSPECTED = 1_000

_FORMATS = {
    pb.BATCH_FORMAT_JSONL: Format.JSONL,
    pb.BATCH_FORMAT_PARQUET: Format.PARQUET,
    pb.BATCH_FORMAT_NPZ: Format.NPZ,
    pb.BATCH_FORMAT_OBJECTS: Format.OBJECTS,
}


@dataclass(frozen=True)
class InspectedInputs:
    """Format and columns of the inputs, as the first file shows them."""

    format: Format
    columns: tuple[tuple[str, str], ...]
    kept: bytes


class Submissions:
    """Validates and stores submitted batches."""

    def __init__(
        self,
        batches: BatchRepository,
        metadata: ModelMetadata,
        locations: InputLocations,
        threads: Threads,
        *,
        clock: Clock,
        new_id: Callable[[], str],
        instance: str,
        on_accepted: Callable[[], None],
    ) -> None:
        self._batches = batches
        self._metadata = metadata
        self._locations = locations
        self._threads = threads
        self._clock = clock
        self._new_id = new_id
        self._instance = instance
        self._on_accepted = on_accepted
        self._turns = TenantTurns(SUBMITS_AT_ONCE, leaves_room=True, wait_s=WAIT_S)

    async def submit(self, request: pb.SubmitBatchRequest, scope: TenantScope = EVERY_TENANT) -> tuple[Batch, bool]:
        """Store a batch of the scope. Return it, and whether its idempotency key was known.

        Raises:
            InvalidArgument: names the field, the expected and the actual value. NotFound: no such file or model.
            PermissionDenied: a URL, the tenant or the model is not allowed.
            FailedPrecondition: the output is not empty.
            AlreadyExists: the key was used with another request. ResourceExhausted: too many batches.
            Unavailable: MongoDB, infer or a storage location is unavailable.
        """
        check_fields(request)
        request.tenant = scope.owner("tenant", request.tenant)
        caller = checked_caller(scope, request.model_name)
        limits = scope.limits(request.model_name)
        # The files are no bytes of the request. Their rows count as they run.
        with nullcontext() if limits is None else limits.reserved(request.ByteSize(), 0):
            async with self._turns.take(request.tenant):
                return await uninterrupted(self._submit(request, scope, caller))

    async def _submit(self, request: pb.SubmitBatchRequest, scope: TenantScope, caller: bytes) -> tuple[Batch, bool]:
        digest = digest_of(request)
        if request.idempotency_key:
            earlier = await self._batches.find_by_key(request.tenant, request.idempotency_key)
            if earlier is not None:
                return check_same_request(earlier, digest), True
        await self._check_active(request.tenant)
        # Links are looked up on the disk, up to a thousand for each of a thousand URLs.
        inputs, output = await self._threads.run(self._checked_urls, request, scope)
        signature = await self._metadata.signature(request.model_name, request.model_version, request.outputs)
        inspected = await self._threads.run(self._inspect, request, inputs, output, signature)
        batch = replace(self._batch(request, inputs, output, signature, inspected, digest), caller=caller)
        result_columns(batch).schema()
        batch, existed = await self._batches.add(batch)
        self._on_accepted()
        return batch, existed

    async def _check_active(self, tenant: str) -> None:
        """Raise ResourceExhausted when no further batch of `tenant` may be active. Submits at one moment may pass."""
        free = MAX_ACTIVE - await self._batches.count_active()
        if free <= 0:
            raise ResourceExhausted(f"{MAX_ACTIVE} batches are active, which is the limit", retry_after_ms=10_000)
        if tenant and are_for_others(held := await self._batches.count_active(tenant), free):
            raise ResourceExhausted(
                f"{held} batches of tenant {tenant!r} are active, and the {free} that may be added are for others",
                retry_after_ms=10_000,
            )

    def _checked_urls(self, request: pb.SubmitBatchRequest, scope: TenantScope) -> tuple[tuple[str, ...], str]:
        owner = scope.verified_tenant
        inputs = tuple(self._locations.check(f"inputs[{n}]", url, owner) for n, url in enumerate(request.inputs))
        output = self._locations.check("output", request.output, owner).rstrip("/")
        for url in inputs:
            if is_within(output, url) and url.endswith("/"):
                raise InvalidArgument(f"output: {output} lies within the input {url}: its parts would become inputs")
            if is_within(url, output):
                raise InvalidArgument(f"output: the input {url} lies within {output}: choose a folder of its own")
        return inputs, output

    def _inspect(
        self, request: pb.SubmitBatchRequest, inputs: Sequence[str], output: str, signature: Signature
    ) -> InspectedInputs:
        """Inspect the first input, and check the output. Blocks: run it in a thread."""
        self._check_output(output)
        kind = _FORMATS.get(request.format) or self._infer_format(inputs[0])
        first = self._first(inputs, kind)
        column_of = dict(request.columns)
        if kind is Format.OBJECTS:
            mapped = object_columns(request.model_name, signature, column_of)
            kept = kept_schema(kind, _empty_file(), request.keep_columns)
            return InspectedInputs(
                kind, tuple((spec.name, column) for spec, column in mapped), kept.serialize().to_pybytes()
            )
        with open_pinned(self._locations, first) as file, naming_file(first):
            mapped = map_columns(request.model_name, signature, column_of, available_columns(kind, file))
            kept = kept_schema(kind, file, request.keep_columns)
            check_file(kind, file, RequestedColumns(mapped, kept))
        return InspectedInputs(
            kind, tuple((spec.name, column) for spec, column in mapped), kept.serialize().to_pybytes()
        )

    def _first(self, inputs: Sequence[str], kind: Format) -> Entry:
        """Return the file that determines the columns: the first; for JSON Lines, the first that is not empty."""
        found = input_entries(self._locations, inputs, kind)
        if kind is not Format.JSONL:
            return next(found)
        some = (entry for entry in itertools.islice(found, _MAX_INSPECTED) if entry.size)
        if (first := next(some, None)) is None:
            raise InvalidArgument(f"inputs: {', '.join(inputs)[:200]}: no line in it, so its columns are unknown")
        return first

    def _check_output(self, output: str) -> None:
        try:
            owner = owner_of(self._locations, output)
        except NotFound:
            self._check_unused(output)
            return
        raise FailedPrecondition(
            f"output: {output} has the results of batch {owner} already: "
            "use another folder or prefix, or remove what is there"
        )

    def _check_unused(self, output: str) -> None:
        """Check that the output has no file that parts would replace, or that readers would take for a part."""
        if self._locations.is_file(output):
            raise InvalidArgument(f"output: {output} is a file: name a folder or prefix for the results")
        try:
            found = [entry.url for entry in itertools.islice(self._locations.list(output + "/"), _MAX_INSPECTED)]
        except NotFound:
            return
        for url in found:
            if is_reserved_output_name(url.removeprefix(output + "/")):
                raise FailedPrecondition(
                    f"output: {url} exists already, and belongs to no batch: "
                    "use another folder or prefix, or remove what is there"
                )

    def _infer_format(self, url: str) -> Format:
        """Return the format of the file's suffix, or of the files below a prefix, when they agree."""
        if not url.endswith("/"):
            if (kind := format_of(url)) is None:
                raise InvalidArgument(
                    f"format: the name of {url} has no known suffix: end it with .jsonl, .ndjson, .parquet or "
                    ".npz, or set the format; a prefix ends with a slash"
                )
            return kind
        names = (entry.url for entry in self._locations.list(url) if not entry.url.rpartition("/")[2].startswith("_"))
        kinds = Counter(format_of(name) or Format.OBJECTS for name in itertools.islice(names, _MAX_INSPECTED))
        if not kinds:
            raise InvalidArgument(f"inputs: no file is below {url}")
        if len(kinds) > 1:
            found = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
            raise InvalidArgument(f"format: below {url} are files of several formats ({found}): set the format")
        return next(iter(kinds))

    def _batch(
        self,
        request: pb.SubmitBatchRequest,
        inputs: tuple[str, ...],
        output: str,
        signature: Signature,
        inspected: InspectedInputs,
        digest: bytes,
    ) -> Batch:
        now: datetime = self._clock()
        known = {spec.name: spec.datatype for spec in signature.outputs}
        for name in request.text_outputs:
            if known.get(name) != "BYTES":
                raise InvalidArgument(f"text_outputs: {name!r} is not a requested output of datatype BYTES")
        return Batch(
            id=self._new_id(),
            inputs=inputs,
            output=output,
            format=inspected.format,
            model_name=request.model_name,
            model_version=request.model_version,
            signature=signature,
            columns=inspected.columns,
            kept=inspected.kept,
            texts=tuple(request.text_outputs),
            tenant=request.tenant,
            key=request.idempotency_key,
            digest=digest if request.idempotency_key else b"",
            labels=labels_of(request.labels),
            chunk_rows=request.chunk_rows or CHUNK_ROWS,
            max_attempts=request.max_attempts or ATTEMPTS,
            submitted_at=now,
            updated_at=now,
            free_at=now,
            steps=(BatchStep(BatchState.RUNNING, now, self._instance, "submitted"),),
        )


def check_fields(request: pb.SubmitBatchRequest) -> None:
    """Check the fields of a request that need no lookup.

    Raises:
        InvalidArgument: names the field, the expected and the actual value.
    """
    if not 1 <= len(request.inputs) <= INPUTS:
        raise InvalidArgument(f"inputs: 1 to {INPUTS} URLs, got {len(request.inputs)}")
    if not request.output:
        raise InvalidArgument("output: required, and empty: the URL of a folder or prefix for the results")
    if not request.model_name:
        raise InvalidArgument("model_name: required, and empty")
    at_most("model_name", request.model_name, MODEL_NAME_CHARS)
    at_most("model_version", request.model_version, MODEL_VERSION_CHARS)
    at_most("idempotency_key", request.idempotency_key, KEY_CHARS)
    at_most("tenant", request.tenant, TENANT_CHARS)
    labels_of(request.labels)
    if request.format not in (pb.BATCH_FORMAT_UNSPECIFIED, *_FORMATS):
        raise InvalidArgument(f"format: not a batch format: {request.format}")
    names: dict[str, Any] = {
        "columns": request.columns,
        "keep_columns": request.keep_columns,
        "outputs": request.outputs,
        "text_outputs": request.text_outputs,
    }
    for field, values in names.items():
        if len(values) > NAMES:
            raise InvalidArgument(f"{field}: at most {NAMES}, got {len(values)}")
        if len(set(values)) != len(values):
            raise InvalidArgument(f"{field}: a name occurs twice")
    for field, value, most in (
        ("chunk_rows", request.chunk_rows, MAX_CHUNK_ROWS),
        ("max_attempts", request.max_attempts, MOST_ATTEMPTS),
    ):
        if not 0 <= value <= most:
            raise InvalidArgument(f"{field}: 0 (the default) to {most}, got {value}")


def _empty_file() -> Any:
    return pa.BufferReader(b"")
