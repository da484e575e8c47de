"""Composition of the coord service: every component, in the order of its start; the first one stops last."""

from __future__ import annotations

import logging
import os
from contextlib import AsyncExitStack

import grpc
from grpc_health.v1 import health_pb2_grpc

from mesh import keyring
from mesh.cluster.election import LEADER, Election
from mesh.cluster.etcd import Etcd
from mesh.cluster.membership import Registration, State
from mesh.cluster.mirror import Mirror
from mesh.metrics.families import Source
from mesh.process.signals import until_stopped
from mesh.rpc import span_listing
from mesh.rpc.access import Access
from mesh.rpc.auditing import auditing_of
from mesh.rpc.cluster_access import PolicyWatch, published
from mesh.rpc.server import Rpc, Server
from mesh.xds.access_log import RefusedCalls
from mesh.xds.ads import AdsServer
from mesh.xds.json_calls import json_calls
from mesh.xds.quota import QuotaServer
from mesh.xds.tracing import tracing_of
from services.coord.access_rpc import AccessParts, AccessRpc
from services.coord.cluster import PREFIX
from services.coord.config import CoordConfig
from services.coord.configurations import Configurations
from services.coord.duties import Duties
from services.coord.enforcement import Enforcement
from services.coord.first_start import FirstStart
from services.coord.gateway_policy import GatewayPolicy
from services.coord.health import MeshHealth
from services.coord.inference import MeshInference
from services.coord.instances import Instances
from services.coord.issuer_keys import IssuerKeys
from services.coord.keys import Keys
from services.coord.leader_channel import LeaderChannel
from services.coord.metrics import CoordMetrics, EtcdAlarms
from services.coord.policies import Policies
from services.coord.policy_copy import PolicyCopy
from services.coord.rest import rest_app
from services.coord.rpc import CoordRpc
from services.coord.sampling import Sampling
from services.coord.share_claims import ShareClaims
from services.coord.share_rpc import ShareRpc
from services.coord.spans import MeshSpans
from services.coord.traffic import (
    ACCESS,
    AT_GATEWAY,
    COORD,
    HEALTH,
    INFER,
    INGEST,
    JSON_SERVICES,
    PUBLIC,
    SHARES,
    STORE,
    TRIALS,
    table,
)
from shoal.coord.v1 import access_pb2_grpc, coord_pb2_grpc, shares_pb2_grpc
from shoal.inference.v2 import inference_pb2_grpc

log = logging.getLogger(__name__)

# An outage of etcd must be noticed before a lease expires (3 s, refreshed every second): see presence.py.
_TIMEOUT_S = 1.0
_IDLE_S = 0.5


