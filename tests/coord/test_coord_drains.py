"""Drain marks and names of instances: pure rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.cluster.etcd import Entry
from mesh.cluster.membership import Instance, State
from services.coord.drains import drained, encode, key_of, mark_of, marks_of, obsolete, resolve
from shoal.errors import InvalidArgument, NotFound

ONE = Instance("infer", "local", "infer-0", "unix:/x", 10, State.READY, 100.0)
TWO = replace(ONE, instance="infer-1", pid=11)
FAR = replace(ONE, node="far")


def test_a_mark_is_bound_to_the_process():
    marks = (mark_of(ONE),)
    assert drained([ONE, TWO], marks) == {"local/infer-0"}
    assert drained([replace(ONE, pid=12)], marks) == frozenset()
    assert drained([replace(ONE, started_at=101.0)], marks) == frozenset()
    assert drained([replace(ONE, state=State.STARTING)], marks) == {"local/infer-0"}


def test_marks_survive_the_round_trip_and_junk_is_left_out():
    mark = mark_of(ONE)
    entries = {mark.key: encode(mark), key_of("a"): b"junk", key_of("b"): b"[]", key_of("c"): b'{"pid": {}}'}
    entries |= {b"/shoal/drains/\xff": b"{}", b"/shoal/instances/x": encode(mark)}
    assert marks_of({k: Entry(k, v, 1, 1, 0) for k, v in entries.items()}) == (mark,)


def test_names_may_be_short_where_that_is_clear():
    assert resolve("local/infer-0", [ONE, TWO, FAR]) == ONE
    assert resolve("infer-1", [ONE, TWO, FAR]) == TWO
    with pytest.raises(InvalidArgument, match="far/infer-0, local/infer-0"):
        resolve("infer-0", [ONE, TWO, FAR])
    with pytest.raises(NotFound, match="local/infer-1"):
        resolve("infer-9", [TWO])
    with pytest.raises(NotFound, match="none"):
        resolve("x" * 10_000, [])
    with pytest.raises(InvalidArgument, match="name"):
        resolve("", [ONE])


def test_a_mark_is_obsolete_when_its_process_is_replaced_or_long_gone():
    marks = (mark_of(ONE), mark_of(TWO))
    assert obsolete(marks, [ONE, TWO], {}, 0, 10) == ()
    assert obsolete(marks, [replace(ONE, pid=99), TWO], {}, 0, 10) == (mark_of(ONE),)
    assert obsolete(marks, [TWO], {ONE.name: 5.0}, 14.9, 10) == ()
    assert obsolete(marks, [TWO], {ONE.name: 5.0}, 15.0, 10) == (mark_of(ONE),)
