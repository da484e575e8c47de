"""RegisterModel, ListModels, RemoveModel, SetAlias, WatchModels: the promises of store.proto, over the wire."""

from __future__ import annotations

import asyncio
import hashlib

import grpc
import pytest
from grpc import StatusCode
from pymongo import AsyncMongoClient

from services.store.config import StoreConfig
from shoal.store.v1 import store_pb2 as pb
from tests.store.conftest import Store, on_shared_loop, refused, running_store, sha256, store_config, stored

pytestmark = pytest.mark.mongo

A, B, C = b"model a", b"model b", b"config"


def file(path: str, content: bytes, size: int | None = None) -> pb.ModelFile:
    return pb.ModelFile(path=path, sha256=sha256(content), size_bytes=len(content) if size is None else size)


def model(name: str = "m", version: int = 0, *files: pb.ModelFile, **fields: object) -> pb.ModelVersion:
    return pb.ModelVersion(name=name, version=version, files=files or [file("model.onnx", A)], **fields)


async def register(store: Store, *args: object, **kwargs: object) -> pb.RegisterModelResponse:
    return await store.stub.RegisterModel(pb.RegisterModelRequest(model=model(*args, **kwargs)))


async def listed(store: Store, name: str = "") -> list[pb.ModelVersion]:
    return list((await store.stub.ListModels(pb.ListModelsRequest(name=name))).models)


async def alias(store: Store, name: str, alias: str, version: int) -> pb.SetAliasResponse:
    return await store.stub.SetAlias(pb.SetAliasRequest(name=name, alias=alias, version=version))


async def test_a_version_is_registered_as_it_was_sent(store: Store) -> None:
    await stored(store, A, C)
    files = [file("model.onnx", A), file("../config.pbtxt", C), file("data/deep/größe.bin", A)]
    answer = await register(store, "resnet-50_v1.5", 3, *files, labels={"who": "me", "why": "", "ключ": "\0 ok"})
    assert not answer.existed
    got = answer.model
    assert (got.name, got.version) == ("resnet-50_v1.5", 3)
    assert list(got.files) == sorted(files, key=lambda f: f.path)
    lines = "".join(f"{f.path}\0{f.sha256}\n" for f in sorted(files, key=lambda f: f.path))
    assert got.content_digest == hashlib.sha256(lines.encode()).hexdigest()
    assert dict(got.labels) == {"who": "me", "why": "", "ключ": "\0 ok"}
    assert got.HasField("created_at")
    assert await listed(store) == [got]


async def test_versions_are_immutable(store: Store) -> None:
    await stored(store, A, B)
    first = await register(store, "m", 1)
    again = await register(store, "m", 1, labels={"other": "labels"})
    assert again.existed
    assert again.model == first.model
    other = model("m", 1, file("model.onnx", B))
    await refused(store.stub.RegisterModel(pb.RegisterModelRequest(model=other)), StatusCode.ALREADY_EXISTS, "1", "m")
    assert await listed(store) == [first.model]


async def test_version_0_is_the_next_number(store: Store) -> None:
    await stored(store, A, B)
    assert (await register(store, "m", 0)).model.version == 1
    again = await register(store, "m", 0)
    assert (again.model.version, again.existed) == (1, True)
    assert (await register(store, "m", 0, file("model.onnx", B))).model.version == 2
    back = await register(store, "m", 0)
    assert (back.model.version, back.existed) == (3, False)
    assert (await register(store, "m", 7, file("model.onnx", B))).model.version == 7
    assert (await register(store, "m", 0)).model.version == 8
    assert (await register(store, "other", 0)).model.version == 1


async def test_the_last_number(store: Store) -> None:
    await stored(store, A, B)
    last = (1 << 63) - 1
    assert (await register(store, "m", last)).model.version == last
    assert (await register(store, "m", 0)).existed
    await refused(register(store, "m", 0, file("model.onnx", B)), StatusCode.FAILED_PRECONDITION)


async def test_many_pushes_at_once_get_a_number_each(store: Store) -> None:
    contents = [b"%d" % n for n in range(12)]
    await stored(store, *contents)
    answers = await asyncio.gather(*(register(store, "m", 0, file("model.onnx", content)) for content in contents))
    assert sorted(answer.model.version for answer in answers) == list(range(1, 13))
    assert not any(answer.existed for answer in answers)


async def test_many_pushes_of_the_same_at_once_are_one(store: Store) -> None:
    await stored(store, A)
    answers = await asyncio.gather(*(register(store, "m", 0) for _ in range(8)))
    assert {answer.model.version for answer in answers} == {1}
    assert sum(not answer.existed for answer in answers) == 1
    assert len(await listed(store)) == 1


