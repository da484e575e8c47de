"""The delta protocol, as transcripts: what Envoy says, what it is sent."""

from __future__ import annotations

from mesh.xds.delta import Request, Response, Session
from mesh.xds.messages import Packed
from mesh.xds.resource import CLUSTER, ENDPOINTS, EXTENSION, LISTENER, ROUTES, TYPES, Resource
from mesh.xds.snapshot import Snapshot


def resource(type_url: str, name: str, version: str = "1", *needs: str) -> Resource:
    return Resource(type_url, name, version, Packed(), frozenset(needs))


def snapshot(*resources: Resource) -> Snapshot:
    by_type: dict[str, dict[str, Resource]] = {type_url: {} for type_url in TYPES}
    for one in resources:
        by_type[one.type_url][one.name] = one
    return Snapshot(by_type)


A, B = resource(CLUSTER, "a"), resource(CLUSTER, "b")
EA, EB = resource(ENDPOINTS, "a"), resource(ENDPOINTS, "b")
L = resource(LISTENER, "gateway")
R = resource(ROUTES, "r", "1", "a")
R2 = resource(ROUTES, "r", "2", "a", "b")


class Envoy:
    """The other end of a Session: subscribes, and answers each response."""

    def __init__(self) -> None:
        self.session = Session()
        self.has: dict[tuple[str, str], str] = {}

    def subscribe(self, type_url: str, *names: str, versions: dict[str, str] | None = None) -> None:
        self.session.receive(Request(type_url, subscribe=names, initial_versions=versions or {}), 1.0)

    def start(self) -> None:
        for type_url, names in [(CLUSTER, ()), (ENDPOINTS, ("a", "b")), (LISTENER, ()), (ROUTES, ("r",))]:
            self.subscribe(type_url, *names)

    def ack(self, response: Response) -> None:
        for one in response.resources:
            self.has[one.type_url, one.name] = one.version
        for name in response.removed:
            self.has.pop((response.type_url, name), None)
        self.session.receive(Request(response.type_url, nonce=response.nonce), 2.0)

    def nack(self, response: Response, why: str = "no") -> None:
        self.session.receive(Request(response.type_url, nonce=response.nonce, error=why), 2.0)

    def settle(self, shot: Snapshot, limit: int = 20) -> list[tuple[str, list[str], list[str]]]:
        """Takes and acknowledges responses until there are no more. Returns what came, in order."""
        came = []
        for _ in range(limit):
            responses = self.session.due(shot)
            if not responses:
                return came
            for response in responses:
                short = response.type_url.rpartition(".")[2]
                came.append((short, [r.name for r in response.resources], list(response.removed)))
                self.ack(response)
        raise AssertionError(f"no end of it: {came}")


def test_everything_comes_once_clusters_first_and_routes_last():
    envoy = Envoy()
    envoy.start()
    shot = snapshot(A, B, EA, EB, L, R)
    came = envoy.settle(shot)
    assert [kind for kind, _, _ in came] == ["Cluster", "ClusterLoadAssignment", "Listener", "RouteConfiguration"]
    assert envoy.settle(shot) == []


def test_only_what_changed_is_sent():
    envoy = Envoy()
    envoy.start()
    envoy.settle(snapshot(A, B, EA, EB, L, R))
    changed = resource(ENDPOINTS, "b", "2")
    assert envoy.settle(snapshot(A, B, EA, changed, L, R)) == [("ClusterLoadAssignment", ["b"], [])]


def test_one_response_of_a_type_is_on_its_way_at_a_time_and_the_next_has_the_newest():
    envoy = Envoy()
    envoy.subscribe(CLUSTER)
    (first,) = envoy.session.due(snapshot(A))
    assert envoy.session.due(snapshot(A, B)) == []
    assert envoy.session.due(snapshot(resource(CLUSTER, "a", "3"), B)) == []
    envoy.ack(first)
    (second,) = envoy.session.due(snapshot(resource(CLUSTER, "a", "3"), B))
    assert [(r.name, r.version) for r in second.resources] == [("a", "3"), ("b", "1")]


def test_a_route_waits_for_the_clusters_that_it_names_and_their_endpoints():
    envoy = Envoy()
    envoy.start()
    envoy.settle(snapshot(A, EA, L, R))
    shot = snapshot(A, B, EA, EB, L, R2)
    (clusters, endpoints) = envoy.session.due(shot)
    assert (clusters.type_url, endpoints.type_url) == (CLUSTER, ENDPOINTS)
    envoy.ack(clusters)
    assert envoy.session.due(shot) == []
    envoy.ack(endpoints)
    (routes,) = envoy.session.due(shot)
    assert routes.resources == (R2,)


