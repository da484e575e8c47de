"""Settings of a configuration's `sequence_batching`: controls, states, and how sequences share the model.

Format: Triton's `model_config.proto`, ModelSequenceBatching. Module `checks` validates it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.infer.requests.signature import TensorSpec
from services.infer.runtimes.runtime import Session
from services.infer.scheduling.batcher import BatchPolicy
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb
from shoal.oip.datatypes import BY_NAME, BY_NUMBER, Datatype
from shoal.oip.tensors import shape_text

_Batching = pb.ModelSequenceBatching
START, END, READY, CORRID = (
    _Batching.Control.CONTROL_SEQUENCE_START,
    _Batching.Control.CONTROL_SEQUENCE_END,
    _Batching.Control.CONTROL_SEQUENCE_READY,
    _Batching.Control.CONTROL_SEQUENCE_CORRID,
)

DEFAULT_IDLE_US = 1_000_000
"""Triton's default: a sequence without a step for a second is over."""

FALSE_TRUE = {"int32_false_true": "INT32", "fp32_false_true": "FP32", "bool_false_true": "BOOL"}
"""Field of a control's two values, and the datatype of its tensor."""


@dataclass(frozen=True)
class Control:
    """An input that the server fills in."""

    name: str
    kind: int
    """START, END, READY or CORRID."""
    datatype: Datatype
    no: float = 0
    yes: float = 1
    """Values for true and false; unused for CORRID."""
    is_flat: bool = False
    """True: the model takes one value for each row, without a dimension of its own."""


@dataclass(frozen=True)
class State:
    """A state: an output of a step that is an input of the next one."""

    input: str
    output: str
    datatype: Datatype
    dims: tuple[int, ...]
    """Without the batch dimension; -1 where it varies."""
    initial_dims: tuple[int, ...]
    """Dimensions for the first step, without -1."""
    file: str = ""
    """File with the first step's data, in the folder `initial_state` of the model; empty: zeros."""


@dataclass(frozen=True)
class SequenceSettings:
    """Sequence settings of one model."""

    controls: tuple[Control, ...]
    states: tuple[State, ...]
    is_direct: bool
    """True: a sequence keeps its row of the batch; False: the oldest steps are batched, of any sequence."""
    slots: int
    """Sequences at a time in one instance."""
    policy: BatchPolicy
    """Batching of steps; with `direct`, only its delay counts."""
    utilization: float = 0.0
    """`direct`: the part of the rows that is enough to run without waiting."""
    preserves_order: bool = False
    """True: outcomes are delivered in order of arrival."""
    idle_s: float = DEFAULT_IDLE_US / 1e6

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the model's inputs that no client sends."""
        return frozenset((*(control.name for control in self.controls), *(state.input for state in self.states)))

    @property
    def outputs(self) -> frozenset[str]:
        """Names of the outputs that are states for the next step."""
        return frozenset(state.output for state in self.states)


def of(config: pb.ModelConfig) -> SequenceSettings:
    """Return the settings of a configuration with `sequence_batching` and without findings of `checks.wrong`."""
    given, rows = config.sequence_batching, max(config.max_batch_size, 1)
    oldest, direct = given.oldest, given.direct
    is_direct = given.WhichOneof("strategy_choice") != "oldest"
    delay_us = direct.max_queue_delay_microseconds if is_direct else oldest.max_queue_delay_microseconds
    return SequenceSettings(
        controls=tuple(_control(each.name, each.control[0]) for each in given.control_input),
        states=tuple(_state(each) for each in given.state),
        is_direct=is_direct,
        slots=rows if is_direct else oldest.max_candidate_sequences,
        policy=BatchPolicy(rows, 1 << 62, delay_us / 1e6, frozenset(oldest.preferred_batch_size)),
        utilization=direct.minimum_slot_utilization,
        preserves_order=oldest.preserve_ordering,
        idle_s=(given.max_sequence_idle_microseconds or DEFAULT_IDLE_US) / 1e6,
    )


