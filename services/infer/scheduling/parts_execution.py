"""Execution of a session on a GPU that stacks the tensors of the requests itself.

tensors of each request ──run_parts: written once, to pinned memory, or joined on the GPU──> outputs ──slices──> results
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.execution import Execution, gpu_resident_outputs


class PartsExecution(Execution):
    """Runs batches of a session with `run_parts`, on one GPU stream."""

    def _gather(self, requests: Sequence[InferenceRequest]) -> tuple[Mapping[str, Any], int]:
        parts = {name: [request.tensors[name] for request in requests] for name in requests[0].inputs}
        return parts, sum([request.rows for request in requests])

    def _run_session(self, like: InferenceRequest, inputs: Mapping[str, Any], names: Sequence[str]) -> Sequence[Any]:
        return self._session.run_parts(inputs, names, gpu_resident_outputs(like))
