"""Load one model version from its files, and prove by trial runs that it works. Blocking: for a worker thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from mesh.rest.plain_json import as_json
from services.infer.loading import model_config, privileges, warmup
from services.infer.loading.model_config import Completed
from services.infer.model_files.wanted_models import ModelFiles, read_text
from services.infer.model_process.python_runtime import PythonRuntime
from services.infer.requests.signature import TensorSpec
from services.infer.runtimes import onnx_graph, onnx_settings
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.given_up import GivenUp
from services.infer.runtimes.reshape import ReshapedSession, reshapes_of
from services.infer.runtimes.runtime import About, Runtime, Session, SessionOptions
from services.infer.scheduling import rules
from services.infer.scheduling.batcher import BatchPolicy
from services.infer.scheduling.cost import CostCurve
from services.infer.sequences import stateful
from services.infer.sequences.settings import client_tensors
from services.infer.sequences.stateful import Stateful
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb

log = logging.getLogger(__name__)

# Inputs gathered for one execution: beyond this, copying rows together costs more than one execution saves.
_BATCH_BYTES = 64 << 20

LOAD_S = 600.0
"""Longest time of making a session, and of the warm-up: few loads run at a time, and one that never ends holds a place
for ever."""


@dataclass(frozen=True)
class Loaded:
    """A loaded model. Its owner closes the session."""

    model: Completed
    session: Session | None
    """None for an ensemble, whose models have sessions of their own."""
    cost: CostCurve = field(default_factory=CostCurve, kw_only=True)
    """Durations of the trial runs, by rows."""
    sequences: Stateful | None = field(default=None, kw_only=True)
    """Only for a model whose configuration has sequence_batching."""

    def batch_policy(self) -> BatchPolicy:
        """Return the limits for batches of this model."""
        batching = self.model.config.dynamic_batching
        return BatchPolicy(
            max_rows=max(self.model.signature.max_batch_size, 1),
            max_bytes=_BATCH_BYTES,
            delay_s=batching.max_queue_delay_microseconds / 1e6 if self.model.signature.max_batch_size else 0.0,
            preferred=frozenset(batching.preferred_batch_size),
            slo_s=rules.slo_s(self.model.config),
        )


def load(
    name: str,
    files: ModelFiles,
    runtimes: Runtime | Runtimes,
    *,
    version: int = 1,
    threads: int,
    clock: Callable[[], float],
    given_up: GivenUp | None = None,
    digest: str = "",
    allow_code: bool = True,
    allow_remote: bool = True,
) -> Loaded:
    """Load one version of the model `name` and warm it up.

    Args:
        threads: threads of one execution, unless the configuration sets them.
        given_up: ends the load early once it is set, where the runtime can.
        digest: identifies the content of the files.
        allow_code: False rejects a model that runs code or reads the server's files and variables.
        allow_remote: False rejects a model on another server.

    Raises:
        FailedPrecondition: the model cannot be served; the message says why, and names the setting, tensor or file.
    """
    given_up = given_up or GivenUp()
    text = files.config_text()
    config = model_config.parse(text)
    if config.name not in ("", name):
        log.warning(
            "model %(model)s: config.pbtxt calls it '%(configured)s'; it is served under the name of its folder",
            {"event": "model.name_differs", "model": name, "configured": config.name},
        )
    config.name = name
    runtime = _runtime(runtimes, config, files)
    if not allow_remote:
        privileges.check_remote(runtime)
    if not allow_code:
        privileges.check(config, runtime)
    model_config.check(config, runtime)
    labels = labels_of(config, files.folder)
    about = About(name, version, files.folder, config, model_config.instances(config), given_up, digest)
    options = replace(_options(config, threads, runtime), about=about)
    file = _model_file(config, files, runtime)
    # A model process has a limit of its own, `load_timeout_ms`.
    limited = nullcontext() if isinstance(runtime, PythonRuntime) else given_up.after(LOAD_S)
    with _reporting(given_up), limited:
        session = runtime.load(file, options)
    try:
        with _reporting(given_up), given_up.after(LOAD_S), given_up.calling(session.interrupt):
            return _warmed_up(name, session, config, text, files, file, runtime, labels, clock)
    except BaseException as err:
        session.close()
        # A future cannot carry StopIteration: its waiter would wait for ever.
        if isinstance(err, StopIteration):
            raise RuntimeError("a model's session ended an iteration that is not its own") from err
        raise


@contextmanager
def _reporting(given_up: GivenUp) -> Iterator[None]:
    """Raise FailedPrecondition with the reason when the load was given up in the block, however that ends.

    Interrupted runs fail with an error of their own, and the warm-up goes on after some that fail.
    """
    try:
        yield
    except Exception as err:
        if given_up():
            raise FailedPrecondition(given_up.reason) from err
        raise
    if given_up():
        raise FailedPrecondition(given_up.reason)


def _warmed_up(
    name: str,
    session: Session,
    config: pb.ModelConfig,
    text: str,
    files: ModelFiles,
    file: Path,
    runtime: Runtime,
    labels: Mapping[str, tuple[str, ...]],
    clock: Callable[[], float],
) -> Loaded:
    """Complete the configuration, whose text is `text`, and run the model on trial."""
    sets_max_batch_size = model_config.says_max_batch_size(text)
    config = session.completed(config, sets_max_batch_size=sets_max_batch_size)
    sets_max_batch_size = sets_max_batch_size or session.sets_max_batch_size
    model_config.check(config, runtime)
    if (reshapes := reshapes_of(as_json(config))) and not session.reshapes:
        session = ReshapedSession(session, reshapes)
    hidden = _hidden(config)
    model = model_config.complete(
        config,
        client_tensors(_inputs(session, config), hidden),
        client_tensors(session.outputs, hidden),
        runtime=runtime,
        text=session.text,
        batch_is_given=sets_max_batch_size,
        labels=labels,
        gpus=session.gpus,
    )
    if config.model_transaction_policy.decoupled:
        return Loaded(model, session)
    made_up = session.allows_trial_run
    sequences = stateful.of(model.config, session, files.folder) if config.HasField("sequence_batching") else None
    tried, cost = session if sequences is None else sequences.trial(session), CostCurve()
    dependence = _dependence(file, runtime)
    model = warmup.run(name, model, tried, files.folder, clock, made_up=made_up, cost=cost, dependence=dependence)
    if sequences is not None and model.signature.max_batch_size != sequences.max_batch_size:
        raise FailedPrecondition(
            "sequence_batching: max_batch_size could not be guessed, since rows of the model depend on each other: "
            "write it into config.pbtxt"
        )
    return Loaded(model, session, cost=cost, sequences=sequences)


def _dependence(file: Path, runtime: Runtime) -> str:
    """Return the reason why rows of a batch influence each other, as far as the model's file tells."""
    if runtime.backend != model_config.ONNX or not (operator := onnx_graph.dynamic_quantizer(file)):
        return ""
    return f"{operator} in the model takes one scale for all rows of a batch"


