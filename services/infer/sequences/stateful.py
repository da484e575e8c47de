"""A loaded model with states and controls: its settings, checked against its file, and its initial states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import Session
from services.infer.sequences import initial_states, settings
from services.infer.sequences.settings import SequenceSettings
from services.infer.sequences.trial import TrialSession
from shoal.inference.v2 import model_config_pb2 as pb


@dataclass(frozen=True)
class Stateful:
    """Sequence settings and initial states of a session."""

    settings: SequenceSettings
    first: Mapping[str, Tensor]
    """The states that a sequence begins with."""
    max_batch_size: int

    def trial(self, session: Session) -> TrialSession:
        """Return the session as warm-up runs it."""
        return TrialSession(session, self.settings, self.first, batched=self.max_batch_size > 0)


def of(config: pb.ModelConfig, session: Session, folder: Path | None) -> Stateful:
    """Return the sequence settings of a session, checked against the model.

    Args:
        config: completed and checked; has `sequence_batching`.
        folder: the model's folder, with files of initial states.

    Raises:
        FailedPrecondition: the model, or a file, does not match the configuration.
    """
    batched = config.max_batch_size > 0
    found = settings.of(config)
    # Triton's model.py declares no inputs: the configuration is the only source.
    found = settings.matched_to_model(found, session, batched=batched, declares=not session.wants_requests)
    states = {state.input: state.datatype.name for state in found.states}
    session.declare({**states, **{control.name: control.datatype.name for control in found.controls}})
    first = initial_states.states(found, folder, batched=batched, text=session.text)
    return Stateful(found, first, config.max_batch_size)
