"""Operations on numbers: what their kernels give, by definition or beside NumPy, row by row the same as together."""

from __future__ import annotations

import json

import numpy as np
import pytest

from services.infer.operators import nms as nms_operation
from services.infer.requests import ragged
from shoal.errors import FailedPrecondition
from tests.infer.operators import making

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def made(tmp_path):
    return lambda operation, **parameters: making.session(tmp_path, operation, **parameters)


# pad_tokens


def test_token_lists_are_padded_to_the_longest_rounded_up(made):
    pad = made("pad_tokens", pad_id="9")
    ids = [np.arange(1, 4), np.arange(1, 11), np.empty(0, np.int64)]
    outputs = making.run(pad, input_ids=ids, token_type_ids=[np.ones_like(each) for each in ids])
    making.check(pad, outputs, 3)
    for n, row in enumerate(ids):
        assert outputs["input_ids"][n].tolist() == row.tolist() + [9] * (16 - len(row))
        assert outputs["attention_mask"][n].tolist() == [1] * len(row) + [0] * (16 - len(row))
        assert outputs["token_type_ids"][n].tolist() == outputs["attention_mask"][n].tolist()


@pytest.mark.parametrize(
    ("parameters", "width"),
    [
        ({}, 16),
        ({"multiple_of": "1"}, 10),
        ({"length": "6"}, 6),
        ({"max_length": "12"}, 12),
        ({"max_length": "7", "multiple_of": "4"}, 7),
    ],
)
def test_lengths(made, parameters, width):
    pad = made("pad_tokens", **parameters)
    outputs = making.run(pad, input_ids=[np.arange(10), np.arange(3)])
    making.check(pad, outputs, 2)
    assert outputs["input_ids"].shape == (2, width)
    assert outputs["input_ids"][0].tolist() == [*range(10), *[0] * 9][:width]
    assert outputs["token_type_ids"].sum() == 0


def test_padding_on_the_left_and_of_nothing(made):
    outputs = making.run(made("pad_tokens", side="left", multiple_of="1"), input_ids=[np.arange(3), np.arange(1)])
    assert outputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert making.run(made("pad_tokens"), input_ids=[])["input_ids"].shape == (0, 8)


def test_pad_tokens_each_row_to_its_own_length(made) -> None:
    pad = made("pad_tokens", pad_to="own", multiple_of="4", max_length="6", pad_id="9")
    ids = [np.arange(1, 4), np.arange(5), np.arange(9), np.arange(0)]
    outputs = making.run(pad, input_ids=ids, token_type_ids=[np.ones(len(row), np.int64) for row in ids])
    assert [row.tolist() for row in outputs["input_ids"]] == [[1, 2, 3, 9], [0, 1, 2, 3, 4, 9], [*range(6)], [9] * 4]
    assert [row.tolist() for row in outputs["attention_mask"]] == [[1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1] * 6, [0] * 4]
    assert [row.tolist() for row in outputs["token_type_ids"]] == [[1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1] * 6, [0] * 4]
    assert all(each.is_ragged for each in pad.outputs)
    assert making.run(pad, input_ids=[])["input_ids"] == []
    whole = made("pad_tokens", pad_to="own", length="8")  # A length is that of all.
    assert making.run(whole, input_ids=ids)["input_ids"].shape == (4, 8)
    assert not any(each.is_ragged for each in whole.outputs)


def test_types_must_be_as_many_as_ids(made):
    results = making.rows(
        made("pad_tokens"), {"input_ids": [np.arange(3), np.arange(2)], "token_type_ids": [np.arange(3), np.arange(3)]}
    )
    assert results.unfit == {1: "input 'token_type_ids' has 3 numbers, input 'input_ids' 2: expected as many"}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("has_types", [True, False])
