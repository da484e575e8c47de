"""Policy and keys of a cluster: coord and etcd as real processes, asked as a gateway asks.

One coord serves all tests. Each test leaves a policy and a key with which the next one may administer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from mesh import keyring
from mesh.cluster.etcd import Etcd, Lease, Outcome
from mesh.cluster.membership import Instance, State, encode
from mesh.cluster.mirror import Mirror
from mesh.keyring import Keyring
from mesh.rpc.channel import connect
from mesh.xds.access import CALLERS, RULES
from mesh.xds.ads import SERVICE as SERVICE_NAME
from mesh.xds.messages import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from mesh.xds.resource import EXTENSION
from services.coord.access_rpc import AccessRpc
from services.coord.enforcement import Enforcement
from services.coord.keys import Keys
from services.coord.policies import Policies
from shoal.access import caller_header, cluster, tokens
from shoal.access.caller_header import AS_SERVICE, CALLER_HEADER, LAUNCHER, SIGNER_HEADER
from shoal.access.policy import Policy
from shoal.access.tokens import PREFIX, Signer
from shoal.coord.v1 import access_pb2 as pb
from shoal.coord.v1 import access_pb2_grpc, coord_pb2, coord_pb2_grpc, shares_pb2_grpc
from shoal.coord.v1 import shares_pb2 as shares
from shoal.errors import Aborted, FailedPrecondition, InvalidArgument, Unauthenticated
from tests.access import policies
from tests.breakable import PATIENCE_S, EtcdProcess, until
from tests.coord.conftest import Coord
from tests.coord.test_issuer_keys import Idp

pytestmark = [pytest.mark.asyncio(loop_scope="module")]

OWN = "{issuer: shoal, audiences: [shoal], token_prefix: shoal_, cluster: true}"
LAUNCHED = ((CALLER_HEADER, LAUNCHER.decode()),)


def document(grants: str = '[{name: roles, models: ["*"]}]', **more: Any) -> str:
    return f"version: 1\nissuers: [{OWN}]\ngrants: {grants}\n" + "".join(f"{k}: {v}\n" for k, v in more.items())


class Access:
    """AccessService of one coord, and an admin key."""

    def __init__(self, channel: grpc.aio.Channel, etcd: Etcd, master_key: Path) -> None:
        self.master_key = master_key
        self.channel = channel
        self.stub = access_pb2_grpc.AccessServiceStub(channel)
        self.etcd = etcd
        self.admin: tuple[tuple[str, str], ...] = ()

    async def begin(self) -> None:
        async def has_key() -> bool:
            try:
                self.admin = passed(await self.create("local", "admin", LAUNCHED))
            except grpc.aio.AioRpcError:
                return False
            return True

        await until(has_key, "coord has a signer")
        await until(lambda: self.is_admitted(), "coord has a policy")

    async def is_admitted(self) -> bool:
        try:
            await self.stub.ListKeys(pb.ListKeysRequest(), metadata=self.admin)
        except grpc.aio.AioRpcError:
            return False
        return True

    async def create(
        self, tenant: str, role: str, metadata: tuple[tuple[str, str], ...] = (), **more: Any
    ) -> pb.CreateKeyResponse:
        request = pb.CreateKeyRequest(tenant=tenant, role=role, **more)
        return await self.stub.CreateKey(request, metadata=metadata or self.admin)

    async def apply(self, text: str, **more: Any) -> pb.PolicyVersion:
        request = pb.ApplyPolicyRequest(document=text, **more)
        return (await self.stub.ApplyPolicy(request, metadata=self.admin)).policy

    async def keys(self) -> dict[str, pb.KeyInfo]:
        return {key.id: key for key in (await self.stub.ListKeys(pb.ListKeysRequest(), metadata=self.admin)).keys}

    async def version(self) -> int:
        return (await self.stub.GetPolicy(pb.GetPolicyRequest(), metadata=self.admin)).policy.version

    async def policy(self) -> Policy:
        """Return the policy in force, as services read it."""
        listing = await self.etcd.list(cluster.PREFIX)
        found = cluster.in_force({entry.key: entry.value for entry in listing.entries})
        assert found is not None
        return found


def passed(made: pb.CreateKeyResponse) -> tuple[tuple[str, str], ...]:
    """Return the header in which a gateway passes a key."""
    return ((CALLER_HEADER, made.key.removeprefix(PREFIX).split(".")[1]),)


async def refusal(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def access(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Access]:
    # Paths of sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    master = folder / "master.key"
    master.write_text(keyring.new_master())
    master.chmod(0o600)
    async with AsyncExitStack() as stack:
        process = stack.enter_context(EtcdProcess(folder))
        await process.until_ready()
        settings = {"AUTH": "true", "MASTER_KEY": str(master), "ISSUER_REFRESH_MS": "1000"}
        one = stack.enter_context(Coord(folder, 0, process.address, **settings))
        await one.until_ready()
        etcd = await stack.enter_async_context(Etcd(process.address))
        made = Access(await stack.enter_async_context(connect(f"unix:{one.socket}")), etcd, master)
        await made.begin()
        yield made
    shutil.rmtree(folder, ignore_errors=True)


async def test_a_policy_is_applied_shown_and_rolled_back(access: Access) -> None:
    first = await access.version()
    second = await access.apply(document(hosts="[ai.example]"))
    assert (second.version, second.forced) == (first + 1, False)
    assert "of local, key k-" in second.applied_by
    assert (await access.policy()).hosts == ("ai.example",)
    assert await refusal(access.apply(document(), expected_version=first)) == (
        "ABORTED",
        f"version {first + 1} of the policy is in force, not {first}: see what has changed",
    )
    third = await access.stub.RollBackPolicy(pb.RollBackPolicyRequest(version=first), metadata=access.admin)
    assert (third.policy.version, third.policy.rolled_back_to) == (first + 2, first)
    assert (await access.policy()).hosts == ("*",)
    listed = await access.stub.ListPolicies(pb.ListPoliciesRequest(), metadata=access.admin)
    assert [one.version for one in listed.policies][:3] == [first + 2, first + 1, first]
    code, _ = await refusal(access.stub.GetPolicy(pb.GetPolicyRequest(version=999), metadata=access.admin))
    assert code == "NOT_FOUND"


async def test_an_invalid_document_changes_nothing(access: Access) -> None:
    before = await access.version()
    for text, said in (
        ("version: 2", "policy:1: version: Input should be 1"),
        (document("[{name: a, models: []}]"), "policy:3: grants[0].models"),
        (document().replace("cluster: true", "jwks_file: keys.json"), "the file keys.json of the document is missing"),
        (document(roles="{a: [read, nothing]}"), "policy:4: roles.a[1]"),
        (document() + "# " + "x" * (256 << 10), "bytes, of at most 262144"),
    ):
        code, details = await refusal(access.apply(text, force=True))
        assert code == "INVALID_ARGUMENT"
        assert said in details
    assert await access.version() == before


async def test_the_author_of_a_policy_and_somebody_must_be_able_to_administer_under_it(access: Access) -> None:
    mine = document('[{name: a, models: ["*"], subjects: [ann]}]')
    code, details = await refusal(access.apply(mine))
    assert code == "FAILED_PRECONDITION"
    assert details.startswith("after this document no valid key may administer the cluster (no grant allows administer")
    before = await access.version()
    ann = passed(await access.create("acme", "admin", subject="ann"))
    code, details = await refusal(access.apply(mine))
    assert code == "FAILED_PRECONDITION"
    assert details.startswith("you could not have applied this document under itself (no grant allows administer")
    forced = await access.apply(mine, force=True)
    assert (forced.version, forced.forced) == (before + 1, True)
    assert "of local, key k-" in forced.applied_by
    code, details = await refusal(access.apply(mine))
    assert (code, "no grant allows administer" in details) == ("PERMISSION_DENIED", True)
    restored = pb.ApplyPolicyRequest(document=document())
    assert not (await access.stub.ApplyPolicy(restored, metadata=ann)).policy.forced


async def test_a_policy_that_an_instance_does_not_enforce_yet_names_it(access: Access) -> None:
    stalled = Instance("infer", "local", "infer-0", "unix:/x", 10, State.READY, 100.0, policy_revision=1)
    await access.etcd.put(stalled.key, encode(stalled))

    async def lacking() -> list[str]:
        request = pb.ApplyPolicyRequest(document=document())
        return [*(await access.stub.ApplyPolicy(request, metadata=access.admin)).unconfirmed]

    async def is_named_after_a_roll_back() -> bool:
        again = pb.RollBackPolicyRequest(version=await access.version())
        return list((await access.stub.RollBackPolicy(again, metadata=access.admin)).unconfirmed) == [stalled.name]

    async def is_named() -> bool:
        return await lacking() == [stalled.name]

    async def is_confirmed() -> bool:
        return await lacking() == []

    # On a busy machine, coord itself may confirm a policy later than a call waits.
    try:
        await until(is_named, "the instance is named")
        await until(is_named_after_a_roll_back, "the instance is named after a roll back")
    finally:
        # An instance whose entry disappears is waited for, too.
        await access.etcd.put(stalled.key, encode(replace(stalled, policy_revision=1 << 40)))
        await access.etcd.delete(stalled.key)
    await until(is_confirmed, "a policy is confirmed")


async def test_the_nodes_user_rolls_back_a_document_that_locks_everybody_out(access: Access) -> None:
    before = await access.version()
    nobody = await access.apply(document("[]"), force=True)
    assert nobody.forced
    assert not await access.is_admitted()
    spoofed = ((CALLER_HEADER, "bGF1bmNoZXI"),)
    request = pb.RollBackPolicyRequest(version=before)
    for metadata in (access.admin, (), spoofed):
        code, _ = await refusal(access.stub.RollBackPolicy(request, metadata=metadata))
        assert code in ("UNAUTHENTICATED", "PERMISSION_DENIED")
    back = (await access.stub.RollBackPolicy(request, metadata=LAUNCHED)).policy
    assert (back.version, back.rolled_back_to, back.applied_by) == (before + 2, before, "the node's user")
    assert not back.forced
    await until(access.is_admitted, "the admin is one again")
    code, details = await refusal(
        access.stub.RollBackPolicy(pb.RollBackPolicyRequest(version=nobody.version), metadata=LAUNCHED)
    )
    assert (code, details.split(" (")[0]) == (
        "FAILED_PRECONDITION",
        "after this document no valid key may administer the cluster",
    )


async def test_a_key_that_is_not_made_leaves_no_lease(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(access.etcd, Enforcement(Mirror(access.etcd, b"/shoal/")), keyring.read(access.master_key))
    granted: list[Lease] = []
    grant = access.etcd.grant

    async def recorded(*args: Any, **options: Any) -> Lease:
        granted.append(await grant(*args, **options))
        return granted[-1]

    async def lost(*args: Any) -> Outcome:
        return Outcome(False, 0)

    monkeypatch.setattr(access.etcd, "grant", recorded)
    monkeypatch.setattr(access.etcd, "transact", lost)
    own = {"iss": (await access.policy()).issuers[0].issuer, "tenant": "local", "role": "admin"}
    for call in (
        keys.create(tenant="acme", role="user"),
        keys.rotate(is_stolen=False, caller={**own, "jti": "k-1"}, renews_own=True),
    ):
        with pytest.raises(Aborted):
            await call
    assert [await access.etcd.refresh(lease.id) for lease in granted] == [0] * len(granted)


async def test_a_key_that_ends_while_its_call_runs_gets_nothing(
    access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(access.etcd, Enforcement(Mirror(access.etcd, b"/shoal/")), keyring.read(access.master_key))
    thief, other = [passed(await access.create("local", "admin"))[0][1] for _ in range(2)]
    claims = caller_header.claims(thief.encode())
    transact = access.etcd.transact

    async def rotated_before(*args: Any) -> Outcome:
        monkeypatch.setattr(access.etcd, "transact", transact)
        request = pb.RotateSignerRequest(stolen=True, renew_own_key=True)
        rotated = await access.stub.RotateSigner(request, metadata=access.admin)
        access.admin = ((CALLER_HEADER, rotated.key.removeprefix(PREFIX).split(".")[1]),)
        return await transact(*args)

    monkeypatch.setattr(access.etcd, "transact", rotated_before)
    with pytest.raises(Unauthenticated, match="your key has ended meanwhile"):
        await keys.create(tenant="evil", role="admin", caller=claims)
    assert "evil" not in {key.tenant for key in (await access.keys()).values()}
    # A second operator with the same key replaces no signer, and ends nobody's key.
    with pytest.raises(Unauthenticated, match="another operator has replaced its signer"):
        await keys.rotate(is_stolen=True, caller=claims, renews_own=True)
    assert await access.is_admitted()
    with pytest.raises(Unauthenticated, match="ended"):
        await keys.while_valid(caller_header.claims(other.encode()))

    revoked = await access.create("local", "admin")
    claims = caller_header.claims(passed(revoked)[0][1].encode())
    stale = await keys.while_valid(claims)
    await access.stub.RevokeKey(pb.RevokeKeyRequest(id=revoked.info.id), metadata=access.admin)
    with pytest.raises(Unauthenticated, match="your key was revoked meanwhile"):
        await keys.create(tenant="evil", role="admin", caller=claims)
    mirror = Mirror(access.etcd, b"/shoal/")
    applied = Policies(access.etcd, mirror, Enforcement(mirror)).apply(
        document(), {}, None, [], force=True, while_valid=stale
    )
    with pytest.raises(Aborted, match="meanwhile, or a key ended"):
        await applied


async def test_a_rollback_names_a_version(access: Access) -> None:
    call = access.stub.RollBackPolicy(pb.RollBackPolicyRequest(), metadata=access.admin)
    assert (await refusal(call))[0] == "INVALID_ARGUMENT"


async def test_two_documents_at_once_are_not_mixed(access: Access) -> None:
    before = await access.version()
    calls = [access.apply(document(hosts=f"[h{number}.example]")) for number in range(8)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    applied = [one.version for one in outcomes if isinstance(one, pb.PolicyVersion)]
    assert sorted(applied) == list(range(before + 1, before + 1 + len(applied)))
    assert {one.code().name for one in outcomes if isinstance(one, grpc.aio.AioRpcError)} <= {"ABORTED"}
    assert applied


async def test_a_key_is_made_listed_and_revoked(access: Access) -> None:
    began = int(time.time())
    made = await access.create("acme", "user", models=["ocr*"], subject="ann", life_seconds=600)
    claims = tokens.verified_claims(await access.policy(), made.key, time.time())
    assert (claims["tenant"], claims["role"], claims["sub"], claims["models"]) == ("acme", "user", "ann", ["ocr*"])
    listed = (await access.keys())[made.info.id]
    assert listed == made.info
    assert began + 600 <= listed.expires_at.seconds <= time.time() + 601
    for _ in range(2):  # A caller that had no answer revokes it again.
        await access.stub.RevokeKey(pb.RevokeKeyRequest(id=made.info.id), metadata=access.admin)
        assert (await access.keys())[made.info.id].revoked
    assert made.info.id in (await access.policy()).revoked_ids
    for id in ("", "a b", "x" * 300, "\n"):
        code, _ = await refusal(access.stub.RevokeKey(pb.RevokeKeyRequest(id=id), metadata=access.admin))
        assert code == "INVALID_ARGUMENT"
    for wrong in ({"tenant": ""}, {"tenant": "a b"}, {"life_seconds": -1}, {"models": ["a b"]}):
        code, _ = await refusal(access.create(**{"tenant": "acme", "role": "user", **wrong}))
        assert code == "INVALID_ARGUMENT"


async def test_a_former_signers_keys_live_until_they_expire_unless_it_was_stolen(access: Access) -> None:
    before = await access.create("acme", "user")
    rotated = await access.stub.RotateSigner(pb.RotateSignerRequest(), metadata=access.admin)
    after = await access.create("acme", "user")
    assert after.info.signer == rotated.signer != before.info.signer
    policy = await access.policy()
    for made in (before, after):
        assert tokens.verified_claims(policy, made.key, time.time())["jti"] == made.info.id
    access.admin = passed(await access.create("local", "admin", life_seconds=3_600))
    request = pb.RotateSignerRequest(stolen=True, renew_own_key=True)
    stolen = await access.stub.RotateSigner(request, metadata=access.admin)
    policy = await access.policy()
    assert [issuer.issuer for issuer in policy.issuers] == [f"shoal:{stolen.signer}"]
    own = tokens.verified_claims(policy, stolen.key, time.time())
    assert (own["tenant"], own["role"]) == ("local", "admin")
    assert own["exp"] - own["iat"] == 3_600, "it lives as long as the caller's former key"
    access.admin = ((CALLER_HEADER, stolen.key.removeprefix(PREFIX).split(".")[1]),)
    keys = await access.keys()
    assert [keys[made.info.id].revoked for made in (before, after)] == [True, True]
    assert [id for id, key in keys.items() if not key.revoked] == [own["jti"]]


async def test_a_rotation_returns_when_every_envoy_verifies_the_new_signers_keys(access: Access) -> None:
    node = {"id": "local", "metadata": {"shoal": {"gateway": "127.0.0.1:1", "outbound": "/run/o.sock"}}}
    subscription = {"node": node, "type_url": EXTENSION, "resource_names_subscribe": [CALLERS, RULES]}
    ads = access.channel.stream_stream(
        f"/{SERVICE_NAME}/DeltaAggregatedResources",
        request_serializer=bytes,
        response_deserializer=DeltaDiscoveryResponse.parse,
    )(metadata=AS_SERVICE)
    acknowledges, received = asyncio.Event(), ""

    async def envoy() -> None:
        """An Envoy that acknowledges its filters when the test says so."""
        nonlocal received
        await ads.write(DeltaDiscoveryRequest.from_dict(subscription))
        while True:
            response = await ads.read()
            # All of them: a later change of one filter comes without the other, which names the signers.
            received += str(response)
            await acknowledges.wait()
            await ads.write(DeltaDiscoveryRequest(type_url=EXTENSION, response_nonce=response.nonce))

    (first,) = {key.signer for key in (await access.keys()).values() if not key.revoked}
    acknowledges.set()
    running = asyncio.create_task(envoy())
    await until(lambda: first in received, "the Envoy has the first signer")
    acknowledges.clear()
    request = pb.RotateSignerRequest()
    rotating = asyncio.ensure_future(access.stub.RotateSigner(request, metadata=access.admin))
    assert not (await asyncio.wait([rotating], timeout=1))[0], "the Envoy has not confirmed"
    acknowledges.set()
    rotated = await asyncio.wait_for(rotating, PATIENCE_S)
    assert [*rotated.unconfirmed] == []
    assert rotated.signer in received
    # An Envoy that has gone is not waited for.
    running.cancel()
    ads.cancel()
    assert [*(await access.stub.RotateSigner(request, metadata=access.admin)).unconfirmed] == []


async def test_an_admin_of_another_issuer_rotates_and_keeps_its_token(access: Access, tmp_path: Path) -> None:
    """After a theft, too: the claims of its token are none of a key."""
    idp = tokens.create_signer(tmp_path / "idp", "https://idp.example")
    foreign = f"{{issuer: '{idp.issuer}', audiences: [a], tenant: acme, role: admin, jwks: {json.dumps(idp.jwks())}}}"
    await access.apply(document().replace(f"[{OWN}]", f"[{OWN}, {foreign}]"))
    own = access.admin
    access.admin = (policies.passed({"iss": idp.issuer, "sub": "ann", "exp": time.time() + 600}),)
    await until(access.is_admitted, "the issuer is in force")
    request = pb.RotateSignerRequest(stolen=True, renew_own_key=True)
    rotated = await access.stub.RotateSigner(request, metadata=access.admin)
    assert rotated.key == ""
    assert {issuer.issuer for issuer in (await access.policy()).issuers} == {f"shoal:{rotated.signer}", idp.issuer}
    assert await access.is_admitted()
    made = await access.create("local", "admin", LAUNCHED)
    ended, _ = await refusal(access.stub.ListKeys(pb.ListKeysRequest(), metadata=own))
    access.admin = passed(made)
    await access.apply(document())
    assert ended == "UNAUTHENTICATED"


async def test_an_author_with_a_token_of_another_issuer_is_not_locked_out(access: Access, tmp_path: Path) -> None:
    """The document leaves the author its grants, but would not verify its token any more."""
    idp, other = (tokens.create_signer(tmp_path / name, "https://idp.example") for name in ("a", "b"))

    def with_issuer(signer: Signer = idp, audience: str = "a", keys: str = "", **more: str) -> str:
        keys = keys or f"jwks: {json.dumps(signer.jwks())}"
        prefix = more.get("prefix", "")
        foreign = f"{{issuer: '{idp.issuer}', audiences: [{audience}], tenant: acme, role: admin{prefix}, {keys}}}"
        return document().replace(f"[{OWN}]", f"[{OWN}, {foreign}]")

    await access.apply(with_issuer())
    own = access.admin
    claims = {"iss": idp.issuer, "aud": "a", "sub": "ann", "exp": time.time() + 600}
    access.admin = (policies.passed(claims), (SIGNER_HEADER, idp.kid))
    await until(access.is_admitted, "the issuer is in force")
    forged = Signer(idp.issuer, idp.kid, other.private_key)
    for text, words in (
        (document(), "the policy has no such issuer"),
        (with_issuer(audience="b"), "your token is for none of the audiences"),
        (with_issuer(other), f"the key '{idp.kid}', which verifies your token, is not among the keys"),
        (with_issuer(forged), f"the key '{idp.kid}', which verifies your token, is not among the keys"),
        (with_issuer(prefix=", token_prefix: shoal_"), "your token does not have the prefix"),
        (with_issuer(keys="jwks_url: 'https://idp.example/keys'"), "the policy has no such issuer"),
    ):
        code, details = await refusal(access.apply(text))
        assert code == "FAILED_PRECONDITION"
        assert details.startswith("you could not have applied this document under itself"), details
        assert words in details
    assert not (await access.apply(with_issuer())).forced
    access.admin = own
    await access.apply(document())


@dataclass
class Fetched:
    """An issuer whose keys coord fetches, with two signers; the first one's key is fetched."""

    idp: Idp
    signers: list[Signer]
    access: Access

    async def has(self, *expected: Signer) -> bool:
        """Return True when the policy has these keys of the issuer, in this order."""
        issuer = (await self.access.policy()).issuer_of(self.idp.url)
        found = [] if issuer is None else [key["kid"] for key in (issuer.jwks or {})["keys"]]
        return found == [signer.kid for signer in expected]


