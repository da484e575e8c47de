"""What an answer says of itself when it was asked to `explain`, for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count, takewhile

from shoal.client.inference.inference import Parameter

_FIRED = {
    "idle": "nothing else ran",
    "queued": "the run before it had ended",
    "full": "it was full",
    "preferred": "it had a preferred size",
    "delay": "its first request had waited long enough",
    "slots": "steps of sequences that have a row",
    "slo": "waiting on would have cost an SLO",
    "alone": "this request runs alone",
}
_CACHE = {
    "off": "the model has none",
    "hit": "kept from an earlier request, nothing was executed",
    "miss": "not known yet, so it was executed",
    "shared": "executed once, for several who asked the same",
}
_SHOWN = ("replica", "version", "cache", "batch_size", "fired", "queue_us", "gather_us", "compute_us", "scatter_us")
_STEP = ("model", "version", "calls", "batch_size", "fired", "queue_us", "compute_us")
_OF_STEP = re.compile(rf"step_\d+_({'|'.join(_STEP)})")
STEP_COLUMNS = ("step", "version", "calls", "rows in the batch", "batch ran because", "waited", "model")


def rows(told: Mapping[str, Parameter]) -> list[tuple[str, str]]:
    """Pairs of a name and what there is to say, in the order in which a request lives; none when nothing was told."""
    found: list[tuple[str, str]] = []
    if "replica" not in told:
        return found

    def add(name: str, text: object) -> None:
        found.append((name, str(text)))

    add("answered by", f"{told['replica']}, version {told.get('version', '?')}")
    if "cache" in told:
        add("response cache", _worded(told["cache"], _CACHE))
    if told.get("cache") == "hit":
        return found
    if "queue_us" in told:
        add("waited", _ms(told["queue_us"]))
    is_ensemble = "step_0_model" in told
    if "batch_size" in told:
        size = told["batch_size"]
        where = "of its own, in the steps below" if is_ensemble else "in one batch"
        add("executed with", f"{size} row{'' if size == 1 else 's'} {where}")
    if told.get("fired") and not is_ensemble:
        add("batch ran because", _worded(told["fired"], _FIRED))
    for key, name in (("gather_us", "inputs copied"), ("compute_us", "model"), ("scatter_us", "outputs cut")):
        if key in told:
            add(name, _ms(told[key]))
    return found


def steps(told: Mapping[str, Parameter]) -> list[tuple[object, ...]]:
    """A row of STEP_COLUMNS for each step of an ensemble, in their order; none when nothing was told of steps."""
    numbers = takewhile(lambda n: f"step_{n}_model" in told, count())
    return [_step({key: told.get(f"step_{n}_{key}", "?") for key in _STEP}) for n in numbers]


def _step(told: Mapping[str, Parameter]) -> tuple[object, ...]:
    if told["calls"] == 0:
        return (told["model"], told["version"], "skipped", None, None, None, None)
    first = (told[key] for key in ("model", "version", "calls", "batch_size"))
    return (*first, _worded(told["fired"], _FIRED), _ms(told["queue_us"]), _ms(told["compute_us"]))


def others(told: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """What is not of the explanation: the model's own parameters."""
    if "replica" not in told:
        return dict(told)
    return {key: value for key, value in told.items() if key not in _SHOWN and not _OF_STEP.fullmatch(key)}


def _worded(value: Parameter, words: Mapping[str, str]) -> str:
    word = words.get(str(value), "")
    return f"{value} ({word})" if word else str(value)


def _ms(value: Parameter) -> str:
    return f"{value / 1000:.3f} ms" if isinstance(value, int | float) else str(value)
