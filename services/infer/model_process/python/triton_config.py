"""`pb_utils.ModelConfig`: the configuration that a model's `auto_complete_config` completes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


class ModelConfig:
    """A configuration that is being completed. Values that are already set must not be contradicted."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config: dict[str, Any] = copy.deepcopy(dict(config))

    def as_dict(self) -> dict[str, Any]:
        return self._config

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """Set the value. Raises ValueError when the configuration has a larger one."""
        if self._config.get("max_batch_size", 0) > max_batch_size:
            raise ValueError(
                f"configuration specified max_batch_size {self._config['max_batch_size']}, but in auto-complete-config "
                f"function for model '{self._config.get('name', '')}' specified max_batch_size {max_batch_size}"
            )
        self._config["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        """Turn on dynamic batching. Raises ValueError when the configuration has another scheduler."""
        other = next((name for name in ("sequence_batching", "ensemble_scheduling") if self._config.get(name)), None)
        if other:
            raise ValueError(
                f"Configuration specified scheduling_choice as '{other}', but auto-complete-config "
                "wants 'dynamic_batching'"
            )
        self._config.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, transaction_policy_dict: Mapping[str, Any]) -> None:
        """Set `decoupled`. Raises ValueError for any other key, or when the configuration has decoupled: true."""
        if unknown := set(transaction_policy_dict) - {"decoupled"}:
            raise ValueError(f"model transaction property {sorted(unknown)} is not known: expected 'decoupled'")
        decoupled = bool(transaction_policy_dict.get("decoupled", False))
        if self._config.get("model_transaction_policy", {}).get("decoupled") and not decoupled:
            raise ValueError(
                "trying to change decoupled property in auto-complete-config, which is already set to True"
            )
        self._config["model_transaction_policy"] = {"decoupled": decoupled}

    def add_input(self, input: Mapping[str, Any]) -> None:
        """Add an input. Raises ValueError when a property is missing, unknown, or contradicts the configuration."""
        self._add("input", input, {"name", "data_type", "dims", "optional", "allow_ragged_batch", "format", "reshape"})

    def add_output(self, output: Mapping[str, Any]) -> None:
        """Add an output. Raises ValueError as `add_input` does."""
        self._add("output", output, {"name", "data_type", "dims", "label_filename", "reshape"})

    def _add(self, role: str, tensor: Mapping[str, Any], known: set[str]) -> None:
        if unknown := set(tensor) - known:
            raise ValueError(f"{role} property {sorted(unknown)} is not known: expected some of {sorted(known)}")
        for key in ("name", "data_type", "dims"):
            if key not in tensor:
                raise ValueError(f"property '{key}' is missing in {role} {tensor.get('name', '')!r}")
        entries: list[dict[str, Any]] = self._config.setdefault(role, [])
        for entry in entries:
            if entry["name"] != tensor["name"]:
                continue
            for key in ("data_type", "dims"):
                if entry.get(key) and list(entry[key]) != list(tensor[key]):
                    raise ValueError(
                        f"unable to add {role} '{tensor['name']}': the configuration says {key} {entry[key]}, "
                        f"auto-complete-config {tensor[key]}"
                    )
            entry.update(tensor)
            return
        entries.append(dict(tensor))