@pytest_asyncio.fixture(loop_scope="module")
async def fetched(access: Access, tmp_path: Path) -> AsyncIterator[Fetched]:
    signers = [tokens.create_signer(tmp_path / name) for name in ("a", "b")]
    made = Fetched(Idp(), signers, access)
    try:
        made.idp.discoverable(signers[0])
        foreign = f"{{issuer: '{made.idp.url}', audiences: [a], tenant: acme, role: user, discovery: true}}"
        await access.apply(document().replace(f"[{OWN}]", f"[{OWN}, {foreign}]"))
        await until(lambda: made.has(signers[0]), "the keys are fetched")
        yield made
    finally:
        made.idp.close()
        await access.apply(document())


async def test_a_key_that_cannot_be_used_keeps_no_other_from_being_fetched(access: Access, fetched: Fetched) -> None:
    signers = fetched.signers
    broken = {**signers[1].public_jwk(), "kid": "broken", "x": "AAAA"}
    keys = {"keys": [broken, *(signer.public_jwk() for signer in signers)]}
    fetched.idp.answers["/keys"] = json.dumps(keys).encode()
    await until(lambda: fetched.has(*signers), "the usable keys are fetched")
    shown = await access.stub.GetPolicy(pb.GetPolicyRequest(), metadata=access.admin)
    (skipped,) = json.loads(shown.in_force)["issuers"][-1]["jwks"]["skipped"]
    assert "the key 'broken' is no key" in skipped