def _control(name: str, given: pb.ModelSequenceBatching.Control) -> Control:
    if given.kind == CORRID:
        return Control(name, given.kind, BY_NUMBER[given.data_type])
    field = next(field for field in FALSE_TRUE if getattr(given, field))
    no, yes = getattr(given, field)
    return Control(name, given.kind, BY_NAME[FALSE_TRUE[field]], no, yes)


def _state(given: pb.ModelSequenceBatching.State) -> State:
    initial = given.initial_state[0] if given.initial_state else None
    dims = initial.dims if initial is not None else given.dims
    return State(
        given.input_name,
        given.output_name,
        BY_NUMBER[given.data_type],
        tuple(given.dims),
        tuple(1 if dim == -1 else dim for dim in dims),  # As in Triton, where no size is given.
        initial.data_file if initial is not None else "",
    )


def matched_to_model(
    settings: SequenceSettings, session: Session, *, batched: bool, declares: bool
) -> SequenceSettings:
    """Return the settings, matched to the inputs and outputs of the model's file.

    Args:
        declares: True when the model itself declares its inputs and outputs.

    Raises:
        FailedPrecondition: the model lacks a configured control or state.
    """
    if not declares:
        return settings
    known = {spec.name: spec for spec in (*session.inputs, *session.optional_inputs)}
    outputs = {spec.name: spec for spec in session.outputs}
    controls = []
    for control in settings.controls:
        spec = _checked("control_input", control.name, control.datatype, known)
        inner = spec.shape[1 if batched else 0 :]
        if len(inner) > 1 or not set(inner) <= {1, -1}:
            raise FailedPrecondition(
                f"sequence_batching: control_input '{control.name}' has one value for each request, "
                f"the model expects {shape_text(spec.shape)}"
            )
        # The runtime reports () for a scalar, and for a tensor without a shape in the file.
        controls.append(Control(*_fields(control), is_flat=bool(spec.shape) and not inner))
    for state in settings.states:
        for role, name, specs in (("input_name", state.input, known), ("output_name", state.output, outputs)):
            spec = _checked(f"state {role}", name, state.datatype, specs)
            _check_dims(f"state {role} '{name}'", state.dims, spec.shape, batched=batched)
    return SequenceSettings(**{**vars(settings), "controls": tuple(controls)})


def _fields(control: Control) -> tuple[str, int, Datatype, float, float]:
    return control.name, control.kind, control.datatype, control.no, control.yes


def _checked(what: str, name: str, datatype: Datatype, specs: dict[str, TensorSpec]) -> TensorSpec:
    spec = specs.get(name)
    if spec is None:
        known = ", ".join(f"'{each}'" for each in specs)
        raise FailedPrecondition(f"sequence_batching: the model has no {what} '{name}': it has {known}")
    if spec.datatype != datatype:
        raise FailedPrecondition(
            f"sequence_batching: {what} '{name}' is {datatype.name} in the configuration, "
            f"{spec.datatype.name} in the model"
        )
    return spec


def _check_dims(what: str, dims: Sequence[int], shape: Sequence[int], *, batched: bool) -> None:
    expected = ((-1,) if batched else ()) + tuple(dims)
    # Either may leave a dimension open.
    agree = len(expected) == len(shape) and all(a == b or -1 in (a, b) for a, b in zip(expected, shape, strict=True))
    if shape and not agree:
        batch = " with a batch dimension" if batched else ""
        raise FailedPrecondition(
            f"sequence_batching: {what}: the configuration says {shape_text(dims)}{batch}, "
            f"the model {shape_text(shape)}"
        )


def client_tensors(specs: Iterable[TensorSpec], hidden: frozenset[str]) -> tuple[TensorSpec, ...]:
    """Return the tensors of a model that clients send or receive."""
    return tuple(spec for spec in specs if spec.name not in hidden)
