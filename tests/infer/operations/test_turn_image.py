"""Images are turned as their class says, when it is sure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import FailedPrecondition
from tests.infer.operations import making


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=5),
    scores=st.lists(st.sampled_from([0.0, 0.5, 0.9, 0.95, np.nan]), min_size=20, max_size=20),
)
def test_each_row_is_turned_by_its_own_class(tmp_path_factory, sizes, scores):
    made = making.session(tmp_path_factory.getbasetemp(), "turn_image", turns="0, 3, 2, 1")
    images = [np.random.default_rng(n).integers(0, 256, (*size, 3), np.uint8) for n, size in enumerate(sizes)]
    given = np.array(scores, np.float32).reshape(5, 4)[: len(images)]
    outputs = making.run(made, image=images, scores=given)
    making.check(made, outputs, len(images))
    for image, row, got in zip(images, given, outputs["image"], strict=True):
        is_sure = not np.isnan(row).any() and row.max() > np.float32(0.9)
        turn = (0, 3, 2, 1)[int(row.argmax())] if is_sure else 0
        np.testing.assert_array_equal(got, np.rot90(image, turn))


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"turns": "0, 4"}, "parameter 'turns' '0, 4': expected quarter turns, 0 to 3"),
        ({"turns": "left"}, "parameter 'turns' 'left'"),
        ({"threshold": "-1"}, "parameter 'threshold' '-1'"),
    ],
)
def test_wrong_parameters_are_named(tmp_path, parameters, says):
    with pytest.raises(FailedPrecondition, match=says.replace("'", ".")):
        making.session(tmp_path, "turn_image", **parameters)
