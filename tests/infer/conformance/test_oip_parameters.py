"""Parameters of requests and outputs: known ones of each type, wrong types, reserved names, and the model's own."""

from __future__ import annotations

import numpy as np
import pytest

from tests.infer.conformance import wire

KINDS = ("bool_param", "int64_param", "string_param", "double_param", "uint64_param")
VALUES = {"bool_param": True, "int64_param": 1, "string_param": "1", "double_param": 1.0, "uint64_param": 1}
TYPES = {
    "timeout": {"int64_param"},
    "priority": {"uint64_param", "int64_param"},
    "sequence_start": {"bool_param"},
    "sequence_end": {"bool_param"},
    "explain": {"bool_param"},
    "triton_enable_empty_final_response": {"bool_param"},
}
"""What each parameter may be. All that clients send: `priority` as uint64, `timeout` as int64."""

DOUBLED = [2, 4, 6, 8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TYPES)
def test_each_parameter_with_each_type(infer, refused, name, kind):
    # A timeout of a microsecond may expire in an idle queue already: a minute cannot.
    value = 60_000_000 if (name, kind) == ("timeout", "int64_param") else VALUES[kind]
    parameters = {name: (kind, value)}
    if kind in TYPES[name]:
        assert wire.array(infer("double", wire.floats(), parameters=parameters), "y")[0].tolist() == DOUBLED
    else:
        message = refused("INVALID_ARGUMENT", wire.request("double", wire.floats(), parameters=parameters))
        assert f"'{name}'" in message
        assert kind in message


@pytest.mark.parametrize("name", ["triton_secret", "triton_", "triton_final_response", "triton_enable_empty"])
@pytest.mark.parametrize("kind", KINDS)
def test_reserved_names_are_refused(refused, name, kind):
    asked = wire.request("double", wire.floats(), parameters={name: (kind, VALUES[kind])})
    assert f"'{name}'" in refused("INVALID_ARGUMENT", asked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mine", "Triton_x", "x-triton_", "binary_data_output", "", "n" * 200])
def test_other_names_are_the_model_s_own(infer, name, kind):
    response = infer("double", wire.floats(), parameters={name: (kind, VALUES[kind])})
    assert wire.array(response, "y")[0].tolist() == DOUBLED


def test_a_parameter_without_a_value(infer, refused):
    asked = wire.request("double", wire.floats())
    asked.parameters["timeout"].SetInParent()
    assert "'timeout'" in refused("INVALID_ARGUMENT", asked)


@pytest.mark.parametrize("value", [2**64 - 1, 2**63, 0])
def test_the_whole_of_uint64(infer, value):
    """Protos of KServe, MLServer and OVMS lack `uint64_param`: there it would be lost without a word."""
    response = infer("double", wire.floats(), parameters={"priority": ("uint64_param", value)})
    assert wire.array(response, "y")[0].tolist() == DOUBLED


@pytest.mark.parametrize(("name", "value"), [("timeout", -1), ("priority", -5)])
def test_what_cannot_be_negative(refused, name, value):
    message = refused("INVALID_ARGUMENT", wire.request("double", wire.floats(), parameters={name: value}))
    assert f"'{name}'" in message
    assert str(value) in message


def test_the_id_and_the_version_come_back(infer):
    for id in ("", "r-1", "ünïcödé", "i" * 4096):
        response = infer("double", wire.floats(), id=id)
        assert (response.id, response.model_name, response.model_version) == (id, "double", "1")


@pytest.mark.parametrize(("version", "factor"), [("", 3), ("1", 1), ("2", 2), ("3", 3)])
def test_the_requested_version_responds(infer, version, factor):
    response = infer("versions", wire.floats(), version=version)
    assert response.model_version == str(factor)
    assert wire.array(response, "y")[0].tolist() == [factor * n for n in (1, 2, 3, 4)]


def test_explain_says_who_and_how_long(infer):
    response = infer("double", wire.floats(rows=3), parameters={"explain": True})
    assert response.parameters["replica"].string_param
    assert response.parameters["version"].WhichOneof("parameter_choice")
    assert response.parameters["batch_size"].int64_param >= 3
    assert response.parameters["queue_us"].int64_param >= 0
    assert response.parameters["compute_us"].int64_param >= 0
    assert not infer("double", wire.floats()).parameters


@pytest.mark.parametrize("where", ["input", "output"])
@pytest.mark.parametrize("name", ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"])
def test_shared_memory_is_refused_wherever_it_is_asked_for(refused, where, name):
    asked = wire.request("double", wire.floats(), outputs=["y"])
    tensor = asked.inputs[0] if where == "input" else asked.outputs[0]
    wire.put(tensor.parameters[name], "region" if name.endswith("region") else 16)
    assert "shared memory" in refused("UNIMPLEMENTED", asked)


def test_binary_data_of_the_http_form_means_nothing_here(stub):
    asked = wire.request("double", wire.floats(), outputs=["y"])
    wire.put(asked.inputs[0].parameters["binary_data_size"], 16)
    wire.put(asked.outputs[0].parameters["binary_data"], True)
    response = stub.ModelInfer(asked, timeout=wire.PATIENCE_S)
    assert wire.array(response, "y")[0].tolist() == DOUBLED


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_every_row_is_returned_in_its_place(infer, rows):
    got = wire.array(infer("double", wire.floats(rows=rows)), "y")
    assert np.array_equal(got.reshape(-1), 2 * np.arange(1, 4 * rows + 1))