async def register_all(store: Store, *models: pb.ModelVersion) -> pb.RegisterModelResponse:
    return await store.stub.RegisterModel(pb.RegisterModelRequest(model=models[0], others=models[1:]))


async def test_several_versions_are_registered_together(store: Store) -> None:
    await stored(store, A, B)
    first = await register(store, "m", 2)
    versions = [model("m", 1, file("model.onnx", B)), model("m", 2), model("m", 3, file("model.onnx", B))]
    answer = await register_all(store, *versions)
    assert [each.existed for each in (answer, *answer.others)] == [False, True, False]
    assert answer.others[0].model == first.model
    assert [each.model for each in (answer, *answer.others)] == await listed(store)


async def test_of_several_versions_none_is_registered_when_one_cannot_be(store: Store) -> None:
    await stored(store, A, B)
    await register(store, "m", 2)
    other = model("m", 2, file("model.onnx", B))
    missing = model("m", 3, file("model.onnx", C))
    for last, status in ((other, StatusCode.ALREADY_EXISTS), (missing, StatusCode.NOT_FOUND)):
        await refused(register_all(store, model("m", 1), last), status, "")
    for second in (model("m", 0), model("m", 1), model("n", 2)):
        await refused(register_all(store, model("m", 1), second), StatusCode.INVALID_ARGUMENT, "")
    assert [each.version for each in await listed(store)] == [2]


async def test_pushes_of_the_same_versions_at_once_never_mix(store: Store) -> None:
    await stored(store, A, B)
    for at in range(5):
        name = f"m{at}"
        pushes = [
            register_all(store, *(model(name, number, file("model.onnx", content)) for number in numbers))
            for content, numbers in ((A, (1, 2, 3)), (B, (3, 2, 4)))
        ]
        outcomes = await asyncio.gather(*pushes, return_exceptions=True)
        [failed] = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
        assert failed.code() is StatusCode.ALREADY_EXISTS
        digests = {version.files[0].sha256 for version in await listed(store, name)}
        assert len(digests) == 1


async def test_files_must_be_stored(store: Store) -> None:
    await stored(store, A)
    await refused(register(store, "m", 1, file("a", A), file("b", B)), StatusCode.NOT_FOUND, "'b'", sha256(B))
    await refused(register(store, "m", 1, file("a", A, 1)), StatusCode.INVALID_ARGUMENT, "size_bytes", "'a'")
    assert await listed(store) == []
    # A size that is left out is filled in.
    assert (await register(store, "m", 1, file("a", A, 0))).model.files[0].size_bytes == len(A)


BAD_NAMES = ["", ".m", "-m", "_m", "m/n", "../m", "m\0", "m\n", "ü", "m n", "x" * 129, "m\\n"]


@on_shared_loop
@pytest.mark.parametrize("name", BAD_NAMES)
async def test_a_bad_name_is_named(shared_store: Store, name: str) -> None:
    await stored(shared_store, A)
    await refused(register(shared_store, name, 1), StatusCode.INVALID_ARGUMENT, "name")
    await refused(alias(shared_store, name, "stable", 1), StatusCode.INVALID_ARGUMENT, "name")
    await refused(shared_store.stub.RemoveModel(pb.RemoveModelRequest(name=name)), StatusCode.INVALID_ARGUMENT, "name")
    if name:
        await refused(listed(shared_store, name), StatusCode.INVALID_ARGUMENT, "name")
        await refused(
            shared_store.stub.WatchModels(pb.WatchModelsRequest(name=name)), StatusCode.INVALID_ARGUMENT, "name"
        )


@on_shared_loop
@pytest.mark.parametrize(
    "path",
    ["", "/", "/etc/passwd", "..", "../", "../..", "../../x", "a/../b", "a/..", "./a", "a/./b", "a//b", "a/", "a\\b",
     "a\0b", "a\nb", "../../../../etc/passwd", ".../..", "../2/model.onnx", "x" * 1025, "x" * 256, "é" * 128, ".",
     "..\\x"],
)  # fmt: skip
async def test_a_bad_path_is_named(shared_store: Store, path: str) -> None:
    await stored(shared_store, A)
    await refused(
        register(shared_store, "m", 1, file("ok", A), file(path, A)), StatusCode.INVALID_ARGUMENT, "files[1].path"
    )
    assert await listed(shared_store) == []


