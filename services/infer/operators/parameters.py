"""An operation's parameters: texts in a model's configuration, read once into a frozen object, wrong ones named."""

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

_OF_SERVING = frozenset({OPERATION, *rules.PARAMETERS, TTL_KEY, THREADS})
# Parameters of a configuration that say how to serve a model, whatever it is.


class Parameters(BaseModel):
    """Base of all: what is not described is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


P = TypeVar("P", bound=Parameters)


def split(text: Any) -> Any:
    """`a, b, c`, in brackets or not, as the list that it is."""
    if not isinstance(text, str):
        return text
    return [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]


def _size(text: Any) -> Any:
    """`224`: as high as wide; `224, 320`: height and width."""
    parts = split(text)
    return parts * 2 if isinstance(parts, list) and len(parts) == 1 else parts


Floats = Annotated[tuple[float, ...], BeforeValidator(split)]
Names = Annotated[tuple[str, ...], BeforeValidator(split)]
Size = Annotated[tuple[int, int], BeforeValidator(_size)]
"""Height and width in pixels."""


def read(form: type[P], operation: str, given: Mapping[str, str]) -> P:
    """The parameters in `given`, all of a configuration's.

    Raises:
        FailedPrecondition: names each that is unknown, missing or wrong.
    """
    values = {key: value for key, value in given.items() if key not in _OF_SERVING}
    try:
        return form.model_validate(values)
    except ValidationError as err:
        wrong = "; ".join(dict.fromkeys(_wrong(dict(each), form, values) for each in err.errors()))
        raise FailedPrecondition(f"operation {operation}: {wrong}") from err


def _wrong(error: Mapping[str, Any], form: type[Parameters], values: Mapping[str, str]) -> str:
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        known = f"it has {listed(form.model_fields)}" if form.model_fields else "it has none"
        return f"parameter {quoted(key)} is unknown: {known}"
    if error["type"] == "missing":
        return f"parameter {quoted(key)} is missing"
    said = str(error["msg"]).removeprefix("Value error, ")
    if not key:  # Of several together.
        return said
    return f"parameter {quoted(key)} {quoted(values.get(key, ''))}: {said[:1].lower()}{said[1:]}"
