"""Shoal's own parameters of an ensemble's configuration.

    when.<step>        condition: the step runs only if the condition holds (`conditions`)
    each.<step>        "crops": the step's model is called for each row of this tensor
    skipped.<output>   "empty": an empty tensor where every step that produces the output was skipped
    max_in_flight      largest number of requests in progress

A step is named by its index from 0, or by its model where no other step has the same model.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.infer.ensembles import conditions
from services.infer.ensembles.conditions import Condition
from services.infer.error_text import quoted
from shoal.inference.v2 import model_config_pb2 as pb

WHEN, EACH, _SKIPPED, _IN_FLIGHT = "when.", "each.", "skipped.", "max_in_flight"

_MAX_IN_FLIGHT = 1_000_000


class EnsembleParameters:
    """The parsed parameters; `errors` has one message for each that is unknown or wrong."""

    def __init__(self, config: pb.ModelConfig) -> None:
        self.errors: list[str] = []
        self.when: dict[int, Condition] = {}
        self.each: dict[int, frozenset[str]] = {}
        self.skipped: list[str] = []
        self.in_flight = 0
        self._models = [step.model_name for step in config.ensemble_scheduling.step]
        self._outputs = {tensor for step in config.ensemble_scheduling.step for tensor in step.output_map.values()}
        for key in sorted(config.parameters):
            try:
                self._read(key, config.parameters[key].string_value.strip())
            except ValueError as err:
                self.errors.append(f"parameter {quoted(key)} {quoted(config.parameters[key].string_value)}: {err}")

    def _read(self, key: str, text: str) -> None:
        if key.startswith(WHEN):
            self.when[self._step(key.removeprefix(WHEN), self.when)] = conditions.parse(text)
        elif key.startswith(EACH):
            tensors = [tensor.strip() for tensor in text.split(",")]
            if not all(tensors):
                raise ValueError("expected the names of tensors, with commas between them")
            self.each[self._step(key.removeprefix(EACH), self.each)] = frozenset(tensors)
        elif key.startswith(_SKIPPED):
            output = key.removeprefix(_SKIPPED)
            if text != "empty":
                raise ValueError("expected 'empty'")
            if output not in self._outputs:
                raise ValueError(f"no step gives {quoted(output)}")
            self.skipped.append(output)
        elif key == _IN_FLIGHT:
            if not (text.isdecimal() and text.isascii() and len(text) < 8 and 1 <= int(text) <= _MAX_IN_FLIGHT):
                raise ValueError(f"expected a whole number from 1 to {_MAX_IN_FLIGHT}")
            self.in_flight = int(text)

    def _step(self, name: str, known: Mapping[int, object]) -> int:
        """Return the index of the step `name`. Raises ValueError when it is not one step, or is a key of `known`."""
        if name.isdecimal() and name.isascii() and len(name) < 8:
            found = [int(name)] if int(name) < len(self._models) else []
        else:
            found = [n for n, model in enumerate(self._models) if model == name]
        if len(found) != 1:
            raise ValueError(
                f"{quoted(name)} names {len(found) or 'no'} step{'s' * (len(found) > 1)}: "
                f"expected an index from 0 to {len(self._models) - 1}, or the model of one step only"
            )
        if found[0] in known:
            raise ValueError(f"step {found[0]} has this parameter already, by its index or its model")
        return found[0]
