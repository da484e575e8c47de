"""What config.pbtxt says about the queue: read, and refused by name."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.infer.loading import model_config
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.scheduling import rules
from services.infer.scheduling.rules import Level, Rules
from shoal.errors import FailedPrecondition


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


REFUSED = {
    parameter("slo_ms", ""): "parameter slo_ms ''",
    parameter("slo_ms", "0"): "parameter slo_ms '0'",
    parameter("slo_ms", "-5"): "slo_ms",
    parameter("slo_ms", "fast"): "slo_ms 'fast': expected milliseconds",
    parameter("slo_ms", "nan"): "slo_ms",
    parameter("slo_ms", "1e3"): "slo_ms",
    parameter("slo_ms", "3600001"): "slo_ms",
    parameter("slo_ms", "٥"): "slo_ms",
    parameter("priority_aging_ms", "soon"): "priority_aging_ms",
    parameter("tenant_weights", "gold"): "tenant_weights 'gold'",
    parameter("tenant_weights", "gold=0"): "tenant_weights",
    parameter("tenant_weights", "gold=-1"): "tenant_weights",
    parameter("tenant_weights", "=1"): "tenant_weights",
    parameter("tenant_weights", "a=1,,b=2"): "tenant_weights",
    parameter("tenant_weights", "a=1,a=2"): "tenant 'a' is there twice",
    parameter("tenant_weights", "a=inf"): "tenant_weights",
    "dynamic_batching { priority_levels: 2 }": "default_priority_level 0: expected 1 to priority_levels, 2",
    "dynamic_batching { priority_levels: 2 default_priority_level: 3 }": "default_priority_level 3",
    "dynamic_batching { default_priority_level: 2 }": "there are no priority_levels",
    "dynamic_batching { priority_levels: 18446744073709551615 }": "priority_levels 18446744073709551615",
    "dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value {} } }": (
        "priority_queue_policy 3: expected 1 to"
    ),
    "dynamic_batching { priority_queue_policy { key: 1 value {} } }": "priority_queue_policy 1",
    "dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }": "preserve_ordering",
    "dynamic_batching { preserve_ordering: true default_queue_policy { timeout_action: DELAY "
    "default_timeout_microseconds: 5 } }": "preserve_ordering does not go with timeout_action DELAY",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_by_name(text):
    with pytest.raises(FailedPrecondition) as err:
        model_config.check(model_config.parse(text), OnnxRuntime())
    assert REFUSED[text] in err.value.message


def read(text: str) -> Rules:
    config = model_config.parse(text)
    model_config.check(config, OnnxRuntime())
    return rules.of(config)


def test_rules_of_an_empty_configuration():
    assert read("") == read("max_batch_size: 8 dynamic_batching {}") == Rules()
    assert rules.slo_s(model_config.parse("")) == math.inf


def test_rules_of_a_full_configuration():
    got = read(
        """max_batch_size: 8
        dynamic_batching {
          priority_levels: 3 default_priority_level: 2
          default_queue_policy { default_timeout_microseconds: 2000 allow_timeout_override: true max_queue_size: 7 }
          priority_queue_policy { key: 1 value { timeout_action: DELAY default_timeout_microseconds: 50 } }
        }"""
        + parameter("tenant_weights", " gold=4, free = 1.5,a=b=2")
        + parameter("priority_aging_ms", "0")
    )
    default = Level(timeout_s=0.002, delays=False, allows_override=True, calls=7)
    assert got == Rules(
        levels=(Level(timeout_s=50e-6, delays=True, allows_override=False), default, default),
        default_level=1,
        aging_s=math.inf,
        weights={"gold": 4.0, "free": 1.5, "a=b": 2.0},
    )
    # As Triton has it: 0 and what is out of range mean the default.
    assert [got.level(priority) for priority in (0, 1, 2, 3, 4, 2**64 - 1)] == [1, 0, 1, 2, 1, 1]


def test_a_timeout_of_the_request_counts_unless_the_model_has_one_of_its_own():
    text = "dynamic_batching { default_queue_policy { max_queue_size: 5 } }"
    assert read(text).levels[0].allows_override
    text = "dynamic_batching { default_queue_policy { default_timeout_microseconds: 5 } }"
    assert not read(text).levels[0].allows_override


@given(st.text(max_size=40))
def test_any_text_is_read_or_rejected(text):
    config = model_config.parse("")
    for key in ("slo_ms", "tenant_weights", "priority_aging_ms"):
        config.parameters[key].string_value = text
    if not list(rules.wrong(config)):
        assert rules.slo_s(config) > 0
        assert rules.of(config).aging_s > 0