async def test_an_issuers_keys_are_fetched_again_and_stay_in_its_outage(fetched: Fetched) -> None:
    idp, (first, second) = fetched.idp, fetched.signers
    idp.discoverable(second, first)
    await until(lambda: fetched.has(second, first), "the rolled keys are fetched")
    idp.answers.clear()
    asked = len(idp.asked)
    await until(lambda: len(idp.asked) > asked, "the keys are asked for in the outage")
    assert await fetched.has(second, first)


async def test_only_admins_and_for_keys_the_launcher_may_call(access: Access) -> None:
    user, operator = [passed(await access.create("acme", role)) for role in ("user", "operator")]
    spoofed = base64.urlsafe_b64encode(json.dumps({"iss": "shoal", "role": "admin"}).encode()).decode()
    for metadata in ((), user, operator, ((CALLER_HEADER, spoofed),)):
        code, _ = await refusal(access.stub.ListKeys(pb.ListKeysRequest(), metadata=metadata))
        assert code in ("UNAUTHENTICATED", "PERMISSION_DENIED")
    code, _ = await refusal(access.stub.GetPolicy(pb.GetPolicyRequest(), metadata=LAUNCHED))
    assert code in ("UNAUTHENTICATED", "PERMISSION_DENIED")


async def test_etcd_has_no_secret_and_another_master_key_opens_none(access: Access) -> None:
    made = await access.create("acme", "user")
    values = b"".join(entry.value for entry in (await access.etcd.list(b"/")).entries)
    assert b"PRIVATE KEY" not in values
    assert made.key.rpartition(".")[2].encode() not in values
    status = await coord_pb2_grpc.CoordServiceStub(access.channel).GetMeshStatus(
        coord_pb2.GetMeshStatusRequest(), metadata=access.admin
    )
    assert (status.policy_version, status.master_key) == (await access.version(), f"file {access.master_key}")
    other = Keys(access.etcd, Enforcement(Mirror(access.etcd, b"/shoal/")), Keyring(b"x" * 32, "test"))
    for call in (other.begin(), other.create(tenant="acme", role="user")):
        with pytest.raises(FailedPrecondition, match="cannot be opened with the master key of the test"):
            await call


