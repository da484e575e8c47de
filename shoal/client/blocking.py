"""Blocking client: the async client, run on its own event loop in a thread."""

from __future__ import annotations

from types import TracebackType

from shoal.client.access import AsyncAccess
from shoal.client.aio import AsyncClient
from shoal.client.audit import AsyncAudit
from shoal.client.face import LoopThread, SyncFacade, blocking, iterating
from shoal.client.instances import AsyncInstances
from shoal.client.jobs.batches import AsyncBatches
from shoal.client.jobs.dead_letters import AsyncDeadLetters
from shoal.client.jobs.job_operations import AsyncJobOperations
from shoal.client.jobs.job_retention import AsyncJobRetention
from shoal.client.jobs.jobs import AsyncJobs
from shoal.client.jobs.schedules import AsyncSchedules
from shoal.client.models.models import AsyncModels
from shoal.client.store.results import AsyncResults
from shoal.client.store.store import AsyncStore
from shoal.client.tenants import AsyncTenants
from shoal.client.transport.calls import Headers
from shoal.client.transport.retry import RetryPolicy
from shoal.client.transport.security import PathLike


class Models(SyncFacade[AsyncModels]):
    """`client.models`."""

    push = blocking(AsyncModels.push)
    push_all = blocking(AsyncModels.push_all)
    list = blocking(AsyncModels.list)
    remove = blocking(AsyncModels.remove)
    alias = blocking(AsyncModels.alias)
    pull = blocking(AsyncModels.pull)
    ready = blocking(AsyncModels.ready)
    wait_ready = blocking(AsyncModels.wait_ready)
    metadata = blocking(AsyncModels.metadata)
    config = blocking(AsyncModels.config)
    statistics = blocking(AsyncModels.statistics)
    index = blocking(AsyncModels.index)
    load = blocking(AsyncModels.load)
    unload = blocking(AsyncModels.unload)


class DeadLetters(SyncFacade[AsyncDeadLetters]):
    """`client.jobs.dead`."""

    list = blocking(AsyncDeadLetters.list)
    requeue = blocking(AsyncDeadLetters.requeue)
    purge = blocking(AsyncDeadLetters.purge)


class JobOperations(SyncFacade[AsyncJobOperations]):
    """`client.jobs.operations`."""

    preview = blocking(AsyncJobOperations.preview)
    start = blocking(AsyncJobOperations.start)
    get = blocking(AsyncJobOperations.get)
    list = blocking(AsyncJobOperations.list)
    abort = blocking(AsyncJobOperations.abort)


class Instances(SyncFacade[AsyncInstances]):
    """`client.instances`."""

    drain = blocking(AsyncInstances.drain)
    undrain = blocking(AsyncInstances.undrain)


class Schedules(SyncFacade[AsyncSchedules]):
    """`client.jobs.schedules`."""

    put = blocking(AsyncSchedules.put)
    get = blocking(AsyncSchedules.get)
    list = blocking(AsyncSchedules.list)
    pause = blocking(AsyncSchedules.pause)
    resume = blocking(AsyncSchedules.resume)
    remove = blocking(AsyncSchedules.remove)


class JobRetention(SyncFacade[AsyncJobRetention]):
    """`client.jobs.retention`."""

    list = blocking(AsyncJobRetention.list)
    set = blocking(AsyncJobRetention.set)
    inherit = blocking(AsyncJobRetention.inherit)


class Jobs(SyncFacade[AsyncJobs]):
    """`client.jobs`."""

    def __init__(self, inner: AsyncJobs, loop: LoopThread) -> None:
        super().__init__(inner, loop)
        self.dead = DeadLetters(inner.dead, loop)
        self.operations = JobOperations(inner.operations, loop)
        self.schedules = Schedules(inner.schedules, loop)
        self.retention = JobRetention(inner.retention, loop)

    submit = blocking(AsyncJobs.submit)
    submit_many = iterating(AsyncJobs.submit_many)
    run_many = iterating(AsyncJobs.run_many)
    get = blocking(AsyncJobs.get)
    inputs = blocking(AsyncJobs.inputs)
    list = blocking(AsyncJobs.list)
    each = iterating(AsyncJobs.each)
    watch = iterating(AsyncJobs.watch)
    watch_all = iterating(AsyncJobs.watch_all)
    cancel = blocking(AsyncJobs.cancel)
    result = blocking(AsyncJobs.result)


class Results(SyncFacade[AsyncResults]):
    """`client.results`."""

    get = blocking(AsyncResults.get)
    list = blocking(AsyncResults.list)
    stream = iterating(AsyncResults.stream)
    export = iterating(AsyncResults.export)


class Batches(SyncFacade[AsyncBatches]):
    """`client.batches`."""

    submit = blocking(AsyncBatches.submit)
    get = blocking(AsyncBatches.get)
    list = blocking(AsyncBatches.list)
    watch = iterating(AsyncBatches.watch)
    wait = blocking(AsyncBatches.wait)
    cancel = blocking(AsyncBatches.cancel)
    pause = blocking(AsyncBatches.pause)
    resume = blocking(AsyncBatches.resume)


