"""Initial states of a sequence: zeros, or the data of a file of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from services.infer.model_files.wanted_models import read_bytes
from services.infer.requests import tensors
from services.infer.requests.tensors import Tensor
from services.infer.sequences.settings import SequenceSettings, State
from shoal.errors import FailedPrecondition, InvalidArgument

FOLDER = "initial_state"
"""Folder inside the model's folder that holds the files of initial states."""

_MOST_BYTES = 256 << 20


def states(settings: SequenceSettings, folder: Path | None, *, batched: bool, text: bool) -> Mapping[str, Tensor]:
    """Return the initial states by the names of the model's inputs, one row each and read-only.

    Raises:
        FailedPrecondition: a file is missing, or does not match its state.
    """
    return {state.input: _initial_state(state, folder, batched=batched, text=text) for state in settings.states}


def _initial_state(state: State, folder: Path | None, *, batched: bool, text: bool) -> Tensor:
    shape = (1, *state.initial_dims) if batched else state.initial_dims
    what = f"sequence_batching.state '{state.input}'"
    if state.file:
        if folder is None:
            raise FailedPrecondition(f"{what}: initial_state.data_file '{state.file}': the model has no folder")
        data = read_bytes(folder / FOLDER / state.file, _MOST_BYTES)
        try:
            return tensors.from_raw(data, state.datatype, shape, f"{what}: {FOLDER}/{state.file}", text=text)
        except InvalidArgument as err:
            raise FailedPrecondition(err.message) from err
    if state.datatype.is_bytes:
        return np.full(shape, "" if text else b"", object)
    zeros: Tensor = np.zeros(shape, state.datatype.dtype)
    zeros.flags.writeable = False
    return zeros
