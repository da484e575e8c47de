"""What gRPC itself lets a client do: large messages, compression, metadata, deadlines, cancellation, many calls."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from tests.infer.conformance import wire
from tests.infer.conformance.wire import Given, floats, request

MB = 1 << 20


@pytest.mark.parametrize("megabytes", [1, 5, 100])
def test_messages_both_ways_up_to_100_mb(infer, megabytes):
    """gRPC's own limit would be 4 MB. The response is as large as the request."""
    array = np.random.default_rng(megabytes).random((4, megabytes * MB // 16), "f4")
    response = infer("same_fp32", Given("x", "FP32", array.shape, array.tobytes()))
    assert wire.raw_of(response, "y") == ("FP32", list(array.shape), array.tobytes())


def test_100_mb_on_a_stream(stub):
    array = np.random.default_rng(7).random((1, 100 * MB // 4), "f4")
    asked = request("same_fp32", Given("x", "FP32", array.shape, array.tobytes()))
    (response,) = stub.ModelStreamInfer(iter([asked]), timeout=wire.PATIENCE_S)
    assert wire.raw_of(response.infer_response, "y")[2] == array.tobytes()


def test_a_message_beyond_the_limit_is_refused_and_the_server_lives(instance, stub):
    asked = request("same_fp32", Given("x", "FP32", (1, 40 * MB), b"\0" * (160 * MB)))
    unlimited = (*wire.OPTIONS, ("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
    with grpc.insecure_channel(instance.address, options=unlimited) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            GRPCInferenceServiceStub(channel).ModelInfer(asked, timeout=wire.PATIENCE_S)
    assert wire.status(caught.value)[0] == "RESOURCE_EXHAUSTED"
    assert stub.ServerLive(pb.ServerLiveRequest()).live


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate, grpc.Compression.NoCompression])
@pytest.mark.parametrize("columns", [4, 250_000])
def test_compressed_requests(stub, algorithm, columns):
    array = np.arange(columns, dtype="<f4").reshape(1, columns)
    asked = request("same_fp32", Given("x", "FP32", array.shape, array.tobytes()))
    response = stub.ModelInfer(asked, timeout=wire.PATIENCE_S, compression=algorithm)
    assert wire.raw_of(response, "y")[2] == array.tobytes()
    (response,) = stub.ModelStreamInfer(iter([asked]), timeout=wire.PATIENCE_S, compression=algorithm)
    assert wire.raw_of(response.infer_response, "y")[2] == array.tobytes()


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_channel_that_compresses_everything(instance, algorithm):
    with grpc.insecure_channel(instance.address, options=wire.OPTIONS, compression=algorithm) as channel:
        stub = GRPCInferenceServiceStub(channel)
        response = stub.ModelInfer(request("double", floats(rows=8)), timeout=wire.PATIENCE_S)
        assert wire.array(response, "y").shape == (8, 4)
        assert stub.ModelMetadata(pb.ModelMetadataRequest(name="double"), timeout=wire.PATIENCE_S).name == "double"


def test_metadata_of_any_kind_is_taken(stub):
    metadata = [
        ("x-any", "thing"),
        ("x-many", "1"),
        ("x-many", "2"),
        ("x-bytes-bin", b"\x00\xff"),
        ("authorization", "Bearer token"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("x-shoal-tenant", "acme"),
        ("triton-request-id", "r"),
        ("x-long", "v" * 4000),
    ]
    response = stub.ModelInfer(request("double", floats()), timeout=wire.PATIENCE_S, metadata=metadata)
    assert wire.array(response, "y")[0].tolist() == [2, 4, 6, 8]


def test_a_deadline_ends_what_waits(stub):
    """`patient` would wait a minute for a fourth row."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request("patient", floats()), timeout=0.2)
    assert wire.status(caught.value)[0] == "DEADLINE_EXCEEDED"


def test_the_timeout_parameter_ends_what_waits(refused):
    """In microseconds. The server says so itself: the call has no deadline near."""
    refused("DEADLINE_EXCEEDED", request("patient", floats(), parameters={"timeout": 100_000}))


def test_expired_rows_do_not_complete_the_batch_of_others(stub, refused):
    refused("DEADLINE_EXCEEDED", request("patient", floats(rows=3), parameters={"timeout": 50_000}))
    # One row more would have made four.
    refused("DEADLINE_EXCEEDED", request("patient", floats(), parameters={"timeout": 100_000}))
    response = stub.ModelInfer(request("patient", floats(rows=4)), timeout=wire.PATIENCE_S)
    assert wire.array(response, "y").shape == (4, 4)


def test_a_cancelled_call_leaves_the_queue(stub):
    before = wire.failures(stub, "patient")
    call = stub.ModelInfer.future(request("patient", floats(rows=3)), timeout=wire.PATIENCE_S)
    stub.ServerLive(pb.ServerLiveRequest())  # Behind it on the same connection: by now it was read.
    assert call.cancel()
    assert call.code() is grpc.StatusCode.CANCELLED
    wire.until(lambda: wire.failures(stub, "patient") > before, "the cancelled call is counted")
    # One row more would have made four.
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request("patient", floats()), timeout=0.3)
    assert wire.status(caught.value)[0] == "DEADLINE_EXCEEDED"


def test_many_calls_at_once_on_one_connection(stub):
    def ask(n: int) -> float:
        return float(
            wire.array(stub.ModelInfer(request("double", floats(start=n)), timeout=wire.PATIENCE_S), "y")[0, 0]
        )

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(500))) == [2.0 * n for n in range(500)]


def test_many_connections_at_once(instance):
    def ask(n: int) -> float:
        # Without a subchannel of its own each channel would share the one connection of this process.
        options = (*wire.OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        with grpc.insecure_channel(instance.address, options=options) as channel:
            response = GRPCInferenceServiceStub(channel).ModelInfer(
                request("double", floats(start=n)), timeout=wire.PATIENCE_S
            )
        return float(wire.array(response, "y")[0, 0])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(64))) == [2.0 * n for n in range(64)]


def test_a_client_that_pings_often_is_not_cut(instance):
    """tritonclient's KeepAliveOptions."""
    options = (
        *wire.OPTIONS,
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
    with grpc.insecure_channel(instance.address, options=options) as channel:
        response = GRPCInferenceServiceStub(channel).ModelInfer(request("double", floats()), timeout=wire.PATIENCE_S)
    assert wire.array(response, "y")[0].tolist() == [2, 4, 6, 8]