def test_a_cluster_goes_after_the_routes_that_named_it():
    envoy = Envoy()
    envoy.start()
    envoy.settle(snapshot(A, B, EA, EB, L, R2))
    shot = snapshot(A, EA, L, R)
    due = {response.type_url: response for response in envoy.session.due(shot)}
    assert CLUSTER not in due
    envoy.ack(due[ROUTES])
    (removal,) = (r for r in envoy.session.due(shot) if r.type_url == CLUSTER)
    assert removal.removed == ("b",)


def test_an_empty_answer_is_still_an_answer():
    envoy = Envoy()
    envoy.subscribe(LISTENER)
    assert envoy.settle(snapshot()) == [("Listener", [], [])]
    assert envoy.settle(snapshot()) == []


def test_a_name_that_is_not_there_is_said_to_be_gone_and_sent_once_it_is():
    envoy = Envoy()
    envoy.subscribe(ENDPOINTS, "a")
    assert envoy.settle(snapshot()) == [("ClusterLoadAssignment", [], ["a"])]
    assert envoy.settle(snapshot(EA)) == [("ClusterLoadAssignment", ["a"], [])]
    assert envoy.settle(snapshot()) == [("ClusterLoadAssignment", [], ["a"])]


def test_what_nobody_subscribed_to_is_not_sent():
    envoy = Envoy()
    envoy.subscribe(ENDPOINTS, "a")
    assert envoy.settle(snapshot(A, EA, EB)) == [("ClusterLoadAssignment", ["a"], [])]
    envoy.session.receive(Request(ENDPOINTS, unsubscribe=("a",)), 3.0)
    assert envoy.settle(snapshot(A, resource(ENDPOINTS, "a", "2"))) == []


def test_an_explicit_wildcard_beside_names_and_its_end():
    envoy = Envoy()
    envoy.subscribe(CLUSTER, "*", "a")
    assert envoy.settle(snapshot(A, B)) == [("Cluster", ["a", "b"], [])]
    envoy.session.receive(Request(CLUSTER, unsubscribe=("*",)), 3.0)
    assert envoy.settle(snapshot(resource(CLUSTER, "a", "2"), resource(CLUSTER, "b", "2"))) == [("Cluster", ["a"], [])]


def test_names_without_a_wildcard_are_no_wildcard():
    envoy = Envoy()
    envoy.subscribe(CLUSTER, "a")
    assert envoy.settle(snapshot(A, B)) == [("Cluster", ["a"], [])]


def test_whoever_subscribes_again_has_forgotten():
    envoy = Envoy()
    envoy.subscribe(ENDPOINTS, "a")
    envoy.settle(snapshot(EA))
    envoy.session.receive(Request(ENDPOINTS, unsubscribe=("a",)), 3.0)
    envoy.subscribe(ENDPOINTS, "a")
    assert envoy.settle(snapshot(EA)) == [("ClusterLoadAssignment", ["a"], [])]


def test_a_replaced_cluster_gets_its_endpoints_again():
    envoy = Envoy()
    envoy.start()
    envoy.settle(snapshot(A, EA, L, R))
    came = envoy.settle(snapshot(resource(CLUSTER, "a", "2"), EA, L, R))
    assert came == [("Cluster", ["a"], []), ("ClusterLoadAssignment", ["a"], [])]


def test_a_reconnect_costs_only_what_changed_meanwhile():
    envoy = Envoy()
    envoy.subscribe(CLUSTER, versions={"a": "1", "b": "0", "gone": "1"})
    envoy.subscribe(ENDPOINTS, "a", "b", versions={"a": "1", "b": "1"})
    envoy.subscribe(LISTENER, versions={"gateway": "1"})
    envoy.subscribe(ROUTES, "r", versions={"r": "2"})
    came = envoy.settle(snapshot(A, B, EA, EB, L, R2))
    assert came == [("Cluster", ["b"], ["gone"]), ("Listener", [], []), ("ClusterLoadAssignment", ["b"], [])]


def test_after_a_reconnect_no_cluster_goes_before_the_routes_are_known():
    envoy = Envoy()
    envoy.subscribe(CLUSTER, versions={"a": "1", "b": "1"})
    shot = snapshot(A, EA, L, R)
    (greeting,) = envoy.session.due(shot)
    assert greeting.removed == ()
    envoy.ack(greeting)
    envoy.subscribe(ENDPOINTS, "a", "b", versions={"a": "1", "b": "1"})
    envoy.subscribe(LISTENER, versions={"gateway": "1"})
    envoy.subscribe(ROUTES, "r", versions={"r": "2"})
    due = {response.type_url: response for response in envoy.session.due(shot)}
    assert CLUSTER not in due
    for response in due.values():
        envoy.ack(response)
    assert ("Cluster", [], ["b"]) in envoy.settle(shot)


