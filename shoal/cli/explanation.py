"""Rows of a table for the parameters of a response to a request with `explain`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count, takewhile

from shoal.client.inference.inference import Parameter

_FIRED = {
    "idle": "no other batch was running",
    "queued": "the previous batch had ended",
    "full": "it was full",
    "preferred": "it had a preferred size",
    "delay": "its first request had waited for the queue delay",
    "slots": "steps of sequences, which have fixed rows",
    "slo": "more waiting would have missed the latency goal",
    "alone": "the request runs alone",
    "closing": "the model is being unloaded",
}
_CACHE = {
    "off": "the model has none",
    "hit": "outputs of an earlier request, nothing was executed",
    "miss": "not cached, so it was executed",
    "shared": "executed once for several identical requests",
}
_SHOWN = ("replica", "version", "cache", "batch_size", "fired", "queue_us", "gather_us", "compute_us", "scatter_us")
_STEP = ("model", "version", "calls", "batch_size", "fired", "queue_us", "compute_us")
_OF_STEP = re.compile(rf"step_\d+_({'|'.join(_STEP)})")
STEP_COLUMNS = ("step", "version", "calls", "rows in the batch", "batch ran because", "waited", "model")


def rows(explained: Mapping[str, Parameter]) -> list[tuple[str, str]]:
    """Return pairs of a name and its text, in the order of a request's stages; empty without an explanation."""
    found: list[tuple[str, str]] = []
    if "replica" not in explained:
        return found

    def add(name: str, text: object) -> None:
        found.append((name, str(text)))

    add("run by", f"{explained['replica']}, version {explained.get('version', '?')}")
    if "cache" in explained:
        add("response cache", _with_meaning(explained["cache"], _CACHE))
    if explained.get("cache") == "hit":
        return found
    if "queue_us" in explained:
        add("waited", _ms(explained["queue_us"]))
    is_ensemble = "step_0_model" in explained
    if "batch_size" in explained:
        size = explained["batch_size"]
        where = "of its own, in the steps below" if is_ensemble else "in one batch"
        add("executed with", f"{size} row{'' if size == 1 else 's'} {where}")
    if explained.get("fired") and not is_ensemble:
        add("batch ran because", _with_meaning(explained["fired"], _FIRED))
    for key, name in (("gather_us", "inputs copied"), ("compute_us", "model"), ("scatter_us", "outputs split")):
        if key in explained:
            add(name, _ms(explained[key]))
    return found


def steps(explained: Mapping[str, Parameter]) -> list[tuple[object, ...]]:
    """Return a row of STEP_COLUMNS for each step of an ensemble, in order; empty for other models."""
    numbers = takewhile(lambda n: f"step_{n}_model" in explained, count())
    return [_step({key: explained.get(f"step_{n}_{key}", "?") for key in _STEP}) for n in numbers]


def _step(step: Mapping[str, Parameter]) -> tuple[object, ...]:
    if step["calls"] == 0:
        return (step["model"], step["version"], "skipped", None, None, None, None)
    first = (step[key] for key in ("model", "version", "calls", "batch_size"))
    return (*first, _with_meaning(step["fired"], _FIRED), _ms(step["queue_us"]), _ms(step["compute_us"]))


def others(explained: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Return the parameters that do not belong to the explanation: the model's own."""
    if "replica" not in explained:
        return dict(explained)
    return {key: value for key, value in explained.items() if key not in _SHOWN and not _OF_STEP.fullmatch(key)}


def _with_meaning(value: Parameter, meanings: Mapping[str, str]) -> str:
    meaning = meanings.get(str(value), "")
    return f"{value} ({meaning})" if meaning else str(value)


def _ms(value: Parameter) -> str:
    return f"{value / 1000:.3f} ms" if isinstance(value, int | float) else str(value)
