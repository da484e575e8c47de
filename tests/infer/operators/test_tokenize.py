"""Tokens: those of the library that made the tokenizer, from either file; text that is none fails by itself."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.implementations import BertWordPieceTokenizer

from services.infer.operators import tokenize
from shoal.errors import FailedPrecondition
from tests.infer.operators import making
from tests.infer.operators.images import array

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "many", "request", "##s", "mov", "##ing", "as", "one", "é", ","]
TEXTS = ["many requests, moving as one", "", "Many É", "unheard", "one " * 400, "a\0b", "\N{FISH}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both kinds of file: a BERT's vocabulary, and a byte-level BPE with its rules."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    bpe.enable_padding()  # A file may say so; rows keep their own lengths all the same.
    bpe.save(str(folder / "bpe.json"))
    return folder


def texts(*given: str) -> np.ndarray:
    return array(*[text.encode() for text in given])


@pytest.mark.parametrize("file", ["bpe.json", "vocab.txt"])
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_the_librarys(folder, file, special):
    made = making.session(folder, "tokenize", file=file, max_length="64", special_tokens=str(special).lower())
    outputs = making.run(made, text=texts(*TEXTS))
    making.check(made, outputs, len(TEXTS))
    if file == "vocab.txt":
        library = BertWordPieceTokenizer({word: n for n, word in enumerate(WORDS)}, lowercase=True)
    else:
        library = Tokenizer.from_file(str(folder / file))
    library.enable_truncation(64)
    for text, ids in zip(TEXTS, outputs["input_ids"], strict=True):
        library.no_padding()
        assert ids.tolist() == library.encode(text, add_special_tokens=special).ids


def test_long_texts_are_cut_at_either_end(folder):
    right, left = (
        making.session(folder, "tokenize", file="vocab.txt", max_length="4", cut=c) for c in ("right", "left")
    )
    text = texts("many mov as one")
    assert making.run(right, text=text)["input_ids"][0].tolist() == [2, 5, 8, 3]
    assert making.run(left, text=text)["input_ids"][0].tolist() == [2, 10, 11, 3]


def test_pairs_have_types(folder):
    made = making.session(folder, "tokenize", file="vocab.txt")
    outputs = making.run(made, text=texts("many", "as one"), pair=texts("one", ""))
    assert outputs["input_ids"][0].tolist() == [2, 5, 3, 11, 3]
    assert outputs["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1]


PROCESSORS = {
    "none": None,
    "bert": processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
    "roberta": processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2)),
    "turned": processors.TemplateProcessing(
        single="$A:2 [SEP]", pair="$B:1 [SEP]:1 $A:0", special_tokens=[("[SEP]", 3)]
    ),
    "bytes": processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing(single="[CLS] $A", pair="[CLS] $A $B:1", special_tokens=[("[CLS]", 2)]),
        ]
    ),
}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("cut", ["right", "left"])
@pytest.mark.parametrize("special", [True, False])
def test_texts_and_pairs_are_truncated_as_by_the_library(tmp_path, processor, cut, special):
    words = [*WORDS[:5], *"abcdefgh"]
    library = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    if PROCESSORS[processor] is not None:
        library.post_processor = PROCESSORS[processor]
    library.save(str(tmp_path / "tokenizer.json"))
    lengths = [(first, second) for first in (0, 1, 4, 5, 9, 13) for second in (0, 1, 3, 5, 8, 14)]
    pairs = [(" ".join("abcdefghabcdefgh"[:first]), " ".join("hgfedcbahgfedcba"[:second])) for first, second in lengths]
    for max_length in (5, 7, 8, 12):
        made = making.session(
            tmp_path, "tokenize", max_length=str(max_length), cut=cut, special_tokens=str(special).lower()
        )
        library.enable_truncation(max_length, direction=cut)
        firsts, seconds = texts(*(first for first, _ in pairs)), texts(*(second for _, second in pairs))
        for given, outputs in (
            ([first for first, _ in pairs], making.run(made, text=firsts)),
            (pairs, making.run(made, text=firsts, pair=seconds)),
        ):
            expected = library.encode_batch(given, add_special_tokens=special)
            assert [row.tolist() for row in outputs["input_ids"]] == [each.ids for each in expected]
            assert [row.tolist() for row in outputs["token_type_ids"]] == [each.type_ids for each in expected]


_LONG_PAIR = """
import resource, sys
from pathlib import Path
from tests.infer.operators import making
from tests.infer.operators.images import array