async def run(config: CoordConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    name = f"{config.node}/{config.instance}"
    async with AsyncExitStack() as stack:
        etcd = await stack.enter_async_context(Etcd(config.etcd, timeout_s=_TIMEOUT_S, idle_s=_IDLE_S))
        mirror = await stack.enter_async_context(Mirror(etcd, PREFIX))
        enforcement = Enforcement(mirror)
        watch: PolicyWatch | None = None
        parts: AccessParts | None = None
        gateway: GatewayPolicy | None = None
        if config.master_key is not None and config.auth:
            keys = Keys(etcd, enforcement, keyring.read(config.master_key, config.master_key_source))
            parts = AccessParts(Policies(etcd, mirror, enforcement), keys)
            copy = None if config.policy_copy is None else PolicyCopy(config.policy_copy)
            await stack.enter_async_context(FirstStart(parts, mirror, copy))
            policy_access = await stack.enter_async_context(Access(None))
            watch = await stack.enter_async_context(PolicyWatch(mirror, policy_access))
            gateway = await stack.enter_async_context(GatewayPolicy(watch, AT_GATEWAY))
        configurations = await stack.enter_async_context(
            Configurations(
                mirror,
                table(),
                tracing_of(os.environ),
                settle_s=config.settle_ms / 1000,
                access=None if gateway is None else gateway.access,
            )
        )
        ads = AdsServer(configurations)
        health = MeshHealth(mirror, PUBLIC)
        election = Election(etcd, LEADER, name)
        sampling = Sampling(mirror, election)
        leader = await stack.enter_async_context(LeaderChannel(mirror, name))
        instances, spans = Instances(etcd, mirror), MeshSpans(mirror, config.node)
        coord = CoordRpc(name, instances, ads, spans, watch, parts, leader=leader, sampling=sampling)
        claims: ShareClaims | None = None
        if watch is not None:
            claims = await stack.enter_async_context(ShareClaims(mirror, watch.in_force, name))
        access = None if watch is None else watch.access
        rpcs = _rpcs(coord, AccessRpc(parts), ShareRpc(claims), health, MeshInference(mirror, config.node, access))
        auditing = await stack.enter_async_context(auditing_of(config, access))
        methods = {**ads.methods(), **span_listing.methods()}
        sources: list[Source] = []
        if claims is not None:
            quota = QuotaServer(claims, name)
            methods |= quota.methods()
            sources.append(quota.refused.read)
        if access is not None and auditing is not None:
            refused = await stack.enter_async_context(
                RefusedCalls(auditing.log, access, name, list(json_calls(JSON_SERVICES)))
            )
            methods |= refused.methods()
        alarms = await stack.enter_async_context(EtcdAlarms(etcd))
        metrics = CoordMetrics(etcd, mirror, ads, watch, alarms)
        server = await stack.enter_async_context(
            Server(
                config.listen,
                rpcs,
                drain_ms=config.drain_ms,
                methods=methods,
                serves_health=False,
                body_bytes=config.body_bytes,
                unread_bytes=config.unread_bytes,
                access=access,
                auditing=auditing,
                metrics=config.metrics,
                exports_as=("coord", f"{config.node}/{config.instance}"),
                sources=[metrics.read, *sources],
                http=rest_app,
            )
        )
        stack.callback(health.leave)
        registration = await stack.enter_async_context(
            Registration.of(config, "coord", server.address, admin=config.admin or "")
        )
        configurations.own = lambda: registration.instance
        enforcement.serving = configurations.serving
        await stack.enter_async_context(published(watch, registration, ads.until_enforced))
        metrics.election = await stack.enter_async_context(election)
        await stack.enter_async_context(Duties(etcd, mirror, election))
        await stack.enter_async_context(sampling)
        if parts is not None:
            await stack.enter_async_context(
                IssuerKeys(etcd, mirror, election, refresh_s=config.issuer_refresh_ms / 1000)
            )
        health.serve()
        await registration.update(state=State.READY)
        log.info("serving at %(address)s", {"event": "service.serving", "address": server.address})
        await until_stopped()


def _rpcs(
    coord: CoordRpc, access: AccessRpc, shares: ShareRpc, health: MeshHealth, inference: MeshInference
) -> list[Rpc]:
    """Return coord's own services, and for reflection only the services that the gateway routes elsewhere."""
    own = [
        Rpc(COORD, lambda server: coord_pb2_grpc.add_CoordServiceServicer_to_server(coord, server)),
        Rpc(ACCESS, lambda server: access_pb2_grpc.add_AccessServiceServicer_to_server(access, server)),
        Rpc(SHARES, lambda server: shares_pb2_grpc.add_ShareServiceServicer_to_server(shares, server)),
        Rpc(HEALTH, lambda server: health_pb2_grpc.add_HealthServicer_to_server(health, server)),
        Rpc(INFER, lambda server: inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference, server)),
    ]
    return own + [Rpc(descriptor, _served_elsewhere) for descriptor in (STORE, INGEST, TRIALS)]


def _served_elsewhere(server: grpc.aio.Server) -> None:
    """Add no servicer: another service serves the calls."""