def _options(config: pb.ModelConfig, threads: int, runtime: Runtime) -> SessionOptions:
    if runtime.backend in (model_config.ONNX, model_config.KERNELS):
        return onnx_settings.session_options(config, threads)
    return SessionOptions(threads)


def _hidden(config: pb.ModelConfig) -> frozenset[str]:
    """Return the control and state tensors that the server fills in, without those that the configuration exposes."""
    given = config.sequence_batching
    names = {each.name for each in given.control_input}
    names |= {name for state in given.state for name in (state.input_name, state.output_name)}
    return frozenset(names - {output.name for output in config.output})


def _inputs(session: Session, config: pb.ModelConfig) -> tuple[TensorSpec, ...]:
    """Return all inputs that the model accepts."""
    inputs = (*session.inputs, *session.optional_inputs)
    if not session.handles_missing_inputs:
        return inputs
    optional = {given.name for given in config.input if given.optional}
    return tuple(replace(spec, is_optional=spec.is_optional or spec.name in optional) for spec in inputs)


def _runtime(runtimes: Runtime | Runtimes, config: pb.ModelConfig, files: ModelFiles) -> Runtime:
    return runtimes.of(config, files.version_folder, files.bare_file) if isinstance(runtimes, Runtimes) else runtimes


def _model_file(config: pb.ModelConfig, files: ModelFiles, runtime: Runtime) -> Path:
    if not runtime.model_file:
        return files.version_folder
    name = files.bare_file or config.default_model_filename or runtime.model_file
    file = files.version_folder / name
    if not file.is_file():
        raise FailedPrecondition(f"version folder {files.version_folder.name} has no file {name}")
    return file


def labels_of(config: pb.ModelConfig, folder: Path | None) -> Mapping[str, tuple[str, ...]]:
    """Return class names by output. Raises FailedPrecondition when a label file cannot be read."""
    labels = {}
    for output in config.output:
        if not output.label_filename:
            continue
        name = output.label_filename
        if folder is None or Path(name).name != name:
            raise FailedPrecondition(
                f"output '{output.name}': label_filename '{name}': expected a file beside the config"
            )
        labels[output.name] = tuple(line.strip() for line in read_text(folder / name).rstrip("\n").split("\n"))
    return labels
