"""Checks of a configuration's `sequence_batching`; each finding names the setting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from services.infer.error_text import enumerated, listed
from services.infer.requests.signature import fits
from services.infer.scheduling import rules
from services.infer.sequences.settings import CORRID, FALSE_TRUE
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.datatypes import BY_NUMBER
from shoal.oip.tensors import shape_text

_MOST_CANDIDATES = 1 << 16
_CORRID_TYPES = (pb.TYPE_UINT64, pb.TYPE_INT64, pb.TYPE_UINT32, pb.TYPE_INT32, pb.TYPE_STRING)
_UNSUPPORTED = (rules.SLO, rules.AGING)
# Parameters of queues that sequences do not have.
_Batching = pb.ModelSequenceBatching


def wrong(config: pb.ModelConfig) -> Iterator[str]:
    """Yield every setting that is unsupported or invalid."""
    if not config.HasField("sequence_batching"):
        return
    given = config.sequence_batching
    if config.model_transaction_policy.decoupled:
        yield "sequence_batching of a decoupled model is not supported"
    if "isolation" in config.parameters and config.parameters["isolation"].string_value == "shared":
        yield "sequence_batching with parameter isolation 'shared' is not supported: use 'process'"
    if given.iterative_sequence:
        yield (
            "sequence_batching.iterative_sequence (generative sequences, whose requests are scheduled again) "
            "is not supported"
        )
    for name in _UNSUPPORTED:
        if name in config.parameters:
            yield f"parameter {name} does nothing beside sequence_batching: leave it out"
    yield from _strategy(config)
    yield from _controls(config)
    for state in given.state:
        yield from (f"sequence_batching.state '{state.input_name}': {what}" for what in _state(state))
    yield from _names(config)


def _strategy(config: pb.ModelConfig) -> Iterator[str]:
    given = config.sequence_batching
    match given.WhichOneof("strategy_choice"):
        case "oldest":
            most = given.oldest.max_candidate_sequences
            if not 1 <= most <= _MOST_CANDIDATES:
                yield f"sequence_batching.oldest.max_candidate_sequences {most}: expected 1 to {_MOST_CANDIDATES}"
            for size in given.oldest.preferred_batch_size:
                if not 1 <= size <= max(config.max_batch_size, 1):
                    yield (
                        f"sequence_batching.oldest.preferred_batch_size {size}: expected 1 to max_batch_size, "
                        f"{config.max_batch_size}"
                    )
        case "direct" if not 0 <= given.direct.minimum_slot_utilization <= 1:
            value = given.direct.minimum_slot_utilization
            yield f"sequence_batching.direct.minimum_slot_utilization {value}: expected 0 to 1"


def _controls(config: pb.ModelConfig) -> Iterator[str]:
    seen: set[int] = set()
    for given in config.sequence_batching.control_input:
        where = f"sequence_batching.control_input '{given.name}'"
        if len(given.control) != 1:
            yield f"{where}: expected one control, got {len(given.control)}"
            continue
        (control,) = given.control
        kind = enumerated(_Batching.Control.Kind.DESCRIPTOR, control.kind)
        if control.kind in seen:
            yield f"sequence_batching specifies {kind} more than once"
        seen.add(control.kind)
        yield from (f"{where}: {what}" for what in _control(control, kind))


def _control(given: pb.ModelSequenceBatching.Control, kind: str) -> Iterator[str]:
    values = [field for field in FALSE_TRUE if getattr(given, field)]
    if given.kind == CORRID:
        if values:
            yield f"{kind} has a data_type, and no {values[0]}"
        if given.data_type not in _CORRID_TYPES:
            names = ", ".join(enumerated(pb.DataType.DESCRIPTOR, each) for each in _CORRID_TYPES)
            yield f"{kind}: data_type {enumerated(pb.DataType.DESCRIPTOR, given.data_type)}: expected one of {names}"
        return
    if len(values) != 1:
        yield f"{kind}: expected one of {', '.join(FALSE_TRUE)}, got {' and '.join(values) or 'none'}"
    for field in values:
        if len(getattr(given, field)) != 2:
            yield f"{kind}: {field}: expected two values, got {len(getattr(given, field))}"
    if given.data_type:
        yield f"{kind}: data_type is for CONTROL_SEQUENCE_CORRID only"


def _state(given: pb.ModelSequenceBatching.State) -> Iterator[str]:
    if given.use_growable_memory:
        yield "use_growable_memory is not supported"
    if given.data_type not in BY_NUMBER:
        yield "data_type is missing"
    if any(dim < -1 or dim == 0 for dim in given.dims):
        yield f"dims {shape_text(given.dims)}: expected 1 or more, or -1 for any"
    if len(given.initial_state) > 1:
        yield f"expected one initial_state, got {len(given.initial_state)}"
    for initial in given.initial_state:
        yield from (f"initial_state: {what}" for what in _initial(initial, given))


def _initial(initial: pb.ModelSequenceBatching.InitialState, state: pb.ModelSequenceBatching.State) -> Iterator[str]:
    if initial.data_type != state.data_type:
        got, expected = (enumerated(pb.DataType.DESCRIPTOR, each.data_type) for each in (initial, state))
        yield f"data_type {got}: the state is {expected}"
    if any(dim < 1 for dim in initial.dims) or not fits(initial.dims, state.dims):
        yield f"dims {shape_text(initial.dims)}: expected dims of the state, {shape_text(state.dims)}, each 1 or more"
    match initial.WhichOneof("state_data"):
        case None:
            yield "expected zero_data or data_file"
        case "data_file" if Path(initial.data_file).name != initial.data_file or initial.data_file in ("", ".", ".."):
            yield f"data_file '{initial.data_file}': expected a name without folders, of a file in initial_state/"


def _names(config: pb.ModelConfig) -> Iterator[str]:
    given = config.sequence_batching
    inputs = [each.name for each in given.control_input] + [state.input_name for state in given.state]
    outputs = [state.output_name for state in given.state]
    if "" in inputs or "" in outputs:
        yield "sequence_batching: every control_input and state has a name"
    inputs += [each.name for each in config.input]
    if twice := sorted({name for name in inputs if name and inputs.count(name) > 1}):
        yield f"sequence_batching: {listed(twice)} is the name of more than one input, control_input or state"
    if twice := sorted({name for name in outputs if name and outputs.count(name) > 1}):
        yield f"sequence_batching: {listed(twice)} is the output_name of more than one state"
