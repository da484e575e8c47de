"""Snapshots: pure functions from the cluster to what Envoy is to have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from envoy_data_plane.envoy.config.core.v3 import RoutingPriority

from mesh.cluster.membership import Instance, ReadyModel, State
from mesh.xds.clusters import Endpoint, cluster, http2, model_cluster
from mesh.xds.messages import (
    Cluster,
    ClusterLoadAssignment,
    DownstreamTlsContext,
    HeaderMutation,
    HttpConnectionManager,
    Listener,
    RouteConfiguration,
)
from mesh.xds.resource import CLUSTER, ENDPOINTS, LISTENER, ROUTES, pack
from mesh.xds.routes import GATEWAY_NAME, NAME, ModelRoutes, RouteTable, ServiceRoutes
from mesh.xds.snapshot import EnvoyNode, checked, clusters_of, envoy_node, snapshot
from mesh.xds.tracing import OTEL, Tracing, collector_cluster, tracing_of
from shoal.errors import InvalidArgument

NODE = EnvoyNode("local", "127.0.0.1:8080", "/tmp/shoal-x/outbound.sock")
BULK = "/shoal.inference.v2.BulkInference/"
INFERENCE = "/inference.GRPCInferenceService/"
INFER = "inference.GRPCInferenceService.ModelInfer"
MODEL_FINDER, STEP_FINDER = "envoy.filters.http.grpc_field_extraction", "shoal.steps"
LUA, BODY = "envoy.filters.http.lua", "shoal.body"
TABLE = RouteTable(
    (
        ServiceRoutes(BULK, "infer", streaming=(BULK + "InferBulk",), names_model_itself=True),
        ServiceRoutes(INFERENCE, "infer", all_idempotent=True, apart=(INFERENCE + "ModelStreamInfer",)),
        ServiceRoutes("/shoal.store.v1.", "store", idempotent=("/shoal.store.v1.StoreService/GetResult",)),
    ),
    ModelRoutes(INFERENCE, ((INFER, "model_name"),), b"", steps=(INFER,), parameters="parameters"),
)


def infer(number: int, *models: str, state: State = State.READY, node: str = "local") -> Instance:
    ready = tuple(ReadyModel(model, (1,), model.startswith("steps")) for model in models)
    address = f"unix:/tmp/shoal-x/infer-{number}.sock"
    return Instance("infer", node, f"infer-{number}", address, 10 + number, state, 1.0, ready)


def made(*instances: Instance, drained: frozenset[str] = frozenset(), tracing: Tracing | None = None):
    return snapshot(instances, drained, NODE, TABLE, tracing)


def endpoints_in(shot, name: str) -> list[tuple[str, str]]:
    message = ClusterLoadAssignment.parse(shot.of(ENDPOINTS)[name].packed.value)
    return [
        (e.endpoint.address.pipe.path.rpartition("/")[2], e.health_status.name)
        for locality in message.endpoints
        for e in locality.lb_endpoints
    ]


def test_a_cluster_for_each_service_and_each_ready_model():
    shot = made(infer(0, "a", "b"), infer(1, "b"))
    assert set(shot.of(CLUSTER)) == {"infer", "store", "model/a", "model/b"}
    assert set(shot.of(ENDPOINTS)) == set(shot.of(CLUSTER))
    assert set(shot.of(LISTENER)) == {"gateway", "outbound"}
    assert endpoints_in(shot, "model/b") == [("infer-0.sock", "HEALTHY"), ("infer-1.sock", "HEALTHY")]
    assert endpoints_in(shot, "store") == []


def test_who_takes_traffic():
    shot = made(
        infer(0, "a"),
        infer(1, "a", state=State.STARTING),
        infer(2, "a", state=State.DRAINING),
        infer(3, "a"),
        infer(4, "a", node="far"),
        drained=frozenset({"local/infer-3"}),
    )
    expected = [("infer-0.sock", "HEALTHY"), ("infer-2.sock", "DRAINING"), ("infer-3.sock", "DRAINING")]
    assert endpoints_in(shot, "infer") == expected
    assert endpoints_in(shot, "model/a") == expected


def test_lost_instances_stay_where_no_other_one_takes_new_calls():
    def found(*instances: Instance, drained: frozenset[str] = frozenset()) -> dict[str, set[Endpoint]]:
        return clusters_of(instances, drained, "local", TABLE, lost=[infer(0, "a", "b"), infer(1, "a")])

    zero, one, two = (Endpoint(infer(number).address) for number in range(3))
    everywhere = found()
    assert (everywhere["infer"], everywhere["model/a"], everywhere["model/b"]) == ({zero, one}, {zero, one}, {zero})
    # One instance is back, or left: it serves alone, except the model that it does not have.
    back = found(infer(2, "a"))
    assert (back["infer"], back["model/a"], back["model/b"]) == ({two}, {two}, {zero})
    drained = found(infer(2, "a"), drained=frozenset({infer(2).name}))
    assert drained["model/a"] == {zero, one, Endpoint(infer(2).address, draining=True)}


def test_a_model_of_lost_instances_keeps_its_routes():
    sequenced = replace(infer(0), models=(ReadyModel("a", (1,), has_sequences=True),))
    whole = made(sequenced)
    after = snapshot([], frozenset(), NODE, TABLE, lost=[sequenced])
    assert after == whole


def test_routes_name_only_clusters_that_are_there():
    shot = made(infer(0, "a"), infer(9))
    assert set(shot.of(ROUTES)) == {NAME, GATEWAY_NAME}
    for routes in shot.of(ROUTES).values():
        assert routes.needs == {"infer", "store", "model/a"}
        assert routes.needs <= shot.of(CLUSTER).keys()
        with pytest.raises(LookupError, match="model/gone"):
            checked([replace(routes, needs=routes.needs | {"model/gone"}), *shot.of(CLUSTER).values()])


@pytest.mark.parametrize("model", ["", "we ird", "x" * 256, "name\n", "ünï", "a\0b", 'a"b'])
def test_models_with_odd_names_get_no_cluster_of_their_own(model):
    assert set(made(infer(0, model)).of(CLUSTER)) == {"infer", "store"}


@pytest.mark.parametrize("address", ["unix:relative", "unix:", "unix:/" + "x" * 120, "unix:/a\0b", "junk", "1.2.3.4:x"])
def test_addresses_that_envoy_would_refuse_are_left_out(address):
    shot = made(replace(infer(0), address=address), infer(1))
    assert endpoints_in(shot, "infer") == [("infer-1.sock", "HEALTHY")]


def test_an_instance_that_claims_the_name_of_another_service_reaches_no_cluster_but_its_own():
    found = clusters_of([replace(infer(0), service="model/a")], frozenset(), "local", TABLE)
    assert found == {"infer": set(), "store": set()}


def test_versions_come_from_the_content_and_what_did_not_change_is_shared():
    before, after = made(infer(0, "a"), infer(2)), made(infer(0, "a"), infer(2), infer(1))
    assert before.of(CLUSTER)["infer"] is after.of(CLUSTER)["infer"]
    assert before.of(ROUTES)[NAME] is after.of(ROUTES)[NAME]
    assert before.of(ENDPOINTS)["model/a"] is after.of(ENDPOINTS)["model/a"]
    assert before.of(ENDPOINTS)["infer"].version != after.of(ENDPOINTS)["infer"].version
    assert made(infer(1), infer(2), infer(0, "a")) == after


def test_a_rebuilt_resource_has_the_same_version():
    first = cluster("infer")
    cluster.cache_clear()
    again = cluster("infer")
    assert again is not first
    assert again == first


def test_a_gateway_elsewhere_is_another_listener_and_nothing_else():
    other = snapshot([infer(0)], frozenset(), replace(NODE, gateway="127.0.0.1:9090"), TABLE)
    ours = made(infer(0))
    differing = [
        (type_url, name)
        for type_url, resources in ours.resources.items()
        for name, resource in resources.items()
        if other.of(type_url)[name] != resource
    ]
    assert differing == [(LISTENER, "gateway")]


def routes_of(shot) -> list:
    return RouteConfiguration.parse(shot.of(ROUTES)[NAME].packed.value).virtual_hosts[0].routes


def test_every_route_retries_elsewhere_unless_the_caller_forbids_it_and_leaves_deadlines_to_the_instances():
    refusal, *routes = routes_of(made(infer(0, "a")))
    assert refusal.direct_response is not None  # Of paths that are no text.
    for route in routes:
        action = route.route
        assert action.timeout.total_seconds() == 0
        assert action.max_stream_duration is None, "an instance ends a call at its deadline"
        (allowed,) = action.retry_policy.retriable_request_headers
        assert (allowed.name, allowed.present_match, allowed.invert_match) == ("x-shoal-no-retry", True, True)
        assert action.retry_policy.retry_host_predicate[0].name == "envoy.retry_host_predicates.previous_hosts"
        assert 1 <= action.retry_policy.num_retries <= 3


def test_the_gateway_repeats_no_call_in_the_text_form_of_grpc_web():
    [host, *_] = RouteConfiguration.parse(made(infer(0, "a")).of(ROUTES)[GATEWAY_NAME].packed.value).virtual_hosts
    of_text = [
        (number, route)
        for number, route in enumerate(host.routes)
        if route.match.headers and route.match.headers[0].name == "content-type"
    ]
    assert of_text
    for number, route in of_text:
        assert route.route.retry_policy is None
        plain = [n for n, other in enumerate(host.routes) if other.match.prefix == route.match.prefix]
        assert number < plain[-1]


def test_calls_that_name_a_model_go_to_its_cluster_before_any_other_route_matches():
    found = routes_of(made(infer(0, "a", "b" * 200), infer(9)))
    by_model = {
        route.match.headers[0].string_match.exact: route.route.cluster
        for route in found
        if route.match.prefix == INFERENCE and route.match.headers and route.match.headers[0].name == "x-shoal-model"
    }
    assert by_model == {"a": "model/a", "b" * 200: "model/" + "b" * 200}
    fallback = next(n for n, route in enumerate(found) if route.match.prefix == INFERENCE and not route.match.headers)
    assert all(not route.match.headers for route in found[fallback:])
    assert found[fallback].route.cluster == "infer"


def test_a_hundred_models_are_all_there():
    shot = made(infer(0, *(f"m{number}" for number in range(100))), infer(9))
    assert len(shot.of(CLUSTER)) == 102
    # Each of its own for the protocol's calls and for bulks. Three more: compressed messages cannot be searched, other
    # methods than POST have no message, and a unary call that waits for its message has an idle timeout.
    assert len(routes_of(shot)) == 2 * 100 + 3 + len(routes_of(made()))


def test_calls_are_searched_for_their_model_only_where_instances_differ():
    alike = routes_of(made(infer(0, "a", "b"), infer(1, "a", "b")))
    (inference,) = [route for route in alike if route.match.prefix == INFERENCE]
    assert inference.route.cluster == "infer"
    assert set(inference.typed_per_filter_config) == {BODY, MODEL_FINDER, STEP_FINDER, LUA}
    apart = routes_of(made(infer(0, "a", "b"), infer(1, "a")))
    named = [r for r in apart if r.match.prefix == INFERENCE and r.match.headers]
    assert [r.route.cluster for r in named if r.match.headers[0].name == "x-shoal-model"] == ["model/b"]
    (inference,) = [route for route in apart if route.match.prefix == INFERENCE and not route.match.headers]
    assert set(inference.typed_per_filter_config) == {STEP_FINDER}
    for route in apart:
        if (route.match.path or route.match.prefix or "").startswith("/shoal"):
            assert set(route.typed_per_filter_config) == {BODY, MODEL_FINDER, STEP_FINDER, LUA}
    drained = routes_of(made(infer(0, "a"), infer(1, "a"), drained=frozenset({"local/infer-1"})))
    assert len(drained) == len(alike), "what is drained is drained of all models alike"


def test_only_a_unary_call_without_its_whole_message_has_an_idle_timeout():
    for route in routes_of(made(infer(0, "a", "b"), infer(1, "a")))[1:]:
        is_waiting = route.match.path == INFERENCE + "ModelInfer"
        assert route.route.idle_timeout.total_seconds() == (30 if is_waiting else 0)
        if is_waiting:
            (header,) = route.match.headers
            assert (header.name, header.present_match, header.invert_match) == ("x-shoal-model", True, True)


def test_calls_of_clients_but_inferences_end_without_progress_when_the_heap_of_envoy_is_full():
    """A timeout of a year is a second then (shoal.node.envoy_overload)."""
    shot = made(infer(0, "a"))
    timeouts = {
        name: {
            each.match.path or each.match.prefix: each.route.idle_timeout.days
            for each in RouteConfiguration.parse(shot.of(ROUTES)[name].packed.value).virtual_hosts[0].routes
            if each.route is not None
        }
        for name in (GATEWAY_NAME, NAME)
    }
    assert set(timeouts[NAME].values()) == {0}, "services are no clients"
    found = timeouts[GATEWAY_NAME]
    assert {path for path, days in found.items() if not days} == {INFERENCE}
    assert (found[INFERENCE + "ModelStreamInfer"], found["/shoal.store.v1."]) == (365, 365)


def test_streams_and_bulks_use_other_connections_to_the_instances_than_plain_calls():
    routes = [each for each in routes_of(made(infer(0, "a"))) if each.route is not None]
    apart = {each.match.path for each in routes if each.route.priority == RoutingPriority.HIGH}
    assert apart == {INFERENCE + "ModelStreamInfer", BULK + "InferBulk"}
    assert INFERENCE in {each.match.prefix for each in routes if each.route.priority == RoutingPriority.DEFAULT}


def test_bulks_and_rest_do_so_where_instances_differ_and_models_have_sequences_too():
    shot = snapshot([infer(0, "a"), infer(1, "steps")], frozenset(), NODE, replace(TABLE, rest="infer"))
    found = [each for each in routes_of(shot) if each.route is not None]
    bulks = [each for each in found if (each.match.prefix or "").startswith(BULK) and each.route.cluster != "infer"]
    rest = [each for each in found if each.match.path_separated_prefix]
    assert {each.route.cluster for each in bulks} == {"model/a", "model/steps"}
    assert {each.route.cluster for each in rest} == {"model/a", "model/steps", "infer"}
    assert {each.route.priority for each in (*bulks, *rest)} == {RoutingPriority.HIGH}


def test_both_listeners_bound_headers_and_streams_and_no_address_is_internal():
    for name, streams, headers_kb in (("gateway", 1024, 16), ("outbound", 4096, 60)):
        message = Listener.parse(made().of(LISTENER)[name].packed.value)
        assert message.per_connection_buffer_limit_bytes == 16 << 10
        packed = message.filter_chains[0].filters[0].typed_config
        manager = HttpConnectionManager.parse(packed.value)
        assert manager.http2_protocol_options.max_concurrent_streams == streams
        assert manager.max_request_headers_kb == headers_kb
        assert manager.common_http_protocol_options.max_headers_count == 256
        internal = manager.internal_address_config
        assert internal.unix_sockets is (name == "outbound")
        assert [each.address_prefix for each in internal.cidr_ranges] == ["0.0.0.0"]


def test_clients_cannot_set_the_headers_that_only_services_set():
    found = {}
    for name in ("gateway", "outbound"):
        message = Listener.parse(made().of(LISTENER)[name].packed.value)
        manager = HttpConnectionManager.parse(message.filter_chains[0].filters[0].typed_config.value)
        extensions = [HeaderMutation.parse(e.typed_config.value) for e in manager.early_header_mutation_extensions]
        found[name] = {each.remove for extension in extensions for each in extension.mutations if each.remove}
    assert found["gateway"] >= {"x-shoal-model", "x-shoal-caller", "x-shoal-job-retry", "x-shoal-sequence"}
    assert "x-shoal-job-retry" not in found["outbound"]


def test_frames_of_one_client_cannot_close_the_connection_to_an_instance():
    [options] = http2().values()
    assert options["explicit_http_config"]["http2_protocol_options"]["max_outbound_frames"] > 1_000_000


def test_bulks_are_routed_by_their_header_and_not_at_all_without_it():
    for shot in (made(infer(0, "a"), infer(1, "b")), made(infer(0, "a"), infer(1, "a"))):
        bulk = [r for r in routes_of(shot) if (r.match.path or r.match.prefix or "").startswith(BULK)]
        assert all(r.match.headers[0].name == "x-shoal-model" for r in bulk)
        by_model = {
            r.match.headers[0].string_match.exact: r.route.cluster for r in bulk if r.match.headers[0].string_match
        }
        assert by_model in ({"a": "model/a", "b": "model/b"}, {})
        assert {r.route.cluster for r in bulk if r.match.headers[0].present_match} == {"infer"}
        assert all(r.route.retry_policy.retry_on == "connect-failure,refused-stream,reset-before-request" for r in bulk)


def test_steps_go_by_the_hash_of_their_sequence_and_are_not_run_twice():
    shot = made(infer(0, "a", "steps"), infer(1, "a", "steps"))
    found = routes_of(shot)
    (step, waiting) = [route for route in found if route.match.path == INFERENCE + "ModelInfer" and route.match.headers]
    assert (waiting.route.cluster, waiting.match.headers[0].invert_match) == ("infer", True)
    assert step.route.cluster == "model/steps"
    assert [policy.header.header_name for policy in step.route.hash_policy] == ["x-shoal-sequence"]
    assert step.route.retry_policy.retry_on == "connect-failure,refused-stream,reset-before-request"
    found = [route for route in found if route.match.prefix != BULK]
    first = next(n for n, route in enumerate(found) if route.route and route.route.cluster == "model/steps")
    assert found[first] == step, "before the route of the model's other calls"
    (inference,) = [route for route in found if route.match.prefix == INFERENCE and not route.match.headers]
    assert set(inference.typed_per_filter_config) == {MODEL_FINDER}, "calls are searched for their sequence, too"
    policies = {
        name: Cluster.parse(resource.packed.value).lb_policy.name for name, resource in shot.of(CLUSTER).items()
    }
    ringed = [name for name, policy in policies.items() if policy == "RING_HASH"]
    assert ringed == ["model/steps"]


def test_only_what_may_run_twice_is_retried_after_it_may_have_run():
    retried = {}
    for route in routes_of(made()):
        key = route.match.path or route.match.prefix
        if not route.match.headers:
            retried[key] = route.route.retry_policy.retry_on
    assert "unavailable" in retried[INFERENCE]
    assert "unavailable" in retried["/shoal.store.v1.StoreService/GetResult"]
    assert retried["/shoal.store.v1."] == "connect-failure,refused-stream,reset-before-request"


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"shoal": 3},
        {"shoal": {"gateway": "x", "outbound": "/y"}},
        {"shoal": {"gateway": "127.0.0.1:80"}},
        {"shoal": {"gateway": "127.0.0.1:80", "outbound": "/" + "x" * 200}},
        {"shoal": {"gateway": "127.0.0.1:80", "outbound": "/y", "sds": "relative.json"}},
    ],
)
def test_an_envoy_that_does_not_say_where_it_listens_is_refused(metadata):
    with pytest.raises(InvalidArgument, match="local"):
        envoy_node("local", metadata)


def test_an_envoy_says_where_it_listens():
    metadata = {"shoal": {"gateway": "127.0.0.1:8080", "outbound": "/tmp/shoal-x/outbound.sock"}}
    assert envoy_node("local", metadata) == NODE
    metadata["shoal"]["sds"] = "/tmp/shoal-x/tls/sds.json"
    assert envoy_node("local", metadata) == replace(NODE, sds="/tmp/shoal-x/tls/sds.json")


def test_only_the_gateway_speaks_tls_with_a_certificate_that_can_be_renewed_and_a_bounded_handshake():
    shot = snapshot([infer(0)], frozenset(), replace(NODE, sds="/run/tls/sds.json"), TABLE)
    for name, has_tls in (("gateway", True), ("outbound", False)):
        chain = Listener.parse(shot.of(LISTENER)[name].packed.value).filter_chains[0]
        assert (chain.transport_socket is not None) is has_tls
        if has_tls:
            assert chain.transport_socket_connect_timeout.total_seconds() == 10
            common = DownstreamTlsContext.parse(chain.transport_socket.typed_config.value).common_tls_context
            assert common.tls_params.tls_minimum_protocol_version.name == "TLSv1_2"
            assert common.alpn_protocols == ["h2", "http/1.1"]
            [secret] = common.tls_certificate_sds_secret_configs
            assert secret.sds_config.path_config_source.path == "/run/tls/sds.json"


def test_tracing_adds_a_cluster_and_changes_the_listeners():
    plain, traced = made(infer(0)), made(infer(0), tracing=Tracing("http://127.0.0.1:4317"))
    assert set(traced.of(CLUSTER)) - set(plain.of(CLUSTER)) == {OTEL}
    assert all(traced.of(LISTENER)[name] != plain.of(LISTENER)[name] for name in plain.of(LISTENER))
    assert traced.of(LISTENER)["gateway"].needs == {OTEL}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, Tracing("http://c:4317")),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            Tracing("http://c:4318/v1/traces", "http/protobuf"),
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://ann:s%40cret@c:4317"},
            Tracing("https://c:4317", headers=(("authorization", "Basic YW5uOnNAY3JldA=="),)),
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/x",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20abc,x=1",
                "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": "0.25",
            },
            Tracing("http://c:4318/x", "http/protobuf", (("authorization", "Bearer abc"), ("x", "1")), 25.0),
        ),
    ],
)
def test_tracing_is_what_the_environment_says(environ, expected):
    assert tracing_of(environ) == expected


@pytest.mark.parametrize(
    "url",
    ["http://localhost:4317", "localhost:4317", "https://c.example/v1/traces", "unix:///run/c.sock", "http://[::1]:1"],
)
def test_collectors_of_every_kind_can_be_told_to_envoy(url):
    assert collector_cluster(Tracing(url)).name == OTEL


def test_model_clusters_have_names_of_their_own():
    assert model_cluster("infer") == "model/infer"
    assert Endpoint("unix:/a") < Endpoint("unix:/b")
    assert pack(CLUSTER, "x", ClusterLoadAssignment()).version == pack(CLUSTER, "y", ClusterLoadAssignment()).version
