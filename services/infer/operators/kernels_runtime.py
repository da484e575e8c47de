"""Operations (`services/infer/operations`), as a `Runtime`: models without a model file.

    backend: "kernels"
    parameters { key: "operation" value { string_value: "decode_image" } }

The rest of the parameters are the operation's own. The version's folder holds what the operation reads (a tokenizer,
labels), or nothing. Inputs and outputs are the operation's: a configuration that says others is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from services.infer.error_text import listed, quoted, written
from services.infer.loading.model_config import KERNELS
from services.infer.operators import devices
from services.infer.operators.assets import Assets
from services.infer.operators.operation import Operation, Results, Setting
from services.infer.operators.parameters import OPERATION, read
from services.infer.operators.table import OPERATIONS, Entry
from services.infer.operators.threads import RowThreads
from services.infer.requests import ragged
from services.infer.requests.ragged import Value
from services.infer.requests.resident import fetched
from services.infer.requests.tensors import Tensor
from services.infer.runtimes.gpu_stream import GpuStreams
from services.infer.runtimes.parameters import texts
from services.infer.runtimes.runtime import About, ModelFailed, RowResults, Session, SessionOptions
from shoal.errors import FailedPrecondition, InvalidArgument
from shoal.inference.v2 import model_config_pb2 as pb


class KernelsRuntime:
    """Makes sessions of operations."""

    platform = KERNELS
    backend = KERNELS
    model_file = ""
    can_decouple = False

    def __init__(self, operations: Mapping[str, Entry] = OPERATIONS, lanes: GpuStreams | None = None) -> None:
        """`operations` are those that there are, by name; `lanes` those of the GPUs."""
        self._operations = operations
        self._lanes = lanes or GpuStreams()

    def load(self, file: Path, options: SessionOptions) -> OperationSession:
        """`file` is the version's folder."""
        about = options.about or About(file.parent.name)
        given = texts(about.config)
        name = given.get(OPERATION, "").strip()
        entry = self._operations.get(name)
        if entry is None:
            said = f"operation {quoted(name)} is unknown" if name else f"parameter '{OPERATION}' is missing"
            raise FailedPrecondition(f"{said}: there are {listed(sorted(self._operations))}")
        parameters = read(entry.parameters, name, given)
        place = _place(options, name, self._lanes, has_gpu=entry.has_gpu)
        threads = RowThreads(options.intra_op_threads, f"{about.name}-rows")
        try:
            assets = Assets([file, about.folder or file.parent])
            with place.computing():
                operation = entry.make(parameters, Setting(assets, threads, place))
            return OperationSession(name, operation, threads, place, entry.batch_size)
        except BaseException:
            threads.close()
            raise


class OperationSession(Session):
    """One operation with its parameters."""

    text = False
    takes_rows = True
    allows_trial_run = False
    """It was, with an example of its own: made-up bytes are no image."""
    sets_max_batch_size = True

    def __init__(
        self, name: str, operation: Operation, threads: RowThreads, place: devices.DeviceSlot, batch_size: int
    ) -> None:
        """Closes the threads. Raises FailedPrecondition when the operation fails with its own example."""
        self._name, self._operation, self._threads, self._place = name, operation, threads, place
        self._batch_size = batch_size
        self.inputs, self.outputs = operation.inputs, operation.outputs
        self.only_computes = operation.only_computes and place.lane is None
        self.gpu_stream = place.lane
        self.gpus = place.gpus
        self._inputs = {spec.name: spec for spec in self.inputs}
        self._outputs = {spec.name: spec for spec in self.outputs}
        for example in (operation.example(), _read_only(operation.example())):  # Both compile what they need.
            if unfit := self._run(example).unfit:
                raise FailedPrecondition(f"operation {name} fails with an example of its own: {unfit[0]}")

    def completed(self, config: pb.ModelConfig, *, sets_max_batch_size: bool) -> pb.ModelConfig:
        """The configuration with the batch size that the operation wants where it says none.

        What is said of outputs is held against the operation here: nothing is made up to try it with.

        Raises:
            FailedPrecondition: it says one that the operation cannot do.
        """
        self._check_promises(config)
        done = pb.ModelConfig()
        done.CopyFrom(config)
        if not self._operation.is_batched:
            if config.max_batch_size:
                raise FailedPrecondition(
                    f"max_batch_size {config.max_batch_size}: operation {self._name} gives another number of rows than "
                    "it is given, so calls are not put together: set 0, or leave it out"
                )
        elif not config.max_batch_size:
            done.max_batch_size = self._batch_size
        return done

    def _check_promises(self, config: pb.ModelConfig) -> None:
        for output in config.output:
            spec = self._outputs.get(output.name)
            own = spec.shape[1 if self._operation.is_batched else 0 :] if spec is not None else ()
            if any(have == -1 and said != -1 for have, said in zip(own, output.dims, strict=False)):
                raise FailedPrecondition(
                    f"output '{output.name}': the configuration promises {written(output.dims)}, operation "
                    f"{self._name} gives {written(own)}: write -1 where it varies"
                )

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        given = {name: ragged.rows(array) if self._inputs[name].is_ragged else array for name, array in inputs.items()}
        results = self.run_rows(given, outputs)
        if results.unfit:
            raise ModelFailed(next(iter(results.unfit.values())))
        try:
            named = zip(outputs, results.values, strict=True)
            return [ragged.dense(value, self._outputs[name], "output") for name, value in named]
        except InvalidArgument as err:
            raise ModelFailed(err.message) from err

    def run_rows(self, inputs: Mapping[str, Value], outputs: Sequence[str], stay: Collection[str] = ()) -> RowResults:
        results = self._run(inputs)
        found = [results.values[name] for name in outputs]
        if self.gpu_stream is not None:
            read = iter(fetched([value for name, value in zip(outputs, found, strict=True) if name not in stay]))
            found = [value if name in stay else next(read) for name, value in zip(outputs, found, strict=True)]
            # What an execution takes is what it took: queues count on it.
            self.gpu_stream.wait()
        return RowResults(found, results.unfit)

    def _run(self, inputs: Mapping[str, Value]) -> Results:
        with self._place.computing():
            return self._operation.run(inputs)

    def close(self) -> None:
        self._threads.close()


def _read_only(inputs: Mapping[str, Value]) -> Mapping[str, Value]:
    """The same as they come in a request: numba has other machine code for arrays that may not be written."""
    for value in inputs.values():
        for array in ragged.arrays(value):
            array.flags.writeable = False
    return inputs


def _place(options: SessionOptions, name: str, lanes: GpuStreams, *, has_gpu: bool) -> devices.DeviceSlot:
    """The host, or the one GPU that the configuration asks for."""
    asked = [place for place in options.placements if place.kind == "gpu"]
    if not asked:
        return devices.Host()
    if not has_gpu:
        raise FailedPrecondition(f"instance_group: operation {name} has no version for GPUs: use KIND_CPU")
    number = asked[0].gpu or 0
    try:
        lane = lanes.of(number)
    except FailedPrecondition as err:
        raise FailedPrecondition(f"instance_group: KIND_GPU: {err.message}") from err
    if len(options.placements) > 1 or (asked[0].gpu is None and lanes.count() > 1):
        raise FailedPrecondition(f"instance_group: operation {name} runs in one place: name one GPU, gpus: [ 0 ]")
    return devices.Gpu(lane)
