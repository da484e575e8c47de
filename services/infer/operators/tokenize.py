"""Text to the numbers of a tokenizer's vocabulary, with Hugging Face's tokenizers.

`tokenizer.json` says all of it; `vocab.txt` is the vocabulary of a BERT, whose rules are then the usual ones. Rows have
as many ids as their text needs: `pad_tokens` makes a batch of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from services.infer.operators import extras
from services.infer.operators.assets import Assets
from services.infer.operators.operation import Results, Setting, Unfit, each, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor
from shoal.errors import FailedPrecondition

_FILES = ("tokenizer.json", "vocab.txt")

_ROWS = 4
# For fewer, a hop to a thread takes longer than short texts do.


class TokenizeParameters(Parameters):
    """Of `tokenize`."""

    file: str = ""
    """Of the version's folder; empty: `tokenizer.json`, else `vocab.txt`."""
    max_length: int = Field(512, ge=1, le=1 << 20)
    """Ids of one row at most; what is longer is cut."""
    cut: Literal["right", "left"] = "right"
    special_tokens: bool = True
    lowercase: bool = True
    """For `vocab.txt` only."""
    max_bytes: int = Field(1_000_000, ge=1, le=1 << 30)
    """Of one text: all of it is tokenized before it is cut."""


class Tokenize:
    """BYTES (UTF-8), and a second text where the model takes pairs, to INT64 ids of any length."""

    is_batched = True
    only_computes = False
    inputs = (spec("text", "BYTES", 1), spec("pair", "BYTES", 1, optional=True))
    outputs = (
        spec("input_ids", "INT64", -1, ragged=True),
        spec("token_type_ids", "INT64", -1, ragged=True),
    )

    def __init__(self, parameters: TokenizeParameters, setting: Setting) -> None:
        self._parameters, self._threads = parameters, setting.threads
        self._tokenizer = tokenizer = _tokenizer(parameters, setting.assets)
        specials = tokenizer.num_special_tokens_to_add(True) if parameters.special_tokens else 0
        if parameters.max_length <= specials:
            raise FailedPrecondition(
                f"operation tokenize: parameter 'max_length' {parameters.max_length}: the tokenizer's own marks take "
                f"{specials}: expected more than that"
            )
        tokenizer.enable_truncation(parameters.max_length, direction=parameters.cut)
        tokenizer.no_padding()

    def run(self, inputs: Mapping[str, Value]) -> Results:
        texts, unfit = self._texts("text", inputs["text"])
        if "pair" in inputs:
            pairs, wrong = self._texts("pair", inputs["pair"])
            unfit = wrong | unfit
            given: list[Any] = list(zip(texts, pairs, strict=True))
        else:
            given = texts
        encodings = self._encoded(given)
        ids: list[Tensor] = [np.array(encoding.ids, np.int64) for encoding in encodings]
        types: list[Tensor] = [np.array(encoding.type_ids, np.int64) for encoding in encodings]
        return Results({"input_ids": ids, "token_type_ids": types}, unfit)

    def _encoded(self, given: list[Any]) -> list[Any]:
        """Many rows in one call, which lets go of the interpreter's lock for all of them."""
        size = max(-(-len(given) // self._threads.count), _ROWS)
        parts = [given[at : at + size] for at in range(0, len(given), size)]
        special = self._parameters.special_tokens
        done = self._threads.map(lambda part: self._tokenizer.encode_batch(part, add_special_tokens=special), parts)
        return [encoding for part in done for encoding in part]

    def example(self) -> Mapping[str, Value]:
        return {"text": np.array([[b"a"]], object)}

    def _texts(self, name: str, value: Value) -> tuple[list[str], dict[int, str]]:
        most = self._parameters.max_bytes

        def text(row: Tensor) -> str:
            data: bytes = row.item()
            if len(data) > most:
                raise Unfit(f"input '{name}' has {len(data)} bytes, more than max_bytes, {most}: send less text")
            try:
                return data.decode()
            except UnicodeDecodeError as err:
                raise Unfit(f"input '{name}' is not UTF-8: {err.reason} at byte {err.start}") from err

        # A hop to a thread takes some microseconds for each row, and this is a fraction of one.
        return each(rows(value), text, None, "")


def _tokenizer(parameters: TokenizeParameters, assets: Assets) -> Any:
    library = extras.tokenizers()
    name = parameters.file or assets.first(_FILES)
    text = assets.text(name)
    if name.endswith(".json"):
        try:
            return library.Tokenizer.from_str(text)
        except Exception as err:  # Exception itself is what it raises.
            raise FailedPrecondition(f"operation tokenize: {name} is no tokenizer: {err}") from err
    vocabulary = {token: number for number, token in enumerate(assets.lines(name))}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
    if missing:
        raise FailedPrecondition(f"operation tokenize: {name} is no vocabulary of a BERT: it has no {missing[0]}")
    bert = library.implementations.BertWordPieceTokenizer(vocab=vocabulary, lowercase=parameters.lowercase)
    return bert._tokenizer  # As one that is read from a file: the face of this one can do less.
