"""Metrics of coord: leadership, instances, and each Envoy's configuration by type."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable

from mesh.cluster.election import Election
from mesh.cluster.etcd import Etcd
from mesh.cluster.mirror import Mirror
from mesh.metrics.families import Family, Kind, Reading
from mesh.process.tasks import Background, for_ever
from mesh.rpc.cluster_access import PolicyWatch
from mesh.xds.ads import AdsServer
from services.coord.cluster import cluster_of

log = logging.getLogger(__name__)

C, G = Kind.COUNTER, Kind.GAUGE
LEADS = Family("shoal.coord.leader", G, "", "1: the instance leads the cluster.")
TERM = Family("shoal.coord.term", G, "", "Fencing token of this instance's term as the leader; 0: it does not lead.")
INSTANCES = Family("shoal.coord.instances", G, "{instance}", "Known instances, by service and state.", ("of", "state"))
STALE = Family("shoal.coord.view_stale", G, "", "1: etcd cannot be reached, and the view is the last one known.")
ENVOYS = Family("shoal.coord.envoys", G, "{envoy}", "Envoys with a stream of configuration to this instance.")
RESOURCES = Family("shoal.coord.xds.resources", G, "{resource}", "Resources sent to an Envoy.", ("node", "type"))
REFUSED = Family(
    "shoal.coord.xds.refused", G, "", "1: the Envoy has refused the last configuration of the type.", ("node", "type")
)
XDS_AGE = Family(
    "shoal.coord.xds.age", G, "s", "Time since the Envoy accepted or refused something of the type.", ("node", "type")
)
XDS_AWAITED = Family(
    "shoal.coord.xds.awaited",
    G,
    "s",
    "Time since something was sent that the Envoy has neither accepted nor refused; 0: it has answered all.",
    ("node", "type"),
)
POLICY = Family(
    "shoal.coord.policy.version", G, "", "Version of the policy in force; 0: callers are not authenticated."
)
DRAINED = Family("shoal.coord.drained", G, "{instance}", "Instances that an operator has drained.")
ETCD_TRIP = Family("shoal.coord.etcd.round_trip", G, "s", "Time of the last call of etcd that succeeded; 0: none did.")
ETCD_ALARM = Family("shoal.coord.etcd.alarm", G, "", "1: etcd has raised the alarm; NOSPACE: it is full.", ("alarm",))
FAMILIES = (
    *(DRAINED, ETCD_ALARM, ETCD_TRIP, LEADS, TERM, INSTANCES, STALE),
    *(ENVOYS, RESOURCES, REFUSED, XDS_AGE, XDS_AWAITED, POLICY),
)

ALARMS_S = 5.0
"""Interval at which etcd is asked for its alarms."""


class EtcdAlarms(Background):
    """Alarms that etcd has raised, read every few seconds. Used as `async with`."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self.raised: tuple[str, ...] = ()

    async def _run(self) -> None:
        # An etcd that cannot be reached is the news of others.
        await for_ever("read etcd's alarms", self._read, away_s=ALARMS_S, log=log, level=logging.DEBUG)

    async def _read(self) -> float:
        self.raised = await self._etcd.alarms()
        return ALARMS_S


class CoordMetrics:
    """Readings of one instance."""

    def __init__(
        self,
        etcd: Etcd,
        mirror: Mirror,
        ads: AdsServer,
        watch: PolicyWatch | None,
        alarms: EtcdAlarms,
    ) -> None:
        self._etcd = etcd
        self._alarms = alarms
        self.election: Election | None = None
        """Known once the instance takes part in the election."""
        self._mirror = mirror
        self._ads = ads
        self._watch = watch

    def read(self) -> Iterable[Reading]:
        term = None if self.election is None else self.election.term
        yield LEADS, (), int(term is not None)
        yield TERM, (), 0 if term is None else term.token
        copy = self._mirror.copy
        cluster = cluster_of(copy)
        yield DRAINED, (), len(cluster.drained)
        yield ETCD_TRIP, (), self._etcd.round_trip_s
        for alarm in {"NOSPACE", *self._alarms.raised}:
            yield ETCD_ALARM, (alarm,), int(alarm in self._alarms.raised)
        counts = Counter((one.service, one.state.value.lower()) for one in cluster.instances)
        for labels, count in sorted(counts.items()):
            yield INSTANCES, labels, count
        yield STALE, (), int(copy.stale)
        yield POLICY, (), 0 if self._watch is None else self._watch.in_force.value.version
        envoys = self._ads.status()
        yield ENVOYS, (), len(envoys)
        now = time.time()
        for envoy in envoys:
            for resource in envoy.types:
                labels = (envoy.node, resource.type_url.rpartition(".")[2])
                yield RESOURCES, labels, len(resource.names)
                yield REFUSED, labels, int(bool(resource.nack))
                yield XDS_AWAITED, labels, max(0.0, now - resource.awaited_since) if resource.awaited_since else 0.0
                if resource.at:
                    yield XDS_AGE, labels, max(0.0, now - resource.at)
