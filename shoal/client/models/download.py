"""One version of a model out of the store, into a folder in Triton's layout: resumed where it breaks, verified."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from shoal.client.models.registry import ModelFile, ModelVersion, Progress
from shoal.client.models.upload import time_for
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import DataLoss, FailedPrecondition
from shoal.store.v1 import store_pb2 as store


async def pull(caller: Caller, model: ModelVersion, into: Path, progress: Callable[[Progress], None]) -> Path:
    """Writes the files of `model` to `into`/<name>/<version>. Returns `into`/<name>.

    Raises:
        DataLoss: what came does not hash to what was asked for; nothing is left under that file's name.
        FailedPrecondition: a file cannot be written, or its path leads out of the folder.
    """
    home = into / model.name
    done = 0
    for file in model.files:
        start = done

        def told(offset: int, file: ModelFile = file, start: int = start) -> None:
            progress(Progress(file.path, start + offset, model.size_bytes))

        await _fetch(caller, file, _place(home, model.version, file.path), told)
        done += file.size_bytes
    return home


def _place(home: Path, version: int, inside: str) -> Path:
    path = Path(os.path.normpath(home / str(version) / inside))
    if not path.is_relative_to(os.path.normpath(home)):
        raise FailedPrecondition(f"the registry has a file {inside!r}: it would be written outside of {home}")
    return path


async def _fetch(caller: Caller, file: ModelFile, place: Path, told: Callable[[int], None]) -> None:
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    hashed = hashlib.sha256()
    got = 0
    doing = f"download of {file.path}"
    stream = caller.follow(
        methods.GET_ARTIFACT,
        lambda: store.GetArtifactRequest(sha256=file.sha256, offset=got),
        timeout_s=time_for(file.size_bytes),
        ended=lambda _: got >= file.size_bytes,
        doing=doing,
    )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as out:
            if file.size_bytes:
                async for answer in stream:
                    await asyncio.to_thread(out.write, answer.chunk)
                    hashed.update(answer.chunk)
                    got += len(answer.chunk)
                    told(got)
        if hashed.hexdigest() != file.sha256:
            raise DataLoss(f"{doing}: {got} bytes came that hash to {hashed.hexdigest()}, not to {file.sha256}")
        partial.replace(place)
    except OSError as err:
        raise FailedPrecondition(f"cannot write {place}: {err.strerror}") from err
    finally:
        await stream.aclose()
        partial.unlink(missing_ok=True)
