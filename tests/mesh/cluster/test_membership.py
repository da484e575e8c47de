"""Membership: what an instance's key says, and what survives of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mesh.cluster.etcd import Entry
from mesh.cluster.membership import Instance, ReadyModel, State, decode, encode, view_of
from mesh.cluster.mirror import Copy

INFER = Instance(
    service="infer",
    node="local",
    instance="infer-0",
    address="unix:/tmp/shoal-x/infer-0.sock",
    pid=42,
    state=State.READY,
    started_at=1_700_000_000.25,
    models=(ReadyModel("magika", (1, 3)), ReadyModel("stateful", (2,), has_sequences=True)),
    version="0.1.0",
)


def entry(key: bytes, value: bytes) -> Entry:
    return Entry(key, value, 1, 1, 0)


def test_an_instance_survives_the_round_trip():
    assert decode(INFER.key, encode(INFER)) == INFER
    assert INFER.name == "local/infer-0"
    assert INFER.key == b"/shoal/instances/infer/local/infer-0"


def test_fields_of_a_newer_version_are_left_out():
    raw = {**json.loads(encode(INFER)), "zone": "b", "models": [{"name": "m", "versions": [2, 1], "device": 3}]}
    assert decode(INFER.key, json.dumps(raw).encode()).models == (ReadyModel("m", (1, 2)),)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pid", "42"),
        ("pid", -1),
        ("pid", True),
        ("pid", 1 << 63),
        ("state", "sleeping"),
        ("state", None),
        ("address", 7),
        ("started_at", "now"),
        ("started_at", 1e300),
        ("models", {"magika": 1}),
        ("models", [{"versions": [1]}]),
        ("models", [{"name": "m", "versions": ["1"]}]),
        ("models", [{"name": "m", "versions": [1], "has_sequences": 1}]),
        ("node", "elsewhere"),
        ("service", None),
        ("version", 1),
    ],
)
def test_a_wrong_field_is_named(field, value):
    raw = {**json.loads(encode(INFER)), field: value}
    with pytest.raises(ValueError, match=r"."):
        decode(INFER.key, json.dumps(raw).encode())


@pytest.mark.parametrize("value", [b"", b"not json", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b"NaN"])
def test_what_cannot_be_read_is_left_out_of_the_view(value):
    good, bad = INFER.key, b"/shoal/instances/infer/local/infer-1"
    copy = Copy({good: entry(good, encode(INFER)), bad: entry(bad, value)}, 7, stale=False)
    view = view_of(copy)
    assert view.instances == (INFER,)
    assert (view.revision, view.stale) == (7, False)


def test_the_view_is_sorted_by_service_and_name():
    others = [replace(INFER, service=s, instance=i) for s, i in [("store", "store-0"), ("coord", "coord-1")]]
    copy = Copy({i.key: entry(i.key, encode(i)) for i in [*others, INFER]}, 7, stale=False)
    assert [i.instance for i in view_of(copy).instances] == ["coord-1", "infer-0", "store-0"]
