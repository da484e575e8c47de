"""Download of a model version into a folder in Triton's layout, resumed after a break and verified."""

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
    """Write the files of `model` to `into`/<name>/<version>. Return `into`/<name>.

    Raises:
        DataLoss: the received bytes have another digest; no file is left under the final name.
        FailedPrecondition: a file cannot be written, or its path leads out of the folder.
    """
    home = into / model.name
    done = 0
    for file in model.files:
        start = done

        def report(offset: int, file: ModelFile = file, start: int = start) -> None:
            progress(Progress(file.path, start + offset, model.size_bytes))

        await _fetch(caller, file, _target(home, model.version, file.path), report)
        done += file.size_bytes
    return home


def _target(home: Path, version: int, relative_path: str) -> Path:
    path = Path(os.path.normpath(home / str(version) / relative_path))
    if not path.is_relative_to(os.path.normpath(home)):
        raise FailedPrecondition(f"path {relative_path!r} of the registry leads out of {home}: the file is not written")
    return path


async def _fetch(caller: Caller, file: ModelFile, target: Path, report: Callable[[int], None]) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
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
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as out:
            if file.size_bytes:
                async for response in stream:
                    await asyncio.to_thread(out.write, response.chunk)
                    hashed.update(response.chunk)
                    got += len(response.chunk)
                    report(got)
        if hashed.hexdigest() != file.sha256:
            raise DataLoss(f"{doing}: received {got} bytes with SHA-256 {hashed.hexdigest()}, expected {file.sha256}")
        partial.replace(target)
    except OSError as err:
        raise FailedPrecondition(f"cannot write {target}: {err.strerror}") from err
    finally:
        await stream.aclose()
        partial.unlink(missing_ok=True)