async def test_a_good_path_is_taken(store: Store) -> None:
    await stored(store, A)
    for path in ["a", "a.b", "...", "..a", "a..", "../a", "../a/b", "../v2/x", "a b", "x" * 255, "日本"]:
        assert (await register(store, "m", 0, file(path, A))).model.files[0].path == path


@on_shared_loop
async def test_other_bad_fields_are_named(shared_store: Store) -> None:
    await stored(shared_store, A)
    bad = StatusCode.INVALID_ARGUMENT
    await refused(register(shared_store, "m", -1), bad, "version", "-1")
    nothing = pb.RegisterModelRequest(model=pb.ModelVersion(name="m", version=1))
    await refused(shared_store.stub.RegisterModel(nothing), bad, "files")
    await refused(shared_store.stub.RegisterModel(pb.RegisterModelRequest()), bad, "name")
    await refused(register(shared_store, "m", 1, file("a", A), file("a", A)), bad, "twice")
    await refused(register(shared_store, "m", 1, file("a", A), file("a/b", A)), bad, "folder")
    await refused(register(shared_store, "m", 1, pb.ModelFile(path="a", sha256="xyz")), bad, "files[0].sha256")
    await refused(register(shared_store, "m", 1, file("a", A, -5)), bad, "files[0].size_bytes")
    await refused(register(shared_store, "m", 1, *(file(str(n), A) for n in range(4097))), bad, "files")
    await refused(register(shared_store, "m", 1, labels={str(n): "" for n in range(65)}), bad, "labels")
    await refused(register(shared_store, "m", 1, labels={"k" * 257: ""}), bad, "labels")
    await refused(register(shared_store, "m", 1, labels={"k": "v" * 257}), bad, "labels")
    await refused(register(shared_store, "m", 1, labels={"": "v"}), bad, "labels")
    assert await listed(shared_store) == []


async def test_the_largest_version_fits(store: Store) -> None:
    await stored(store, A)
    folder = "/".join(["é" * 100] * 9)
    files = [file(f"{folder}/{n:05}", A) for n in range(4096)]
    labels = {f"{n:02}" + "é" * 254: "é" * 256 for n in range(64)}
    answer = await register(store, "m", 1, *files, labels=labels)
    assert len(answer.model.files) == 4096
    assert await listed(store) == [answer.model]


async def test_lists_are_sorted_and_narrowed(store: Store) -> None:
    await stored(store, A, B)
    for name, version in [("b", 10), ("b", 9), ("a", 2), ("c", 1)]:
        await register(store, name, version)
    assert [(m.name, m.version) for m in await listed(store)] == [("a", 2), ("b", 9), ("b", 10), ("c", 1)]
    assert [(m.name, m.version) for m in await listed(store, "b")] == [("b", 9), ("b", 10)]
    assert await listed(store, "nothing") == []


async def test_aliases(store: Store) -> None:
    await stored(store, A, B)
    await register(store, "m", 1)
    await register(store, "m", 2, file("model.onnx", B))
    assert list((await alias(store, "m", "stable", 1)).model.aliases) == ["stable"]
    assert list((await alias(store, "m", "canary", 1)).model.aliases) == ["canary", "stable"]
    moved = (await alias(store, "m", "stable", 2)).model
    assert (moved.version, list(moved.aliases)) == (2, ["stable"])
    assert [list(m.aliases) for m in await listed(store)] == [["canary"], ["stable"]]
    assert not (await alias(store, "m", "canary", 0)).HasField("model")
    assert not (await alias(store, "m", "canary", 0)).HasField("model")
    assert [list(m.aliases) for m in await listed(store)] == [[], ["stable"]]
    again = await register(store, "m", 2, file("model.onnx", B))
    assert list(again.model.aliases) == ["stable"]


async def test_bad_aliases_are_named(store: Store) -> None:
    await stored(store, A)
    await register(store, "m", 1)
    for name in ["", "1", ".a", "-a", "a/b", "a b", "ä", "a" * 129, "a\0"]:
        await refused(alias(store, "m", name, 1), StatusCode.INVALID_ARGUMENT, "alias")
    await refused(alias(store, "m", "stable", -1), StatusCode.INVALID_ARGUMENT, "version")
    await refused(alias(store, "m", "stable", 2), StatusCode.NOT_FOUND, "m", "2")
    await refused(alias(store, "n", "stable", 1), StatusCode.NOT_FOUND, "n")


