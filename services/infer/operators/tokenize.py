"""Operation `tokenize`: text to token ids, with Hugging Face's tokenizers.

`tokenizer.json` is a complete tokenizer; `vocab.txt` is the vocabulary of a BERT, used with BERT's usual rules. Rows
have as many ids as their text needs: `pad_tokens` pads them to a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from services.infer.operators import extras
from services.infer.operators.assets import Assets
from services.infer.operators.operation import OperationContext, Results, Unfit, map_rows, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value, rows
from services.infer.requests.tensors import Tensor
from shoal.errors import FailedPrecondition

_FILES = ("tokenizer.json", "vocab.txt")

# For fewer short texts, the hand-over to a thread takes longer than the work.
_MIN_ROWS_PER_THREAD = 4

# The library holds up to 400 bytes for each character of a text until its ids are read.
_MAX_CHARACTERS = 2 << 20


class TokenizeParameters(Parameters):
    """Parameters of `tokenize`."""

    file: str = ""
    """Name of the tokenizer's file in the version's folder; empty: `tokenizer.json`, else `vocab.txt`."""
    max_length: int = Field(512, ge=1, le=1 << 20)
    """Largest number of ids in a row; longer rows are truncated."""
    cut: Literal["right", "left"] = "right"
    special_tokens: bool = True
    lowercase: bool = True
    """Applies to `vocab.txt` only."""
    max_bytes: int = Field(1_000_000, ge=1, le=1 << 30)
    """Largest size of a text: the whole text is tokenized before truncation."""


class Tokenize:
    """BYTES (UTF-8), and a second text for models of pairs, to INT64 ids of any length."""

    is_batched = True
    only_computes = False
    inputs = (spec("text", "BYTES", 1), spec("pair", "BYTES", 1, optional=True))
    outputs = (
        spec("input_ids", "INT64", -1, ragged=True),
        spec("token_type_ids", "INT64", -1, ragged=True),
    )

    def __init__(self, parameters: TokenizeParameters, context: OperationContext) -> None:
        self._parameters, self._threads = parameters, context.threads
        self._tokenizer = tokenizer = _tokenizer(parameters, context.assets)
        specials = tokenizer.num_special_tokens_to_add(True) if parameters.special_tokens else 0
        if parameters.max_length <= specials:
            raise FailedPrecondition(
                f"operation tokenize: parameter 'max_length' {parameters.max_length}: the tokenizer's special tokens "
                f"take {specials}: expected a larger number"
            )
        # The library keeps what it truncates: for a pair, every part of one text joined with every part of the other.
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def run(self, inputs: Mapping[str, Value]) -> Results:
        texts, unfit = self._texts("text", inputs["text"])
        if "pair" in inputs:
            pairs, unfit_pairs = self._texts("pair", inputs["pair"])
            unfit = unfit_pairs | unfit
            to_encode: list[Any] = list(zip(texts, pairs, strict=True))
        else:
            to_encode = texts
        encoded = [row for texts_together in _parts(to_encode) for row in self._encode(texts_together)]
        return Results(
            {"input_ids": [ids for ids, _ in encoded], "token_type_ids": [types for _, types in encoded]}, unfit
        )

    def _encode(self, texts: list[Any]) -> list[tuple[Tensor, Tensor]]:
        """Return ids and types of texts or pairs, many in one call of the tokenizer.

        A call releases the interpreter's lock once.
        """
        size = max(-(-len(texts) // self._threads.count), _MIN_ROWS_PER_THREAD)
        chunks = [texts[at : at + size] for at in range(0, len(texts), size)]
        special = self._parameters.special_tokens

        def encode(chunk: list[Any]) -> list[tuple[Tensor, Tensor]]:
            return [self._cut(row) for row in self._tokenizer.encode_batch(chunk, add_special_tokens=special)]

        return [row for chunk in self._threads.map(encode, chunks) for row in chunk]

    def _cut(self, encoding: Any) -> tuple[Tensor, Tensor]:
        """Return ids and types, truncated as the library does: special tokens stay, the longer text is cut first."""
        ids, types = np.array(encoding.ids, np.int64), np.array(encoding.type_ids, np.int64)
        if len(ids) <= self._parameters.max_length:
            return ids, types
        owner = np.array([-1 if number is None else number for number in encoding.sequence_ids])
        kept = owner < 0
        places = [np.flatnonzero(owner == number) for number in (0, 1)]
        room = self._parameters.max_length - int(np.count_nonzero(kept))
        for at, count in zip(places, _shares(len(places[0]), len(places[1]), room), strict=True):
            kept[at[:count] if self._parameters.cut == "right" else at[len(at) - count :]] = True
        return ids[kept], types[kept]

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

        # The hand-over to a thread takes some microseconds for each row, decoding a fraction of one.
        return map_rows(rows(value), text, None, "")


def _parts(texts: list[Any]) -> Iterator[list[Any]]:
    """Split texts or pairs into lists of at most `_MAX_CHARACTERS`, or of one longer text."""
    part: list[Any] = []
    size = 0
    for text in texts:
        length = len(text) if isinstance(text, str) else sum(map(len, text))
        if part and size + length > _MAX_CHARACTERS:
            yield part
            part, size = [], 0
        part.append(text)
        size += length
    if part:
        yield part


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Return the tokens that each of two texts keeps: the longer one is cut to the shorter, then both."""
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (shorter, longer) if first <= second else (longer, shorter)


def _tokenizer(parameters: TokenizeParameters, assets: Assets) -> Any:
    library = extras.tokenizers()
    name = parameters.file or assets.first(_FILES)
    text = assets.text(name)
    if name.endswith(".json"):
        try:
            return library.Tokenizer.from_str(text)
        # The library raises plain Exception.
        except Exception as err:
            raise FailedPrecondition(f"operation tokenize: {name} is no tokenizer: {err}") from err
    vocabulary = {token: n for n, token in enumerate(assets.lines(name))}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
    if missing:
        raise FailedPrecondition(f"operation tokenize: {name} is no vocabulary of a BERT: it has no {missing[0]}")
    bert = library.implementations.BertWordPieceTokenizer(vocab=vocabulary, lowercase=parameters.lowercase)
    # The inner tokenizer has the same methods as one that is read from a file; its wrapper lacks some.
    return bert._tokenizer
