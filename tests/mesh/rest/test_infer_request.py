"""The message of an inference over REST: members that are null or zero, and members that are given twice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mesh.rest.infer_request import Wanted, check_sequence, read
from mesh.rest.target import Target
from shoal.errors import InvalidArgument
from shoal.inference.v2 import inference_pb2 as pb

INPUT = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}


async def message_of(document: Any) -> pb.ModelInferRequest:
    message, _ = await read(document, memoryview(b""), Target("infer", "", "m"), Wanted())
    return message


async def test_parameters_of_a_tensor_may_be_null() -> None:
    message = await message_of(
        {"inputs": [{**INPUT, "parameters": None}], "outputs": [{"name": "y", "parameters": None}]}
    )
    assert not message.inputs[0].parameters
    assert not message.outputs[0].parameters


async def test_a_classification_of_no_classes_is_none() -> None:
    for classes, names in ((0, []), (False, ["classification"]), (0.0, ["classification"]), (2, ["classification"])):
        output = {"name": "y", "parameters": {"classification": classes}}
        assert [*(await message_of({"inputs": [INPUT], "outputs": [output]})).outputs[0].parameters] == names


@pytest.mark.parametrize(
    ("text", "is_refused"),
    [
        (b'{"sequence_id": 1, "sequence_id": 2}', True),
        (b'{"sequence_id": 1, "a": {"sequence_id"\n:2}}', True),
        (b'{"sequence_id": 1}', False),
        (b'{"a": "sequence_id", "b": "\\"sequence_id\\": 5", "sequence_id": 1}', False),
    ],
)
def test_a_step_has_its_sequence_once(text: bytes, is_refused: bool) -> None:
    step = pb.ModelInferRequest()
    step.parameters["sequence_id"].int64_param = json.loads(text)["sequence_id"]
    check_sequence(pb.ModelInferRequest(), text)
    if not is_refused:
        check_sequence(step, text)
        return
    with pytest.raises(InvalidArgument, match="'sequence_id' more than once: send it once"):
        check_sequence(step, text)