async def test_a_node_without_authentication_has_no_policy() -> None:
    without: Any = AccessRpc(None)
    for call in (without.ListKeys(None, None), without.GetPolicy(pb.GetPolicyRequest(), None)):
        with pytest.raises(FailedPrecondition, match="shoal up --auth"):
            await call


async def test_a_master_key_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k"
    for text, mode, said in (
        ("", 0o600, "is no master key"),
        ("c2hvcnQ=", 0o600, "expected 32 bytes in base64"),
        (keyring.new_master(), 0o644, "can be read by others"),
    ):
        path.write_text(text)
        path.chmod(mode)
        with pytest.raises(InvalidArgument, match=said):
            keyring.read(path)
    path.chmod(0o600)
    ring = keyring.read(path)
    sealed = ring.seal("signer", b"secret")
    assert ring.open("signer", sealed) == b"secret"
    assert b"secret" not in sealed
    for purpose, data in (("ca", sealed), ("signer", sealed[:-1]), ("signer", b"")):
        with pytest.raises(FailedPrecondition):
            ring.open(purpose, data)


async def test_services_claim_shares_of_the_limits_that_are_applied(access: Access) -> None:
    stub = shares_pb2_grpc.ShareServiceStub(access.channel)
    bucket = shares.LimitBucket(limit="plan", kind=shares.LIMIT_KIND_ROWS, tenant="acme")
    request = shares.ClaimSharesRequest(claimant="local/infer-0", claims=[shares.ShareClaim(bucket=bucket)])
    code, _ = await refusal(stub.ClaimShares(request, metadata=access.admin))
    assert code == "PERMISSION_DENIED"
    await access.apply(document(limits="[{name: plan, rows_per_second: 100, burst_rows: 300}]"))
    (share,) = (await stub.ClaimShares(request, metadata=AS_SERVICE)).shares
    assert (share.bucket, share.amount, share.burst) == (bucket, 100, 300)
    many = [{"name": f"l{number}", "requests_per_second": 1} for number in range(5)]
    code, text = await refusal(access.apply(document(limits=json.dumps(many))))
    assert (code, "more than 4 limits of requests a second" in text) == ("INVALID_ARGUMENT", True)
    await access.apply(document())
