"""Unfinished uploads: kept, locked, resumed, copied from, and swept."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.store.artifacts.staging import Partial, Staging
from shoal.errors import FailedPrecondition, Internal, ResourceExhausted

A, B = "a" * 64, "b" * 64
NOW = 1_000_000.0


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path, max_uploads=3, max_age_s=100)


def touched(staging: Staging, at: float) -> None:
    for path in staging.folder.iterdir():
        os.utime(path, (at, at))


def left(staging: Staging, digest: str, data: bytes, at: float = NOW) -> Path:
    partial = staging.begin(digest, NOW)
    partial.append(data)
    partial.suspend()
    os.utime(partial.path, (at, at))
    return partial.path


def caught_up(partial: Partial) -> Partial:
    while not partial.catch_up():
        pass
    return partial


def test_an_upload_that_stopped_is_gone_on_with(staging: Staging) -> None:
    left(staging, A, b"abc")
    assert staging.received(A) == 3
    assert staging.received(B) == 0
    partial = caught_up(staging.resume(A, 3, NOW))
    partial.append(b"def")
    assert partial.finish() == hashlib.sha256(b"abcdef").hexdigest()
    assert partial.path.read_bytes() == b"abcdef"
    partial.discard()
    assert list(staging.folder.iterdir()) == []


def test_a_large_upload_is_caught_up_with_in_steps(staging: Staging) -> None:
    data = os.urandom((33 << 20) + 5)
    left(staging, A, data)
    partial = staging.resume(A, len(data), NOW)
    assert [partial.catch_up() for _ in range(3)] == [False, False, True]
    assert partial.finish() == hashlib.sha256(data).hexdigest()
    partial.discard()


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_an_offset_where_nothing_stopped(staging: Staging, offset: int) -> None:
    left(staging, A, b"abc")
    with pytest.raises(FailedPrecondition, match="resume at 3"):
        staging.resume(A, offset, NOW)
    with pytest.raises(FailedPrecondition, match="resume at 0"):
        staging.resume(B, offset, NOW)
    assert staging.received(A) == 3


def test_a_file_that_is_still_held_is_copied_from(staging: Staging) -> None:
    held = staging.begin(A, NOW)
    held.append(b"abcdef")
    copy = caught_up(staging.resume(A, 4, NOW))
    assert copy.path != held.path
    copy.append(b"XY")
    held.append(b"g")
    assert copy.path.read_bytes() == b"abcdXY"
    assert held.path.read_bytes() == b"abcdefg"
    assert copy.finish() == hashlib.sha256(b"abcdXY").hexdigest()
    with pytest.raises(FailedPrecondition):
        staging.resume(A, 8, NOW)
    held.suspend()
    copy.suspend()
    assert staging.received(A) == 7


def test_a_copy_that_is_broken_off_keeps_what_it_has(staging: Staging) -> None:
    held = staging.begin(A, NOW)
    held.append(bytes(20 << 20))
    copy = staging.resume(A, 18 << 20, NOW)
    assert not copy.catch_up()
    copy.suspend()
    assert copy.path.stat().st_size == 16 << 20
    held.discard()
    assert staging.received(A) == 16 << 20


def test_two_uploads_from_the_start_have_a_file_each(staging: Staging) -> None:
    one, two = staging.begin(A, NOW), staging.begin(A, NOW)
    one.append(b"one")
    two.append(b"no. 2")
    assert (one.path.read_bytes(), two.path.read_bytes()) == (b"one", b"no. 2")
    staging.forget(A)
    assert one.path.exists()
    assert two.path.exists()
    one.suspend()
    staging.forget(A)
    assert not one.path.exists()
    two.discard()


def test_the_longest_untouched_goes_first(staging: Staging) -> None:
    old = left(staging, A, b"old", NOW - 3)
    older = left(staging, B, b"older", NOW - 5)
    new = left(staging, A, b"new", NOW - 1)
    fresh = staging.begin(B, NOW)
    assert not older.exists()
    assert old.exists()
    assert new.exists()
    fresh.discard()


def test_uploads_under_way_are_never_swept(staging: Staging) -> None:
    live = [staging.begin(A, NOW) for _ in range(3)]
    touched(staging, NOW - 10_000)
    with pytest.raises(ResourceExhausted, match="3 uploads") as refused:
        staging.begin(B, NOW)
    assert refused.value.retry_after_ms
    staging.sweep(NOW)
    assert all(partial.path.exists() for partial in live)
    live.pop().suspend()
    staging.begin(B, NOW).discard()
    for partial in live:
        partial.discard()


def test_a_tenant_takes_the_places_of_others_neither_in_progress_nor_left(staging: Staging) -> None:
    mine, other = f"{A}-{'1' * 16}", f"{A}-{'2' * 16}"
    theirs = left(staging, other, b"theirs", NOW - 90)
    # Alone beside one other it has one place of three in progress; the last one is for others.
    live = staging.begin(mine, NOW)
    with pytest.raises(ResourceExhausted, match=r"this tenant's uploads \(1\) are in progress"):
        staging.begin(mine, NOW)
    live.suspend()
    mine_left = live.path
    fresh = staging.begin(mine, NOW)
    assert not mine_left.exists()
    assert theirs.exists()
    fresh.suspend()
    services = staging.begin(A, NOW)
    services.suspend()
    # Full: a tenant that has none takes the place of whoever has the most.
    more = staging.begin(f"{B}-{'3' * 16}", NOW)
    assert len(list(staging.folder.iterdir())) == 3
    more.discard()


def test_the_tenant_with_the_most_uploads_loses_one_first(tmp_path: Path) -> None:
    staging = Staging(tmp_path, max_uploads=6, max_age_s=100)
    many, few, new = (f"{A}-{n * 16}" for n in "123")
    lost = [left(staging, many, b"many", NOW - n) for n in (30, 20, 10)]
    kept = [left(staging, few, b"few", NOW - 90), left(staging, A, b"of no tenant", NOW - 80)]
    left(staging, A, b"of no tenant", NOW - 70)
    staging.begin(new, NOW).discard()
    assert [path.exists() for path in lost + kept] == [False, True, True, True, True]


def test_uploads_leave_free_space_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mongod with a full disk ends itself, and on a node it has the same disk."""
    staging = Staging(tmp_path, max_uploads=3, max_age_s=100, min_free_bytes=1 << 30)
    real, free = os.fstatvfs, [(1 << 30) + 5]

    def nearly_full(fd: int) -> Any:
        return SimpleNamespace(f_bavail=free[0], f_frsize=1, f_bsize=real(fd).f_bsize)

    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    partial = staging.begin(A, NOW)
    partial.append(b"abcde")
    with pytest.raises(ResourceExhausted, match="1024 MiB left, of which 1024 MiB are not for uploads"):
        partial.append(b"abcdef")
    partial.append(b"")
    assert partial.path.read_bytes() == b"abcde"
    # A copy of an upload that is still held takes as much again.
    free[0] = (1 << 30) + 4
    copy = staging.resume(A, 5, NOW)
    with pytest.raises(ResourceExhausted, match="not for uploads"):
        copy.catch_up()
    copy.suspend()
    free[0] = 2 << 30
    partial.append(b"f")
    partial.suspend()
    gone_on = caught_up(staging.resume(A, 6, NOW))
    assert gone_on.finish() == hashlib.sha256(b"abcdef").hexdigest()
    gone_on.discard()


