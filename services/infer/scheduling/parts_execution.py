"""An Execution of a session on a GPU, which takes the tensors of all calls as they are and puts them together itself.

tensors of each call ──run_parts: written once, into pinned memory, or joined on the GPU──> outputs ──slices──> answers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.execution import Execution, gpu_resident_outputs


class PartsExecution(Execution):
    """Runs batches of a session that has a lane, and takes no rows."""

    def _gathered(self, calls: Sequence[InferenceRequest]) -> tuple[Mapping[str, Any], int]:
        parts = {name: [call.tensors[name] for call in calls] for name in calls[0].inputs}
        return parts, sum([call.rows for call in calls])

    def _ran(self, like: InferenceRequest, inputs: Mapping[str, Any], names: Sequence[str]) -> Sequence[Any]:
        return self._session.run_parts(inputs, names, gpu_resident_outputs(like))
