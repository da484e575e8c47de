"""What an answer says of itself when it was asked to `explain`, for people."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.client.inference import Parameter

_FIRED = {
    "idle": "nothing else ran",
    "full": "it was full",
    "preferred": "it had a preferred size",
    "delay": "its first request had waited long enough",
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
    if "batch_size" in told:
        count = told["batch_size"]
        add("executed with", f"{count} row{'' if count == 1 else 's'} in one batch")
    if told.get("fired"):
        add("batch ran because", _worded(told["fired"], _FIRED))
    for key, name in (("gather_us", "inputs copied"), ("compute_us", "model"), ("scatter_us", "outputs cut")):
        if key in told:
            add(name, _ms(told[key]))
    return found


def others(told: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """What is not of the explanation: the model's own parameters."""
    return {key: value for key, value in told.items() if "replica" not in told or key not in _SHOWN}


def _worded(value: Parameter, words: Mapping[str, str]) -> str:
    word = words.get(str(value), "")
    return f"{value} ({word})" if word else str(value)


def _ms(value: Parameter) -> str:
    return f"{value / 1000:.3f} ms" if isinstance(value, int | float) else str(value)