def test_a_very_long_row_pads_no_row_of_other_requests(made, side, has_types):
    """64 rows of a few tokens took the memory of the long one each, in three outputs."""
    pad = made("pad_tokens", side=side, pad_id="9", multiple_of="4")
    ids = [np.arange(1, 4), np.arange(1, 8), np.arange(1 << 20), *[np.arange(2)] * 61]
    given = {"input_ids": ids} | ({"token_type_ids": [row % 2 for row in ids]} if has_types else {})
    results = making.rows(pad, given)
    counts = [2, 1, *[1] * 61]
    requests = list(zip(*[ragged.parted(value, counts) for value in results.values], strict=True))
    shapes = [[value.shape for value in outputs] for outputs in requests]
    assert shapes == [[(2, 8)] * 3, [(1, 1 << 20)] * 3, *[[(1, 4)] * 3] * 61]
    alone = [
        making.run(pad, **{name: ragged.parted(value, counts)[n] for name, value in given.items()}) for n in range(3)
    ]
    for outputs, expected in zip(requests, alone, strict=False):
        for value, other in zip(outputs, expected.values(), strict=True):
            assert value.dtype == np.int64
            np.testing.assert_array_equal(value, other)


def test_many_rows_of_one_request_are_one_tensor(made):
    pad = made("pad_tokens", multiple_of="4096")
    ids = np.arange(1200).reshape(600, 2)
    values = pad.run({"input_ids": ids}, [spec.name for spec in pad.outputs])
    assert [value.shape for value in values] == [(600, 4096)] * 3
    np.testing.assert_array_equal(values[0][:, :3], np.pad(ids, ((0, 0), (0, 1))))
    np.testing.assert_array_equal(values[1].sum(axis=1), 2)


# pool_normalize


@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_is_the_mean_of_what_counts(made, normalize):
    pool = made("pool_normalize", normalize=str(normalize))
    tokens, mask = floats(3, 5, 8), np.array([[1, 1, 1, 0, 0], [1] * 5, [0] * 5])
    outputs = making.run(pool, token_embeddings=tokens, attention_mask=mask)
    making.check(pool, outputs, 3)
    mean = (tokens * mask[..., None]).sum(1) / np.maximum(mask.sum(1), 1)[:, None]
    expected = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12) if normalize else mean
    np.testing.assert_allclose(outputs["embedding"], expected, atol=1e-6)


def test_the_first_token_may_stand_for_all(made):
    tokens, mask = floats(2, 3, 4), np.ones((2, 3), np.int64)
    raw = made("pool_normalize", pooling="cls", normalize="false")
    got = making.run(raw, token_embeddings=tokens, attention_mask=mask)
    np.testing.assert_array_equal(got["embedding"], tokens[:, 0])
    got = making.run(made("pool_normalize", pooling="cls"), token_embeddings=tokens, attention_mask=mask)
    np.testing.assert_allclose(np.linalg.norm(got["embedding"], axis=1), 1, atol=1e-6)


def test_a_mask_of_another_length_is_named(made):
    given = {"token_embeddings": floats(1, 3, 4), "attention_mask": np.ones((1, 4), np.int64)}
    assert "'attention_mask' is for 4 tokens, there are 3" in making.wrong(made("pool_normalize"), **given)
    given = {"token_embeddings": floats(1, 0, 4), "attention_mask": np.ones((1, 0), np.int64)}
    assert "has no token" in making.wrong(made("pool_normalize", pooling="cls"), **given)


def test_embeddings_of_no_tokens_are_not_larger_than_any_model_has_them(made):
    """Without tokens, an input of no bytes claims any size of its embedding."""
    for size, tokens in ((1 << 31) - 1, 0), ((1 << 31) - 1, 5):
        given = {
            "token_embeddings": np.empty((64, 0, size), np.float32),
            "attention_mask": np.ones((64, tokens), np.int64),
        }
        results = making.rows(made("pool_normalize"), given)
        assert len(results.unfit) == 64
        assert results.values[0].nbytes == 0
    given = {"token_embeddings": floats(1, 0, 65_537), "attention_mask": np.ones((1, 0), np.int64)}
    assert making.wrong(made("pool_normalize"), **given) == (
        "input 'token_embeddings' has no tokens of 65537 numbers: expected at most 65536 numbers, or a token"
    )
    given = {"token_embeddings": floats(2, 0, 65_536), "attention_mask": np.ones((2, 0), np.int64)}
    assert not making.run(made("pool_normalize"), **given)["embedding"].any()