def test_what_is_too_old_is_swept(staging: Staging) -> None:
    left(staging, A, b"old", NOW - 101)
    kept = left(staging, B, b"new", NOW - 99)
    (staging.folder / "x.tmp").write_bytes(b"a write that was killed")
    os.utime(staging.folder / "x.tmp", (NOW - 101, NOW - 101))
    (staging.folder / "y.tmp").write_bytes(b"a write that is under way")
    os.utime(staging.folder / "y.tmp", (NOW, NOW))
    staging.sweep(NOW)
    assert sorted(staging.folder.iterdir()) == sorted([kept, staging.folder / "y.tmp"])


def test_a_failed_write_leaves_what_was_there(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = staging.begin(A, NOW)
    partial.append(b"abc")
    real, calls = os.pwrite, []

    def half_then_full(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(fd, data[: len(data) // 2], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half_then_full)
        with pytest.raises(ResourceExhausted, match="full"):
            partial.append(b"defgh")
    assert calls == [3, 5]
    assert partial.path.read_bytes() == b"abc"
    partial.append(b"d")
    assert partial.finish() == hashlib.sha256(b"abcd").hexdigest()
    partial.discard()


def test_a_short_write_is_gone_on_with(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:2], offset))
    partial = staging.begin(A, NOW)
    partial.append(b"abcdefg")
    assert partial.path.read_bytes() == b"abcdefg"
    partial.discard()


def test_a_disk_that_fails(staging: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = staging.begin(A, NOW)

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(Internal, match="Input/output"):
        partial.finish()
    partial.suspend()
    partial.close()


def test_an_upload_that_nobody_holds_lets_go(staging: Staging) -> None:
    path = staging.begin(A, NOW).path
    staging.forget(A)
    assert not path.exists()
