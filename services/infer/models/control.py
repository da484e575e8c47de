"""Model control: the operator's commands (load, unload, override) take precedence over the source of models.

    source (a folder, the store) ──offer──┐
                                          ├──> models.want
    operator ──load, unload, overrides ───┘

Without a command, all offered models are served; in explicit mode, only the models named at the start, and only then
are commands accepted from callers. A command holds until the next one, or until the source no longer offers the model;
no command outlives the process.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from weakref import WeakValueDictionary

from mesh.process.tasks import end
from services.infer.error_text import quoted
from services.infer.loading.privileges import HOW_TO_ALLOW
from services.infer.model_files.wanted_models import WantedModel
from services.infer.models import override
from services.infer.models.model import Model
from services.infer.models.models import Models
from services.infer.models.override import Given, Override
from shoal.errors import Aborted, FailedPrecondition, Internal, InvalidArgument, ShoalError
from shoal.inference.v2 import inference_pb2 as pb

log = logging.getLogger(__name__)

ALL = "*"
"""Stands for every model that exists at the start."""

# Longest wait of an unload for the requests that use the model. Afterwards the unload goes on in the background, and
# the index shows its state.
_UNLOAD_S = 5.0

# Longest wait of a load for the ensembles that need the model.
_FOLLOWED_S = 5.0

Look = Callable[[str], WantedModel | None]
"""Reads one model from the source now. Blocking; raises nothing."""


@dataclass(eq=False)
class Command:
    """Last command of an operator for one model."""

    is_served: bool
    override: Override | None = None
    beside: frozenset[int] = frozenset()
    """Versions that served before the command: they go on until one of the desired versions is ready."""
    number: int = field(default_factory=count().__next__)
    """Grows with each command."""


class Control:
    """Applies commands and offers to `models`. Use as `async with` inside that of `models`; leaving ends pending loads.

    Args:
        look: reads the source before a load; None when the source reports every change by itself.
        initially: models that are served without a command; None: all of them.
        allow_requests: False makes `check_allowed` fail.
        allow_files: False rejects loads whose parameters hold files.
        folder: folder for the files of overrides; None: the machine's temporary folder.
    """

    def __init__(
        self,
        models: Models,
        look: Look | None = None,
        *,
        initially: Collection[str] | None = None,
        allow_requests: bool = True,
        allow_files: bool = True,
        folder: Path | None = None,
    ) -> None:
        self._models = models
        self._look = look
        self._initially = initially
        self._allow_requests = allow_requests
        self._allow_files = allow_files
        self._folder = folder or Path(tempfile.gettempdir())
        self._offered: dict[str, WantedModel] = {}
        self._commands: dict[str, Command] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._loads: set[asyncio.Task[None]] = set()
        models.on_need = self.need

    async def __aenter__(self) -> Control:
        await asyncio.to_thread(override.sweep, self._folder)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await end(*self._loads)
        for command in self._commands.values():
            _release(command)

    def offer(self, models: Sequence[WantedModel]) -> None:
        """Replace the models that the source offers. Returns immediately."""
        self._offered = {model.name: model for model in models}
        for name, command in list(self._commands.items()):
            if name not in self._offered and (command.override is None or command.override.model is None):
                _release(self._commands.pop(name))
        names = [*self._offered, *(name for name in self._commands if name not in self._offered)]
        missing = [name for name in self._initially or () if name != ALL and name not in names]
        self._models.want([*map(self._wanted, names), *map(_missing, missing)])

    async def need(self, name: str, by: str) -> None:
        """Serve a model that the ensemble `by` needs, unless it was unloaded after `by` was loaded."""
        command, asker = self._commands.get(name), self._commands.get(by)
        if command is None:
            if name in self._offered and self._is_initial(name):
                return
        elif command.is_served or asker is None or not asker.is_served or asker.number < command.number:
            return
        if await self._looked(name) is not None and self._commands.get(name) is command:
            self._commands[name] = Command(is_served=True)
            self._models.want_one(self._wanted(name))

    def check_allowed(self) -> None:
        """Check that callers may load and unload models. Raises FailedPrecondition otherwise."""
        if not self._allow_requests:
            raise FailedPrecondition(
                "explicit model load / unload is not allowed: start the server with --model-control explicit "
                "(shoal serve, shoal up), or SHOAL_INFER_MODEL_CONTROL=explicit"
            )

    async def load(self, asked: pb.RepositoryModelLoadRequest) -> None:
        """Serve a model as the source has it now, or as the request's parameters override it.

        Serving versions go on until all new ones are ready; when the load fails, they stay. A client that disconnects
        does not stop the load.

        Raises:
            FailedPrecondition: the request has files, and they are not allowed.
            InvalidArgument: an unknown parameter, or a version of the model cannot be served.
            Internal: no such model exists, or the files given in its place are not a model.
            Aborted: another command for the same model arrived meanwhile.
        """
        if not self._allow_files and override.has_files(asked.parameters):
            raise FailedPrecondition(
                f"a load with files brings code, and other machines can reach this server: {HOW_TO_ALLOW}"
            )
        try:
            given = override.read(asked.parameters)
        except FailedPrecondition as err:
            raise _not_there(asked.model_name, err.message) from err
        task = asyncio.create_task(self._load(asked.model_name, given), name="load")
        self._loads.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    async def unload(
        self, asked: pb.RepositoryModelUnloadRequest, check: Callable[[str], None] = lambda model: None
    ) -> None:
        """Stop serving the model until it is loaded again. An unknown model counts as unloaded.

        Requests that use the model finish; the call waits for them up to `_UNLOAD_S` seconds.

        Args:
            check: raises for a model that the caller may not unload. It is called for the models that an ensemble
                needs, before one of them is unloaded.

        Raises:
            InvalidArgument: an unknown parameter.
        """
        with_dependents = _with_dependents(asked)
        if not self._models.knows(asked.model_name):
            return
        needed = self._made_of(asked.model_name) if with_dependents else []
        for name in needed:
            check(name)
        models = [self._unwanted(name) for name in [asked.model_name, *needed]]
        try:
            async with asyncio.timeout(_UNLOAD_S):
                for model in models:
                    await model.is_settled.wait()
                    await model.left()
                    await self._models.followed(model.wanted.name)
        except TimeoutError:
            log.info(
                "model %(model)s: still in use; it is unloaded after its last call",
                {"event": "model.unload_waits", "model": asked.model_name},
            )

    def _unwanted(self, name: str) -> Model:
        replaced, self._commands[name] = self._commands.get(name), Command(is_served=False)
        _release(replaced)
        return self._models.want_one(self._wanted(name))

    def _made_of(self, name: str) -> list[str]:
        """Return the models that an ensemble needs, directly and through other ensembles."""
        found: dict[str, None] = {}
        left = [name]
        while left:
            for other in sorted(self._models.needs(left.pop())):
                if other != name and other not in found and self._models.knows(other):
                    found[other] = None
                    left.append(other)
        return list(found)

    async def _load(self, name: str, given: Given | None) -> None:
        async with self._locks.setdefault(name, asyncio.Lock()):
            base = await self._looked(name)
            if base is None and (given is None or not given.files):
                raise _not_there(name, "the repository has no such model")
            kept = await self._kept(name, given)
            serving = frozenset(version.number for version in self._models.versions(name))
            before, command = self._commands.get(name), Command(is_served=True, override=kept, beside=serving)
            self._commands[name] = command
            try:
                await self._attempt(name, command, before)
            finally:
                for said in (before, command):
                    if self._commands.get(name) is not said:
                        _release(said)

    async def _attempt(self, name: str, command: Command, before: Command | None) -> None:
        model = self._models.want_one(self._wanted(name), again=True)
        await model.is_settled.wait()
        if self._commands.get(name) is not command:
            raise Aborted(f"load of model '{name}': it was unloaded meanwhile, or loaded otherwise")
        if not (failure := model.failure()):
            command.beside = frozenset()
            # Ensembles with this model as a step serve again, too. They may wait for other models.
            with suppress(TimeoutError):
                async with asyncio.timeout(_FOLLOWED_S):
                    await self._models.followed(name)
            return
        # An override holds for this load only. Without one, the source's own model has failed.
        if command.override is not None:
            self._put(name, before)
            self._models.want_one(self._wanted(name))
        raise InvalidArgument(f"load failed for model '{name}': {failure}")

    async def _looked(self, name: str) -> WantedModel | None:
        if self._look is not None and (found := await asyncio.to_thread(self._look, name)) is not None:
            self._offered[name] = found
            return found
        return self._offered.get(name) if self._look is None else None

    async def _kept(self, name: str, given: Given | None) -> Override | None:
        if given is None:
            return None
        try:
            return await asyncio.to_thread(override.keep, name, given, self._folder)
        except FailedPrecondition as err:
            raise _not_there(name, err.message) from err
        except OSError as err:
            raise _not_there(name, f"its files cannot be kept: {err.strerror or err}") from err

    def _put(self, name: str, command: Command | None) -> None:
        if command is None:
            self._commands.pop(name, None)
        else:
            self._commands[name] = command

    def _wanted(self, name: str) -> WantedModel:
        command, base = self._commands.get(name), self._offered.get(name)
        is_served = command.is_served if command is not None else base is None or self._is_initial(name)
        if not is_served:
            return WantedModel(name, (), is_unloaded=True)
        wanted = command.override.over(base) if command is not None and command.override is not None else base
        if wanted is None:
            return WantedModel(name, ())
        return wanted if command is None else replace(wanted, available=wanted.available | command.beside)

    def _is_initial(self, name: str) -> bool:
        return self._initially is None or ALL in self._initially or name in self._initially

    def _ended(self, load: asyncio.Task[None]) -> None:
        self._loads.discard(load)
        if not load.cancelled() and isinstance(error := load.exception(), ShoalError):
            # The client may have disconnected.
            log.warning("%(error)s", {"event": "model.load_without_client_failed", "error": error.message})


def _with_dependents(asked: pb.RepositoryModelUnloadRequest) -> bool:
    for key, value in asked.parameters.items():
        if key != "unload_dependents":
            raise InvalidArgument(f"unrecognized unload parameter {quoted(key)}: expected 'unload_dependents'")
        if value.WhichOneof("parameter_choice") != "bool_param":
            raise InvalidArgument("invalid value type for 'unload_dependents' parameter, expected bool_param.")
    return asked.parameters["unload_dependents"].bool_param if asked.parameters else False


def _release(command: Command | None) -> None:
    if command is not None and command.override is not None:
        command.override.release()


def _missing(name: str) -> WantedModel:
    return WantedModel(name, (), problem="the repository has no such model")


def _not_there(name: str, why: str) -> Internal:
    return Internal(f"failed to load {quoted(name)}, failed to poll from model repository: {why}")