# softmax_topk


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_the_best_classes(made, activation):
    top = made("softmax_topk", k="3", activation=activation)
    logits = floats(4, 50) * 5
    outputs = making.run(top, logits=logits)
    making.check(top, outputs, 4)
    e = np.exp(logits - logits.max(1, keepdims=True))
    scores = {"softmax": e / e.sum(1, keepdims=True), "sigmoid": 1 / (1 + np.exp(-logits)), "none": logits}[activation]
    order = np.argsort(-logits, axis=1, kind="stable")[:, :3]
    assert outputs["indices"].tolist() == order.tolist()
    np.testing.assert_allclose(outputs["scores"], np.take_along_axis(scores, order, 1), atol=1e-6)


def test_classes_have_names(made, tmp_path):
    (tmp_path / "labels.txt").write_text("ant\nbee\ncät\n", encoding="utf-8")
    top = made("softmax_topk", k="9", labels="labels.txt")
    outputs = making.run(top, logits=np.array([[0, 1, 2]], np.float32))
    making.check(top, outputs, 1)
    assert [label.decode() for label in outputs["labels"][0]] == ["cät", "bee", "ant"]
    assert "has 4 classes, 'labels.txt' has 3 names" in making.wrong(top, logits=floats(1, 4))


def test_scores_that_are_no_numbers_do_no_harm(made):
    logits = np.array([[np.nan, 1, 2], [np.inf, 0, 0], [-np.inf] * 3, [1e38, -1e38, 0]], np.float32)
    for activation in ("softmax", "sigmoid", "none"):
        assert making.run(made("softmax_topk", activation=activation), logits=logits)["indices"].shape == (4, 3)


# quantize_rows


def test_quantized_rows_are_nearly_what_they_were(made):
    quantize = made("quantize_rows")
    values = floats(5, 33)
    outputs = making.run(quantize, values=values)
    making.check(quantize, outputs, 5)
    error = np.abs(outputs["quantized"] * outputs["scale"] - values).max(axis=1)
    assert (error <= np.abs(values).max(axis=1) / 254 * 1.0001).all()


# nms


def test_of_boxes_that_overlap_the_best_one_stays(made):
    nms = made("nms", iou_threshold="0.5")
    boxes = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 9]], np.float32)
    scores = np.array([0.5, 0.9, 0.1, 0.6], np.float32)
    outputs = making.run(nms, boxes=[boxes, boxes[:0]], scores=[scores, scores[:0]])
    making.check(nms, outputs, 2)
    assert [kept.tolist() for kept in outputs["keep"]] == [[1, 2], []]
    np.testing.assert_array_equal(outputs["boxes"][0], boxes[[1, 2]])
    classes = making.run(nms, boxes=[boxes], scores=[scores], classes=[np.array([0, 1, 1, 1], np.int32)])
    assert classes["keep"][0].tolist() == [1, 0, 2]


def test_few_and_good_boxes(made):
    boxes = np.array([[n * 20, 0, n * 20 + 9, 9] for n in range(20)], np.float32)
    scores = np.linspace(0, 1, 20, dtype=np.float32)
    got = making.run(made("nms", max_boxes="3", score_threshold="0.9"), boxes=[boxes], scores=[scores])
    assert got["keep"][0].tolist() == [19, 18]
    got = making.run(made("nms", max_boxes="3"), boxes=[boxes], scores=[scores])
    assert got["keep"][0].tolist() == [19, 18, 17]


