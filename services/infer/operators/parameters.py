"""Parameters of an operation: parsed once from a model's configuration into a frozen object; errors name the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from services.infer.error_text import listed, quoted
from services.infer.response_cache.cache import TTL_KEY
from services.infer.runtimes.onnx_settings import THREADS
from services.infer.scheduling import rules
from shoal.errors import FailedPrecondition

OPERATION = "operation"
"""The parameter that names the operation."""

# Parameters that configure the serving of any model, and are not the operation's.
_SERVING_KEYS = frozenset({OPERATION, *rules.PARAMETERS, TTL_KEY, THREADS})


class Parameters(BaseModel):
    """Base class of all operations' parameters; unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


P = TypeVar("P", bound=Parameters)


def split(text: Any) -> Any:
    """Return `a, b, c`, with or without brackets, as a list."""
    if not isinstance(text, str):
        return text
    return [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]


def _size(text: Any) -> Any:
    """Return `224` (a square) or `224, 320` (height and width) as a list of two."""
    parts = split(text)
    return parts * 2 if isinstance(parts, list) and len(parts) == 1 else parts


Floats = Annotated[tuple[float, ...], BeforeValidator(split)]
Names = Annotated[tuple[str, ...], BeforeValidator(split)]
Size = Annotated[tuple[int, int], BeforeValidator(_size)]
"""Height and width in pixels."""


def read(form: type[P], operation: str, texts: Mapping[str, str]) -> P:
    """Return the operation's parameters; `texts` has all parameters of the configuration.

    Raises:
        FailedPrecondition: the message names each parameter that is unknown, missing or wrong.
    """
    values = {key: value for key, value in texts.items() if key not in _SERVING_KEYS}
    try:
        return form.model_validate(values)
    except ValidationError as err:
        errors = "; ".join(dict.fromkeys(_error_text(dict(error), form, values) for error in err.errors()))
        raise FailedPrecondition(f"operation {operation}: {errors}") from err


def _error_text(error: Mapping[str, Any], form: type[Parameters], values: Mapping[str, str]) -> str:
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        known = f"it has {listed(form.model_fields)}" if form.model_fields else "it has none"
        return f"parameter {quoted(key)} is unknown: {known}"
    if error["type"] == "missing":
        return f"parameter {quoted(key)} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    # An error of several parameters together has no key.
    if not key:
        return message
    return f"parameter {quoted(key)} {quoted(values.get(key, ''))}: {message[:1].lower()}{message[1:]}"
