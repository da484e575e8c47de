"""Which models are served, and in which form: the operator's word over what the source of models offers.

    source (a folder, the store) ──offer──┐
                                          ├──> models.want
    operator ──load, unload, overrides ───┘

Without a word, what is offered is served; or, in explicit mode, nothing but the models named at the start. A word
holds until the next one, or until the source offers the model no more; no word outlives the process.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from weakref import WeakValueDictionary

from mesh.process.tasks import end
from services.infer.error_text import quoted
from services.infer.model_files.wanted_models import WantedModel
from services.infer.models import override
from services.infer.models.model import Model
from services.infer.models.models import Models
from services.infer.models.override import Given, Override
from shoal.errors import Aborted, FailedPrecondition, Internal, InvalidArgument, ShoalError
from shoal.inference.v2 import inference_pb2 as pb

log = logging.getLogger(__name__)

ALL = "*"
"""Names every model that there is at the start."""

_UNLOAD_S = 5.0
# An unload waits so long for the calls that hold the model. After that it goes on by itself, and the index tells.

Look = Callable[[str], WantedModel | None]
"""What the source has of one model at this moment. Blocking; raises nothing."""


@dataclass(eq=False)
class Word:
    """What an operator said of one model."""

    is_served: bool
    override: Override | None = None
    beside: frozenset[int] = frozenset()
    """Versions that served when it was said: they go on until one of those that are wanted now is ready."""
    number: int = field(default_factory=count().__next__)
    """A later word has a higher one."""


class Control:
    """Use as `async with`, within that of its `models`: leaving ends the loads under way.

    Args:
        look: asks the source again before a load; None: the source tells of every change by itself.
        initially: the models that are served before anybody loads any; None: all of them.
        folder: where the files of overrides are kept; None: with the temporary files of this machine.
    """

    def __init__(
        self,
        models: Models,
        look: Look | None = None,
        *,
        initially: Collection[str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._models = models
        self._look = look
        self._initially = initially
        self._folder = folder or Path(tempfile.gettempdir())
        self._offered: dict[str, WantedModel] = {}
        self._words: dict[str, Word] = {}
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
        for word in self._words.values():
            _release(word)

    def offer(self, models: Sequence[WantedModel]) -> None:
        """What the source has, all of it. Returns at once."""
        self._offered = {model.name: model for model in models}
        for name, word in list(self._words.items()):
            if name not in self._offered and (word.override is None or word.override.model is None):
                _release(self._words.pop(name))
        names = [*self._offered, *(name for name in self._words if name not in self._offered)]
        missing = [name for name in self._initially or () if name != ALL and name not in names]
        self._models.want([*map(self._wanted, names), *map(_missing, missing)])

    async def need(self, name: str, by: str) -> None:
        """Serves a model because the ensemble `by` is made of it; not one that was unloaded after `by` was loaded."""
        word, asker = self._words.get(name), self._words.get(by)
        if word is None:
            if name in self._offered and self._is_initial(name):
                return
        elif word.is_served or asker is None or not asker.is_served or asker.number < word.number:
            return
        if await self._looked(name) is not None and self._words.get(name) is word:
            self._words[name] = Word(is_served=True)
            self._models.want_one(self._wanted(name))

    async def load(self, asked: pb.RepositoryModelLoadRequest) -> None:
        """Serves a model as the source has it now, or as the call's parameters override that. What serves already
        goes on until all of the new is ready; when that fails, it stays. Who goes away does not stop it.

        Raises:
            InvalidArgument: a parameter is none of ours; or a version of the model cannot be served.
            Internal: there is no such model, or what was given in its place is none.
            Aborted: meanwhile another word was said of the same model.
        """
        try:
            given = override.read(asked.parameters)
        except FailedPrecondition as err:
            raise _not_there(asked.model_name, err.message) from err
        task = asyncio.create_task(self._load(asked.model_name, given), name="load")
        self._loads.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    async def unload(self, asked: pb.RepositoryModelUnloadRequest) -> None:
        """Serves the model no more, until it is loaded again. Calls that hold it finish; for a while that is waited
        for. A model that is not there is unloaded already.

        Raises:
            InvalidArgument: a parameter is none of ours.
        """
        with_dependents = _with_dependents(asked)
        if not self._models.knows(asked.model_name):
            return
        names = [asked.model_name, *(self._made_of(asked.model_name) if with_dependents else ())]
        models = [self._unwanted(name) for name in names]
        try:
            async with asyncio.timeout(_UNLOAD_S):
                for model in models:
                    await model.is_settled.wait()
                    await model.left()
                await self._models.followed()
        except TimeoutError:
            log.info("model %s: still in use; it is unloaded after its last call", asked.model_name)

    def _unwanted(self, name: str) -> Model:
        replaced, self._words[name] = self._words.get(name), Word(is_served=False)
        _release(replaced)
        return self._models.want_one(self._wanted(name))

    def _made_of(self, name: str) -> list[str]:
        """The models that an ensemble is made of, and those that these are made of."""
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
            before, word = self._words.get(name), Word(is_served=True, override=kept, beside=serving)
            self._words[name] = word
            try:
                await self._attempt(name, word, before)
            finally:
                for said in (before, word):
                    if self._words.get(name) is not said:
                        _release(said)

    async def _attempt(self, name: str, word: Word, before: Word | None) -> None:
        model = self._models.want_one(self._wanted(name), again=True)
        await model.is_settled.wait()
        if self._words.get(name) is not word:
            raise Aborted(f"load of model '{name}': it was unloaded meanwhile, or loaded otherwise")
        if not (failure := model.failure()):
            word.beside = frozenset()
            await self._models.followed()  # Ensembles that it is a step of serve again, too.
            return
        if word.override is not None:  # It was for this load alone. Without one, the source's model is what failed.
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

    def _put(self, name: str, word: Word | None) -> None:
        if word is None:
            self._words.pop(name, None)
        else:
            self._words[name] = word

    def _wanted(self, name: str) -> WantedModel:
        word, base = self._words.get(name), self._offered.get(name)
        is_served = word.is_served if word is not None else base is None or self._is_initial(name)
        if not is_served:
            return WantedModel(name, (), is_unloaded=True)
        wanted = word.override.over(base) if word is not None and word.override is not None else base
        if wanted is None:
            return WantedModel(name, ())
        return wanted if word is None else replace(wanted, available=wanted.available | word.beside)

    def _is_initial(self, name: str) -> bool:
        return self._initially is None or ALL in self._initially or name in self._initially

    def _ended(self, load: asyncio.Task[None]) -> None:
        self._loads.discard(load)
        if not load.cancelled() and isinstance(error := load.exception(), ShoalError):
            log.warning("%s", error.message)  # Its caller may be gone.


def _with_dependents(asked: pb.RepositoryModelUnloadRequest) -> bool:
    for key, value in asked.parameters.items():
        if key != "unload_dependents":
            raise InvalidArgument(f"unrecognized unload parameter {quoted(key)}: expected 'unload_dependents'")
        if value.WhichOneof("parameter_choice") != "bool_param":
            raise InvalidArgument("invalid value type for 'unload_dependents' parameter, expected bool_param.")
    return asked.parameters["unload_dependents"].bool_param if asked.parameters else False


def _release(word: Word | None) -> None:
    if word is not None and word.override is not None:
        word.override.release()


def _missing(name: str) -> WantedModel:
    return WantedModel(name, (), problem="the repository has no such model")


def _not_there(name: str, why: str) -> Internal:
    return Internal(f"failed to load {quoted(name)}, failed to poll from model repository: {why}")