def test_a_refused_response_is_sent_again_piece_by_piece_and_the_bad_piece_left_out():
    envoy = Envoy()
    envoy.start()
    bad = resource(CLUSTER, "bad")
    shot = snapshot(A, bad, B, EA, EB, L, R)
    came = []
    for _ in range(20):
        responses = envoy.session.due(shot)
        if not responses:
            break
        for response in responses:
            came.append([r.name for r in response.resources])
            if any(r.name == "bad" for r in response.resources):
                envoy.nack(response, "bad: negative timeout")
            else:
                envoy.ack(response)
    else:
        raise AssertionError("no end of it")
    assert ["bad"] in came
    assert {(CLUSTER, "a"), (CLUSTER, "b"), (ROUTES, "r")} <= envoy.has.keys()
    (status,) = (s for s in envoy.session.status() if s.type_url == CLUSTER)
    assert status.nack == "bad: negative timeout"
    assert status.names == ("a", "b")
    # Better now: it is sent, and the refusal forgotten.
    better = resource(CLUSTER, "bad", "2")
    assert envoy.settle(snapshot(A, better, B, EA, EB, L, R))[0] == ("Cluster", ["bad"], [])
    (status,) = (s for s in envoy.session.status() if s.type_url == CLUSTER)
    assert (status.nack, status.names) == ("", ("a", "b", "bad"))


def test_a_route_to_a_refused_cluster_does_not_wait_for_ever():
    envoy = Envoy()
    envoy.start()
    shot = snapshot(A, B, EA, EB, L, R2)
    for _ in range(10):
        for response in envoy.session.due(shot):
            if response.type_url == CLUSTER and any(r.name == "b" for r in response.resources):
                envoy.nack(response)
            else:
                envoy.ack(response)
    assert envoy.has[ROUTES, "r"] == "2"


def test_an_answer_to_an_older_response_changes_nothing():
    envoy = Envoy()
    envoy.subscribe(CLUSTER)
    (first,) = envoy.session.due(snapshot(A))
    envoy.ack(first)
    (second,) = envoy.session.due(snapshot(A, B))
    envoy.nack(first)
    assert envoy.session.due(snapshot(A, B)) == []
    envoy.ack(second)
    assert envoy.settle(snapshot(A, B)) == []


def test_types_that_are_not_served_are_ignored():
    envoy = Envoy()
    envoy.subscribe("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "cert")
    assert envoy.settle(snapshot(A)) == []
    assert envoy.session.status() == ()


def test_a_resource_whose_update_was_refused_is_still_removed_later():
    envoy = Envoy()
    envoy.subscribe(CLUSTER)
    envoy.subscribe(LISTENER)
    envoy.subscribe(ROUTES, "r")
    envoy.settle(snapshot(A, B))
    for _ in range(3):
        for response in envoy.session.due(snapshot(A, resource(CLUSTER, "b", "2"))):
            envoy.nack(response)
    assert envoy.session.due(snapshot(A, resource(CLUSTER, "b", "2"))) == []
    assert envoy.settle(snapshot(A)) == [("Cluster", [], ["b"])]
    assert envoy.settle(snapshot(A)) == []


def test_no_cluster_goes_that_routes_may_still_name_because_newer_ones_were_refused():
    envoy = Envoy()
    envoy.start()
    envoy.settle(snapshot(A, B, EA, EB, L, R2))
    shot = snapshot(A, EA, L, R)
    for _ in range(5):
        for response in envoy.session.due(shot):
            assert response.type_url != CLUSTER
            if response.type_url == ROUTES:
                envoy.nack(response)
            else:
                envoy.ack(response)
    better = resource(ROUTES, "r", "3", "a")
    assert [(kind, removed) for kind, _, removed in envoy.settle(snapshot(A, EA, L, better))] == [
        ("RouteConfiguration", []),
        ("Cluster", ["b"]),
    ]


def test_filters_are_settled_when_envoy_has_or_has_rejected_each_that_it_asked_for():
    envoy = Envoy()
    envoy.subscribe(EXTENSION, "callers", "rules")
    first = snapshot(*(resource(EXTENSION, name) for name in ("callers", "rules", "nobody's")))
    assert not envoy.session.is_settled(EXTENSION, first)
    (both,) = envoy.session.due(first)
    assert not envoy.session.is_settled(EXTENSION, first)
    envoy.ack(both)
    assert envoy.session.is_settled(EXTENSION, first)
    second = snapshot(*(resource(EXTENSION, name, "2") for name in ("callers", "rules")))
    assert not envoy.session.is_settled(EXTENSION, second)
    (both,) = envoy.session.due(second)
    envoy.nack(both)
    (callers,) = envoy.session.due(second)
    envoy.ack(callers)
    (rules,) = envoy.session.due(second)
    assert not envoy.session.is_settled(EXTENSION, second)
    envoy.nack(rules)
    assert envoy.session.is_settled(EXTENSION, second)