made = making.session(Path(sys.argv[1]), "tokenize", file="vocab.txt")
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
text = array(b"," * 100_000)
print(len(making.run(made, text=text, pair=text)["input_ids"][0]))
"""


def test_a_long_pair_takes_no_memory_of_its_length_squared(folder):
    """The library kept each part of one text joined with each part of the other, and ended the process."""
    command = [sys.executable, "-c", _LONG_PAIR, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "512"), done.stderr[-500:]


def test_long_texts_are_tokenized_one_after_the_other(folder, monkeypatch):
    made = making.session(folder, "tokenize", file="vocab.txt")
    together = making.run(made, text=texts(*TEXTS), pair=texts(*reversed(TEXTS)))
    monkeypatch.setattr(tokenize, "_MAX_CHARACTERS", 30)
    parts = [[len(text) for text in part] for part in tokenize._parts(["a" * n for n in (10, 20, 1, 40, 5, 25, 5)])]
    assert parts == [[10, 20], [1], [40], [5, 25], [5]]
    apart = making.run(made, text=texts(*TEXTS), pair=texts(*reversed(TEXTS)))
    for name in ("input_ids", "token_type_ids"):
        assert [row.tolist() for row in apart[name]] == [row.tolist() for row in together[name]]


def test_text_that_is_none_fails_alone(folder):
    made = making.session(folder, "tokenize", file="bpe.json", max_bytes="100")
    results = making.rows(made, {"text": array(b"one", b"\xff\xfe", b"x" * 101, b"one")})
    assert results.unfit == {
        1: "input 'text' is not UTF-8: invalid start byte at byte 0",
        2: "input 'text' has 101 bytes, more than max_bytes, 100: send less text",
    }
    assert results.values[0][0].tolist() == results.values[0][3].tolist()
    results = making.rows(made, {"text": texts("one", "one"), "pair": array(b"one", b"\xc3")})
    assert "input 'pair' is not UTF-8" in results.unfit[1]


def test_the_default_is_tokenizer_json_then_vocab_txt(folder, tmp_path):
    with pytest.raises(FailedPrecondition, match=r"none of the files 'tokenizer\.json', 'vocab\.txt'"):
        making.session(tmp_path, "tokenize")
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    assert making.run(making.session(tmp_path, "tokenize"), text=texts("one"))["input_ids"][0].tolist() == [2, 11, 3]
    (tmp_path / "tokenizer.json").write_bytes((folder / "bpe.json").read_bytes())
    assert making.run(making.session(tmp_path, "tokenize"), text=texts("one"))["input_ids"][0].tolist()[0] == 0


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", b"\xff", "cannot read tokenizer.json"),
        ("vocab.txt", b"a\nb\n", "it has no [UNK]"),
    ],
)
def test_files_that_are_no_tokenizers(tmp_path, file, content, says):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(FailedPrecondition) as err:
        making.session(tmp_path, "tokenize")
    assert says in str(err.value)


@pytest.mark.parametrize(
    ("parameters", "says"), [({"max_length": "2"}, "take 3"), ({"cut": "middle"}, "'cut' 'middle'")]
)
def test_wrong_parameters_are_named(folder, parameters, says):
    with pytest.raises(FailedPrecondition) as err:
        making.session(folder, "tokenize", file="vocab.txt", **parameters)
    assert says in str(err.value)
