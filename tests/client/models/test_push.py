"""Models into a store that breaks on purpose, and out of it."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import shoal
from shoal.client import AsyncClient, Progress
from shoal.client.models import bundle
from shoal.client.models.readiness import Poll, ReadinessWait, VersionReadiness
from shoal.client.models.upload import CHUNK_BYTES
from shoal.client.transport import methods
from shoal.client.transport.retry import RetryPolicy
from shoal.coord.v1 import coord_pb2 as coord
from shoal.errors import (
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from shoal.inference.v2 import inference_pb2 as oip
from shoal.inference.v2 import trial_pb2 as trial
from shoal.store.v1 import store_pb2 as store
from tests.client.served import Served

QUICK = RetryPolicy(attempts=3, first_wait_s=0.001, longest_wait_s=0.01)


class Store:
    """A store that keeps everything in memory, and fails as it is told: `break_after` bytes of each upload."""

    def __init__(self, served: Served) -> None:
        self.whole: dict[str, bytes] = {}
        self.partial: dict[str, bytes] = {}
        self.models: list[store.ModelVersion] = []
        self.break_after: list[int] = []
        self.offsets: list[int] = []
        self.corrupt = False
        served.on(methods.STAT_ARTIFACT, self.stat)
        served.on(methods.PUT_ARTIFACT, self.put, "stream_unary")
        served.on(methods.GET_ARTIFACT, self.get, "unary_stream")
        served.on(methods.REGISTER_MODEL, self.register)
        served.on(methods.LIST_MODELS, self.list)
        self.tried: list[tuple[str, int]] = []
        self.trials: dict[str, list[str]] = {}
        """Outcomes of the next trials of a model: the reason of a failure, `dies`, or `away`."""
        served.on(methods.TRY_MODEL, self.try_model, "unary_stream")

    async def try_model(self, request: Any, context: Any) -> Any:
        model = store.ModelVersion.FromString(request.model)
        assert all(file.sha256 in self.whole for file in model.files)
        self.tried.append((model.name, model.version))
        [outcome, *self.trials[model.name]] = self.trials.get(model.name) or ["passes"]
        instance = f"local/infer-{len(self.tried) % 2}"
        if outcome == "away":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no healthy upstream")
        yield trial.TryModelResponse(instance=instance, pid=7)
        if outcome == "dies":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "upstream connect error: connection termination")
        if outcome != "passes":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, outcome)
        yield trial.TryModelResponse(instance=instance, passed=True)

    async def stat(self, request: Any, context: Any) -> Any:
        if request.sha256 in self.whole:
            size = len(self.whole[request.sha256])
            artifact = store.Artifact(sha256=request.sha256, size_bytes=size)
            return store.StatArtifactResponse(artifact=artifact, received_bytes=size)
        if request.sha256 in self.partial:
            return store.StatArtifactResponse(received_bytes=len(self.partial[request.sha256]))
        return await context.abort(grpc.StatusCode.NOT_FOUND, "nothing of it")

    async def put(self, requests: AsyncIterator[Any], context: Any) -> Any:
        header = (await anext(requests)).header
        self.offsets.append(header.offset)
        if header.sha256 in self.whole:
            return store.PutArtifactResponse(artifact=store.Artifact(sha256=header.sha256), existed=True)
        got = self.partial.get(header.sha256, b"")[: header.offset]
        limit = self.break_after.pop(0) if self.break_after else None
        if limit == 0:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
        async for request in requests:
            got += request.chunk
            self.partial[header.sha256] = got
            if limit is not None and len(got) >= limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
        if hashlib.sha256(got).hexdigest() != header.sha256:
            del self.partial[header.sha256]
            await context.abort(grpc.StatusCode.DATA_LOSS, "the bytes do not hash to sha256")
        self.whole[header.sha256] = got
        return store.PutArtifactResponse(artifact=store.Artifact(sha256=header.sha256, size_bytes=len(got)))

    async def get(self, request: Any, context: Any) -> Any:
        data = self.whole[request.sha256][request.offset :]
        yield store.GetArtifactResponse(size_bytes=len(data) + request.offset)
        limit = self.break_after.pop(0) if self.break_after else None
        for at in range(0, len(data), 1000):
            if limit is not None and at >= limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
            chunk = data[at : at + 1000]
            yield store.GetArtifactResponse(chunk=b"!" + chunk[1:] if self.corrupt else chunk)

    async def register(self, request: Any, context: Any) -> Any:
        responses = []
        for model in (request.model, *request.others):
            known = next((m for m in self.models if (m.name, m.version) == (model.name, model.version)), None)
            if known and [file.sha256 for file in known.files] != [file.sha256 for file in model.files]:
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, "version 1 has other content")
            number = model.version or 1 + max((m.version for m in self.models if m.name == model.name), default=0)
            model.version = number
            responses.append(store.RegisterModelResponse(model=known or model, existed=known is not None))
        self.models += [response.model for response in responses if not response.existed]
        responses[0].others.extend(responses[1:])
        return responses[0]

    async def list(self, request: Any, context: Any) -> Any:
        return store.ListModelsResponse(models=[m for m in self.models if request.name in ("", m.name)])


@pytest.fixture
def kept(served: Served) -> Store:
    return Store(served)


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "digits.onnx"
    path.write_bytes(bytes(range(256)) * 4096 * 3 + b"end")  # 3 MiB and 3 bytes.
    return path


def client_of(served: Served) -> AsyncClient:
    return AsyncClient(served.address, retry=QUICK)


async def test_a_bare_file_is_uploaded_registered_and_not_sent_twice(served: Served, kept: Store, onnx: Path) -> None:
    heard: list[Progress] = []
    async with client_of(served) as client:
        [pushed] = await client.models.push(onnx, labels={"by": "ada"}, progress=heard.append, wait=False)
        assert (pushed.model.name, pushed.model.version, pushed.existed) == ("digits", 1, False)
        assert pushed.sent_bytes == pushed.model.size_bytes == onnx.stat().st_size
        assert [file.path for file in pushed.model.files] == ["model.onnx"]
        assert pushed.model.labels == {"by": "ada"}
        done = [progress.done_bytes for progress in heard]
        assert done == sorted(done)
        assert done[-1] == heard[-1].total_bytes == onnx.stat().st_size
        [again] = await client.models.push(onnx, name="digits", version=1, wait=False)
        assert (again.existed, again.sent_bytes) == (True, 0)
        assert served.count(methods.PUT_ARTIFACT) == 1


async def test_a_broken_upload_is_resumed(served: Served, kept: Store, onnx: Path) -> None:
    kept.break_after = [CHUNK_BYTES, 2 * CHUNK_BYTES]
    async with client_of(served) as client:
        await client.models.push(onnx, wait=False)
    assert kept.offsets == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert next(iter(kept.whole.values())) == onnx.read_bytes()


async def test_an_upload_without_progress_is_an_error(served: Served, kept: Store, onnx: Path) -> None:
    kept.break_after = [0] * 99
    kept.partial[hashlib.sha256(onnx.read_bytes()).hexdigest()] = onnx.read_bytes()[: 3 * CHUNK_BYTES]
    async with client_of(served) as client:
        with pytest.raises(Unavailable, match=r"upload of digits\.onnx: (killed|the connection broke)"):
            await client.models.push(onnx, wait=False)


async def test_a_damaged_partial_upload_is_restarted(served: Served, kept: Store, onnx: Path) -> None:
    kept.partial[hashlib.sha256(onnx.read_bytes()).hexdigest()] = b"not what it begins with"
    async with client_of(served) as client:
        await client.models.push(onnx, wait=False)
    assert kept.offsets == [23, 0]


async def test_a_file_that_changes_meanwhile_is_data_loss(served: Served, kept: Store, onnx: Path) -> None:
    async with client_of(served) as client:
        original = methods.STAT_ARTIFACT

        async def change(request: Any, context: Any) -> Any:
            onnx.write_bytes(b"something else")
            return await kept.stat(request, context)

        served.on(original, change)
        with pytest.raises(DataLoss):
            await client.models.push(onnx, wait=False)


async def test_unreadable_files_and_errors_of_the_callback(served: Served, kept: Store, onnx: Path) -> None:
    def tired(progress: Progress) -> None:
        raise RuntimeError("enough")

    async with client_of(served) as client:
        with pytest.raises(RuntimeError, match="enough"):
            await client.models.push(onnx, progress=tired, wait=False)
        with pytest.raises(NotFound, match="no such file"):
            await client.models.push(onnx.with_name("x.onnx"))


async def test_a_folder_is_pushed_with_all_versions_and_equal_files_once(
    served: Served, kept: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    for name, content in {"config.pbtxt": b"c", "1/model.onnx": b"one", "2/model.onnx": b"one"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    async with client_of(served) as client:
        pushed = await client.models.push(folder, wait=False)
    assert [(p.model.version, [f.path for f in p.model.files]) for p in pushed] == [
        (1, ["../config.pbtxt", "model.onnx"]),
        (2, ["../config.pbtxt", "model.onnx"]),
    ]
    assert served.count(methods.PUT_ARTIFACT) == 2
    (folder / "1/model.onnx").write_bytes(b"other")
    async with client_of(served) as client:
        with pytest.raises(AlreadyExists, match="other content"):
            await client.models.push(folder, wait=False)


async def test_a_repository_is_pushed_model_by_model_and_ensembles_last(
    served: Served, kept: Store, tmp_path: Path
) -> None:
    steps = 'platform: "ensemble" ensemble_scheduling { step { model_name: "b" } }'
    for name, content in {"a/config.pbtxt": steps, "b/1/model.onnx": "b", "c/1/model.onnx": "c"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "a/1").mkdir()
    listing(served, [instance("local/infer-0", b=[1])])
    async with client_of(served) as client:
        pushed = await client.models.push(tmp_path, labels={"by": "ada"}, wait=False)
        assert {p.model.name for p in pushed} == {"a", "b", "c"}
        assert pushed[-1].model.name == "a"
        assert all(p.model.labels == {"by": "ada"} for p in pushed)
        for options in ({"name": "x"}, {"version": 1}):
            with pytest.raises(
                InvalidArgument, match=r"is a repository of models .*: push that model's folder, such as .*/a$"
            ):
                await client.models.push(tmp_path, **options, wait=False)


def folder_of(root: Path, *models: str) -> Path:
    """A repository of models of one version each; the ensemble "all" consists of the others."""
    for name in models:
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.onnx").write_bytes(name.encode())
    return root


async def test_a_model_that_cannot_be_loaded_is_not_registered(served: Served, kept: Store, onnx: Path) -> None:
    kept.trials["digits"] = ["model.onnx: not an ONNX file"]
    async with client_of(served) as client:
        with pytest.raises(FailedPrecondition, match=r"digits cannot be loaded: model\.onnx: not an ONNX file"):
            await client.models.push(onnx, wait=False)
        assert (kept.models, kept.tried) == ([], [("digits", 0)])
        [pushed] = await client.models.push(onnx, check=False, wait=False)
        assert (pushed.model.version, len(kept.tried)) == (1, 1)


async def test_all_new_versions_are_tried_before_any_is_registered(served: Served, kept: Store, tmp_path: Path) -> None:
    for version in (1, 2):
        (tmp_path / "m" / str(version)).mkdir(parents=True)
        (tmp_path / "m" / str(version) / "model.onnx").write_bytes(b"%d" % version)
    async with client_of(served) as client:
        await client.models.push(tmp_path / "m", version=1, wait=False)
        kept.trials["m"] = ["no luck"]
        with pytest.raises(FailedPrecondition, match="m version 2 cannot be loaded: no luck"):
            await client.models.push(tmp_path / "m", wait=False)
        assert [model.version for model in kept.models] == [1]
        pushed = await client.models.push(tmp_path / "m", wait=False)
        assert [(each.model.version, each.existed) for each in pushed] == [(1, True), (2, False)]
    assert kept.tried == [("m", 1), ("m", 2), ("m", 2)]


async def test_an_instance_that_ends_during_a_trial_is_replaced_once(served: Served, kept: Store, onnx: Path) -> None:
    kept.trials["digits"] = ["dies", "away", "passes"]
    # First the one that has ended is still listed, then its successor.
    again = [instance("local/infer-0"), instance("local/infer-1")]
    old = [coord.Instance(service="infer", name=each.name, state=each.state, pid=7) for each in again]
    listing(served, old, old, again)
    async with client_of(served) as client:
        assert await client.models.push(onnx, wait=False)
        assert len(kept.tried) == 3
        kept.trials["killer"] = ["dies", "dies"]
        with pytest.raises(FailedPrecondition, match=r"killer is not registered, .* local/infer-0, then local/infer-1"):
            await client.models.push(onnx, "killer", wait=False)
        assert len(kept.tried) == 5
    assert [model.name for model in kept.models] == ["digits"]


async def test_without_an_instance_nothing_is_registered_and_the_error_names_the_option(
    served: Served, kept: Store, onnx: Path
) -> None:
    kept.trials["digits"] = ["away"] * 99
    listing(served, [instance("local/infer-0", coord.INSTANCE_STATE_STARTING)])
    async with client_of(served) as client:
        with pytest.raises(Unavailable, match=r"no infer instance is ready to try digits: .*--no-check"):
            await client.models.push(onnx, wait=False)
        assert kept.models == []
        await client.models.push(onnx, check=False, wait=False)


async def test_an_upload_that_is_cut_registers_nothing(served: Served, kept: Store, onnx: Path) -> None:
    kept.break_after = [CHUNK_BYTES] + [0] * 99
    async with client_of(served) as client:
        with pytest.raises(Unavailable):
            await client.models.push(onnx, wait=False)
    assert (kept.models, kept.tried) == ([], [])


async def test_a_repository_goes_on_after_a_bad_model(served: Served, kept: Store, tmp_path: Path) -> None:
    folder_of(tmp_path, *"abcdefghijkl")
    (tmp_path / "empty" / "config.pbtxt").parent.mkdir()
    (tmp_path / "empty" / "config.pbtxt").touch()
    (tmp_path / "long" / "9999999999999999999").mkdir(parents=True)
    for name, step in (("over", "b"), ("overover", "over"), ("good", "c"), ("circle", "circle"), ("around", "circle")):
        (tmp_path / name / "1").mkdir(parents=True)
        step = f'ensemble_scheduling {{ step {{ model_name: "{step}" }} }}'
        (tmp_path / name / "config.pbtxt").write_text(step)
    kept.trials["b"] = ["no luck"]
    listing(served, [instance("local/infer-0", c=[1])])
    heard: list[str] = []
    async with client_of(served) as client:
        outcomes = await client.models.push_all(tmp_path, settled=lambda each: heard.append(each.name), wait=False)
        failed = {each.name: each.error.message for each in outcomes if each.error}
        assert failed.keys() == {"b", "empty", "over", "overover", "long", "circle", "around"}
        assert failed["circle"] == "ensembles contain each other: circle -> circle"
        assert failed["around"] == "its model circle was not pushed"
        assert failed["long"].endswith("long/9999999999999999999: a version is at most 9223372036854775807")
        assert failed["b"] == "b version 1 cannot be loaded: no luck"
        assert failed["over"] == "its model b was not pushed"
        assert (
            sorted(heard)
            == sorted(each.name for each in outcomes)
            == sorted([*"abcdefghijkl", "empty", "over", "overover", "good", "long", "circle", "around"])
        )
        assert {model.name for model in kept.models} == {*"acdefghijkl", "good"}
        kept.trials["b"] = ["no luck"]
        with pytest.raises(InvalidArgument, match=r"7 of 19 models were not pushed: .*b: b version 1 cannot be"):
            await client.models.push(tmp_path, wait=False)


async def test_a_fault_of_one_push_cancels_no_other(
    served: Served, kept: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, *"ab")
    read = bundle.read

    def faulty(path: Path, **options: Any) -> Any:
        if path.name == "a":
            raise ValueError("no luck")
        return read(path, **options)

    monkeypatch.setattr(bundle, "read", faulty)
    listing(served, [instance("local/infer-0")])
    async with client_of(served) as client:
        outcomes = await client.models.push_all(tmp_path, wait=False)
    assert {each.name: str(each.error or "") for each in outcomes} == {
        "a": "a fault of the client: ValueError: no luck",
        "b": "",
    }


async def test_models_of_a_repository_are_pushed_at_the_same_time(served: Served, kept: Store, tmp_path: Path) -> None:
    folder_of(tmp_path, *"abcdefghijkl")
    both = asyncio.Event()

    async def register(request: Any, context: Any) -> Any:
        # Two calls meet here, or none returns.
        if served.count(methods.REGISTER_MODEL) >= 2:
            both.set()
        await both.wait()
        return await kept.register(request, context)

    served.on(methods.REGISTER_MODEL, register)
    listing(served, [instance("local/infer-0", **{name: [1] for name in "abcdefghijkl"})])
    index(served)
    async with client_of(served) as client:
        outcomes = await client.models.push_all(tmp_path)
    assert [each.error for each in outcomes] == [None] * 12
    assert served.count(methods.LIST_INSTANCES) <= 12


async def test_pull_restores_the_pushed_folder(served: Served, kept: Store, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    for name, content in {"config.pbtxt": b"c" * 5000, "2/model.onnx": b"one" * 3000, "2/empty": b""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    async with client_of(served) as client:
        await client.models.push(folder, wait=False)
        kept.break_after = [2000, 1000]
        home = await client.models.pull("m", into=tmp_path / "back")
        got = {str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*") if p.is_file()}
        assert got == {"config.pbtxt": b"c" * 5000, "2/model.onnx": b"one" * 3000, "2/empty": b""}
        kept.corrupt = True
        with pytest.raises(DataLoss, match="received 5000 bytes with SHA-256"):
            await client.models.pull("m", 2, into=tmp_path / "bad")
        assert not [p for p in (tmp_path / "bad").rglob("*") if p.is_file()]
        with pytest.raises(NotFound, match="no version 7 of model 'm'; versions: 2"):
            await client.models.pull("m", 7)
        kept.models[0].files[0].path = "../../../evil"
        with pytest.raises(FailedPrecondition, match="leads out of"):
            await client.models.pull("m", into=tmp_path / "bad")


def instance(name: str, state: Any = coord.INSTANCE_STATE_READY, **models: list[int]) -> coord.Instance:
    ready = [coord.ReadyModel(name=model, versions=versions) for model, versions in models.items()]
    return coord.Instance(service="infer", name=name, state=state, models=ready)


def listing(served: Served, *views: list[coord.Instance]) -> None:
    """coord answers with the views in turn, and with the last for ever."""
    left = list(views)

    async def answer(request: Any, context: Any) -> Any:
        view = left.pop(0) if len(left) > 1 else left[0]
        return coord.ListInstancesResponse(instances=view)

    served.on(methods.LIST_INSTANCES, answer)


def index(served: Served, *entries: oip.RepositoryIndexResponse.ModelIndex) -> None:
    async def answer(request: Any, context: Any) -> Any:
        return oip.RepositoryIndexResponse(models=entries)

    served.on(methods.REPOSITORY_INDEX, answer)


Entry = oip.RepositoryIndexResponse.ModelIndex


async def test_ready_means_ready_on_every_instance_that_takes_traffic(served: Served) -> None:
    index(served, Entry(name="m", version="2", state="LOADING"))
    draining = instance("local/infer-9", coord.INSTANCE_STATE_DRAINING)
    listing(
        served,
        [],
        [instance("local/infer-0", m=[1]), instance("local/infer-1", m=[1])],
        [instance("local/infer-0", m=[1, 2]), instance("local/infer-1", m=[1])],
        [instance("local/infer-0", m=[1, 2]), instance("local/infer-1", m=[2]), draining],
    )
    async with client_of(served) as client:
        await client.models.wait_ready("m", 2, timeout=20)
    assert served.count(methods.LIST_INSTANCES) == 4


async def test_the_error_of_a_failed_load_has_the_reason(served: Served) -> None:
    listing(served, [instance("local/infer-0", m=[1])])
    index(served, Entry(name="m", version="2", state="UNAVAILABLE", reason="model.onnx: not an ONNX file"))
    async with client_of(served) as client:
        with pytest.raises(FailedPrecondition, match=r"m version 2 cannot be loaded: model\.onnx: not an ONNX file"):
            await client.models.wait_ready("m", 2, timeout=20)
        await client.models.wait_ready("m", 1, timeout=20)


async def test_a_timeout_names_the_instances_that_are_not_ready(served: Served) -> None:
    index(served)
    async with client_of(served) as client:
        listing(served, [instance("local/infer-0", m=[2]), instance("local/infer-1")])
        with pytest.raises(
            DeadlineExceeded, match=r"not ready .*: m version 2: ready on local/infer-0; not on local/infer-1"
        ):
            await client.models.wait_ready("m", 2, timeout=5)
        listing(served, [])
        with pytest.raises(DeadlineExceeded, match="no infer instance is ready: see `shoal status`"):
            await client.models.wait_ready("m", timeout=5)


async def test_a_standalone_server_is_polled_itself(served: Served) -> None:
    answers = [False, False, True]

    async def ready(request: Any, context: Any) -> Any:
        return oip.ModelReadyResponse(ready=answers.pop(0))

    served.on(methods.MODEL_READY, ready)
    index(served)
    async with client_of(served) as client:
        await client.models.wait_ready("m", timeout=20)
    assert answers == []


HERE = VersionReadiness(("local/infer-0",), ())
NOWHERE = VersionReadiness((), ("local/infer-0",))


def look(at: VersionReadiness, *entries: Entry, others: bool = False) -> Poll:
    return Poll({1: at}, others, {int(entry.version): entry for entry in entries})


def test_a_version_excluded_by_the_policy_is_recognized_once_settled() -> None:
    wait = ReadinessWait("m", {1})
    wait.add(look(NOWHERE, Entry(version="2", state="READY")), 0.0)  # The other version is not everywhere yet.
    wait.add(look(NOWHERE, Entry(version="2", state="READY"), others=True), 10.0)
    wait.add(look(NOWHERE, Entry(version="1", state="LOADING"), others=True), 11.5)  # It was only late.
    wait.add(look(NOWHERE, others=True), 12.5)
    wait.add(look(NOWHERE, others=True), 14.4)
    assert wait.waiting == {1}
    wait.add(look(NOWHERE, others=True), 14.5)
    assert (wait.waiting, wait.not_served) == (set(), {1})


def test_the_wait_outlasts_a_transient_unavailability() -> None:
    refused = Entry(name="m", version="1", state="UNAVAILABLE", reason="no luck")
    wait = ReadinessWait("m", {1})
    for now, entry in ((0.0, refused), (1.9, Entry(version="1", state="LOADING")), (2.5, refused), (4.4, refused)):
        wait.add(look(NOWHERE, entry), now)
    wait.add(look(NOWHERE, Entry(version="1", state="READY")), 4.45)  # Another instance, which has it.
    with pytest.raises(FailedPrecondition, match="m version 1 cannot be loaded: no luck"):
        wait.add(look(NOWHERE, refused), 4.5)
    wait.add(look(HERE, refused), 5.0)
    assert not wait.waiting


async def test_a_push_of_excluded_versions_fails_unless_an_alias_includes_one(
    served: Served, kept: Store, onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.client.models.readiness.SETTLED_S", 0.2)
    listing(served, [instance("local/infer-0", digits=[2])])
    index(served, Entry(name="digits", version="2", state="READY"))
    async with client_of(served) as client:
        with pytest.raises(FailedPrecondition, match="digits version 1 is registered but not served"):
            await client.models.push(onnx, version=1)

        async def alias(request: Any, context: Any) -> Any:
            listing(served, [instance("local/infer-0", digits=[1, 2])])
            return store.SetAliasResponse(model=store.ModelVersion(name="digits", version=1, aliases=["stable"]))

        served.on(methods.SET_ALIAS, alias)
        [pushed] = await client.models.push(onnx, version=1, alias="stable")
        assert pushed.ready
        assert pushed.model.aliases == ("stable",)


def test_the_blocking_client(served: Served, kept: Store, onnx: Path) -> None:
    with shoal.Client(served.address) as client:
        client.models.push(onnx, wait=False)
        assert [model.name for model in client.models.list()] == ["digits"]