async def test_remove_takes_the_aliases_along(store: Store) -> None:
    await stored(store, A, B)
    for version, content in [(1, A), (2, B), (3, A)]:
        await register(store, "m", version, file("model.onnx", content))
    await register(store, "other", 1)
    await alias(store, "m", "stable", 2)
    removed = (await store.stub.RemoveModel(pb.RemoveModelRequest(name="m", version=2))).removed
    assert [(m.version, list(m.aliases)) for m in removed] == [(2, ["stable"])]
    await register(store, "m", 2, file("model.onnx", B))
    assert [list(m.aliases) for m in await listed(store, "m")] == [[], [], []]
    removed = (await store.stub.RemoveModel(pb.RemoveModelRequest(name="m"))).removed
    assert [m.version for m in removed] == [1, 2, 3]
    assert [m.name for m in await listed(store)] == ["other"]
    await refused(store.stub.RemoveModel(pb.RemoveModelRequest(name="m")), StatusCode.NOT_FOUND, "m")
    remove = pb.RemoveModelRequest(name="other", version=2)
    await refused(store.stub.RemoveModel(remove), StatusCode.NOT_FOUND, "other", "2")
    remove = pb.RemoveModelRequest(name="other", version=-2)
    await refused(store.stub.RemoveModel(remove), StatusCode.INVALID_ARGUMENT, "version")
    assert (await store.get(sha256(A)))[1] == A


async def test_no_alias_dangles_when_set_and_remove_race(store: Store, config: StoreConfig) -> None:
    await stored(store, A)
    for round_ in range(10):
        await register(store, "m", 1)
        set_, removed = await asyncio.gather(
            alias(store, "m", f"a{round_}", 1),
            store.stub.RemoveModel(pb.RemoveModelRequest(name="m", version=1)),
            return_exceptions=True,
        )
        assert not isinstance(removed, BaseException), removed
        if isinstance(set_, grpc.aio.AioRpcError):
            assert set_.code() == StatusCode.NOT_FOUND
    async with AsyncMongoClient(config.mongo) as client:
        assert await client[config.database].aliases.count_documents({}) == 0


async def test_a_watch_shows_the_whole_and_then_the_whole_again(store: Store) -> None:
    await stored(store, A, B)
    call = store.stub.WatchModels(pb.WatchModelsRequest(), timeout=60)
    assert list((await call.read()).snapshot) == []
    await register(store, "b", 1)
    assert [m.name for m in (await call.read()).snapshot] == ["b"]
    await register(store, "a", 1)
    assert [m.name for m in (await call.read()).snapshot] == ["a", "b"]
    await alias(store, "a", "stable", 1)
    assert [list(m.aliases) for m in (await call.read()).snapshot] == [["stable"], []]
    await store.stub.RemoveModel(pb.RemoveModelRequest(name="a"))
    snapshot = (await call.read()).snapshot
    while len(snapshot) != 1:
        snapshot = (await call.read()).snapshot
    assert [m.name for m in snapshot] == ["b"]
    # What is there when a watch begins is in its first message.
    late = store.stub.WatchModels(pb.WatchModelsRequest(), timeout=60)
    assert list((await late.read()).snapshot) == await listed(store)


async def test_a_watch_of_one_model_hears_of_no_other(store: Store) -> None:
    await stored(store, A, B)
    call = store.stub.WatchModels(pb.WatchModelsRequest(name="mine"), timeout=60)
    assert list((await call.read()).snapshot) == []
    await register(store, "other", 1)
    await register(store, "mine", 5)
    assert [(m.name, m.version) for m in (await call.read()).snapshot] == [("mine", 5)]


async def test_a_burst_ends_in_one_right_snapshot(store: Store) -> None:
    contents = [b"%d" % n for n in range(30)]
    await stored(store, *contents)
    watchers = [store.stub.WatchModels(pb.WatchModelsRequest(), timeout=60) for _ in range(5)]
    for watcher in watchers:
        await watcher.read()
    await asyncio.gather(*(register(store, "m", 0, file("model.onnx", content)) for content in contents))
    for watcher in watchers:
        sizes = [0]
        while sizes[-1] < 30:
            sizes.append(len((await watcher.read()).snapshot))
        assert sizes == sorted(sizes)


async def test_a_change_through_one_store_is_seen_through_another(store: Store, config: StoreConfig) -> None:
    socket = config.listen.removeprefix("unix:").replace("store-0", "store-1")
    second = store_config(config.mongo, config.database, socket, store.root, instance="store-1")
    async with running_store(second) as other:
        call = other.stub.WatchModels(pb.WatchModelsRequest(), timeout=60)
        assert list((await call.read()).snapshot) == []
        await stored(store, A)
        await register(store, "m", 0)
        assert [m.name for m in (await call.read()).snapshot] == ["m"]
        assert (await other.get(sha256(A)))[1] == A