def test_the_work_ends_with_the_last_box_that_is_kept(made, monkeypatch):
    """30,000 boxes that overlap nothing were compared with each other, though 300 are kept."""
    sizes = []

    def spied(*args, out, **options):
        sizes.append(len(out))
        return kernel(*args, out=out, **options)

    kernel = nms_operation.nms
    nms = made("nms")
    monkeypatch.setattr(nms_operation, "nms", spied)
    boxes = np.array([[n * 20, 0, n * 20 + 9, 9] for n in range(1000)], np.float32)
    scores = np.linspace(0, 1, 1000, dtype=np.float32)
    got = making.run(nms, boxes=[boxes, boxes[:7]], scores=[scores, scores[:7]])
    assert sorted(sizes) == [7, 300]
    assert [kept.tolist() for kept in got["keep"]] == [[*range(999, 699, -1)], [*range(6, -1, -1)]]


def test_boxes_without_their_scores_are_refused(made):
    nms = made("nms", max_candidates="5")
    assert "'scores' has 2 numbers for 3 boxes" in making.wrong(nms, boxes=[floats(3, 4)], scores=[floats(2)])
    assert "has 6, more than max_candidates, 5" in making.wrong(nms, boxes=[floats(6, 4)], scores=[floats(6)])


# tabular


def test_a_table_is_filled_scaled_and_encoded(made, tmp_path):
    fitted = {"mean": [1, 2], "std": [2, 0], "fill": [5, None], "categories": [[3, 7], [10, 20, 30]]}
    (tmp_path / "tabular.json").write_text(json.dumps(fitted))
    table = made("tabular")
    outputs = making.run(
        table,
        numbers=np.array([[3, 2], [np.nan, 4]], np.float32),
        codes=np.array([[7, 10], [4, 30]], np.int64),
    )
    making.check(table, outputs, 2)
    assert outputs["features"].tolist() == [[1, 0, 0, 1, 1, 0, 0], [2, 2, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("kind", ["numbers", "codes"])
def test_a_table_of_one_kind_of_columns(made, tmp_path, kind):
    fitted = {"mean": [1.0]} if kind == "numbers" else {"categories": [[5, 6]]}
    (tmp_path / "t.json").write_text(json.dumps(fitted))
    table = made("tabular", file="t.json")
    assert [spec.name for spec in table.inputs] == [kind]
    given = {spec.name: np.full((3, 1), 5, spec.datatype.dtype) for spec in table.inputs}
    assert making.run(table, **given)["features"].tolist() == ([[4]] * 3 if kind == "numbers" else [[1, 0]] * 3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "Expecting value"),
        ("[]", "tabular.json"),
        ("{}", "neither 'mean' nor 'categories'"),
        ('{"mean": ["a"]}', "'mean.0'"),
        ('{"mean": [1.0], "std": [1.0, 2.0]}', "std has 2"),
        ('{"mean": [1.0], "median": [1.0]}', "'median'"),
        ('{"categories": [[1, 1]]}', "distinct"),
    ],
)
def test_a_file_that_is_no_table(made, tmp_path, content, says):
    (tmp_path / "tabular.json").write_text(content)
    with pytest.raises(FailedPrecondition) as err:
        made("tabular")
    assert says in str(err.value)


# All of them


WRONG = {
    "pad_tokens": {"multiple_of": "0"},
    "pool_normalize": {"pooling": "max"},
    "softmax_topk": {"k": "0"},
    "nms": {"iou_threshold": "2"},
    "tabular": {"numbers": "INT8"},
    "quantize_rows": {"k": "1"},
}


@pytest.mark.parametrize("operation", WRONG)
def test_a_wrong_parameter_is_named(made, operation):
    with pytest.raises(FailedPrecondition, match=f"parameter '{next(iter(WRONG[operation]))}'"):
        made(operation, **WRONG[operation])


def test_an_unknown_operation_is_rejected_with_those_that_there_are(made):
    with pytest.raises(FailedPrecondition, match="operation 'resise' is unknown: there are 'byte_windows'"):
        made("resise")
    with pytest.raises(FailedPrecondition, match="parameter 'operation' is missing"):
        made("")