class Tenants(SyncFacade[AsyncTenants]):
    """`client.tenants`."""

    list = blocking(AsyncTenants.list)
    get = blocking(AsyncTenants.get)
    set = blocking(AsyncTenants.set)


class Access(SyncFacade[AsyncAccess]):
    """`client.access`."""

    policy = blocking(AsyncAccess.policy)
    history = blocking(AsyncAccess.history)
    apply = blocking(AsyncAccess.apply)
    roll_back = blocking(AsyncAccess.roll_back)
    create_key = blocking(AsyncAccess.create_key)
    keys = blocking(AsyncAccess.keys)
    revoke_key = blocking(AsyncAccess.revoke_key)
    rotate_signer = blocking(AsyncAccess.rotate_signer)


class Audit(SyncFacade[AsyncAudit]):
    """`client.audit`."""

    list = iterating(AsyncAudit.list)
    verify = iterating(AsyncAudit.verify)


class Store(SyncFacade[AsyncStore]):
    """`client.store`."""

    retention = blocking(AsyncStore.retention)
    set_retention = blocking(AsyncStore.set_retention)
    remove_retention = blocking(AsyncStore.remove_retention)
    usage = blocking(AsyncStore.usage)
    set_quota = blocking(AsyncStore.set_quota)
    remove_quota = blocking(AsyncStore.remove_quota)
    verify = iterating(AsyncStore.verify)
    collect = blocking(AsyncStore.collect)
    backup = iterating(AsyncStore.backup)
    restore = iterating(AsyncStore.restore)


class Client(SyncFacade[AsyncClient]):
    """Blocking client of the node at `address`: `https://host:port`, or `host:port` in plaintext.

    Without an address: $SHOAL_GATEWAY, else the node that runs on this machine.

    `ca` is a PEM file of the authorities to trust: else the CA of this machine's node, else $SHOAL_CA, else those that
    the machine trusts. `cert` and `key` are the client's own certificate. `token`, else $SHOAL_TOKEN, else the key of
    this user's node (`shoal up --auth`), is sent with each call; in plaintext to another machine only with
    `plaintext_token`.

        with shoal.Client() as client:
            client.models.push("mymodel.onnx")
            result = client.infer("mymodel", {"x": numpy.zeros((1, 3), numpy.float32)})
            job = client.jobs.submit("mymodel", {"x": ...})
            answer = client.jobs.result(job.id)

        async with shoal.Client() as client:       # an AsyncClient
            result = await client.infer("mymodel", {"x": ...})

    Without `with`, close the client with `client.close()`, or drop the last reference. Many threads may share a client;
    a forked child has its own connection. A function that the client calls (`progress`) cannot call the client.

    Every call has one deadline for everything that it does (`timeout`, in seconds; None: none), is retried where that
    is safe (see RetryPolicy), and raises a class of `shoal.errors`: Unavailable when no node responds, NotFound ...

    Every call names `tenant`, whose share of the models it counts for, and carries `headers`.

    The constructor raises:
        InvalidArgument: `address` is not an address, a file cannot be used, or the token would be sent in plaintext.
        NotFound, FailedPrecondition: no address was set, and no node or several nodes run on this machine.
    """

    infer = blocking(AsyncClient.infer)
    infer_stream = iterating(AsyncClient.infer_stream)
    live = blocking(AsyncClient.live)
    ready = blocking(AsyncClient.ready)
    status = blocking(AsyncClient.status)
    spans = blocking(AsyncClient.spans)
    history = blocking(AsyncClient.history)

    def __init__(
        self,
        address: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        headers: Headers | None = None,
        tenant: str = "",
        ca: PathLike | None = None,
        cert: PathLike | None = None,
        key: PathLike | None = None,
        token: str | None = None,
        plaintext_token: bool = False,
    ) -> None:
        inner = AsyncClient(
            address,
            retry=retry,
            headers=headers,
            tenant=tenant,
            ca=ca,
            cert=cert,
            key=key,
            token=token,
            plaintext_token=plaintext_token,
        )
        loop = LoopThread(inner.close)
        super().__init__(inner, loop)
        self.models = Models(inner.models, loop)
        self.jobs = Jobs(inner.jobs, loop)
        self.batches = Batches(inner.batches, loop)
        self.results = Results(inner.results, loop)
        self.store = Store(inner.store, loop)
        self.tenants = Tenants(inner.tenants, loop)
        self.instances = Instances(inner.instances, loop)
        self.access = Access(inner.access, loop)
        self.audit = Audit(inner.audit, loop)

    @property
    def address(self) -> str:
        """Address of the gateway that the client calls; with `https://`, where it has TLS."""
        return self._inner.address

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, cancel the calls in flight, and end the thread."""
        self._loop.close()

    async def __aenter__(self) -> AsyncClient:
        return await self._inner.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._inner.__aexit__(kind, err, tb)
