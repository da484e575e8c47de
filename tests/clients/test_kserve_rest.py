"""KServe's REST client, by a recorded exchange: its package needs 69 others.

Recorded from InferenceRESTClient of kserve 0.21.0 against `shoal serve`, which served all of it. The client reads
`live` and `ready` from the bodies of health checks, and the length of the JSON from the response's header.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from tests.infer.conformance.instance import Instance
from tests.mesh.http1.raw import RawClient

HEADERS = (
    "Accept: */*",
    "Accept-Encoding: gzip, deflate",
    "Connection: keep-alive",
    "User-Agent: python-httpx/0.28.1",
)
JSON = "content-type: application/json"
NUMBERS = struct.pack("<4f", 1, 2, 3, 4)
AS_JSON = (
    b'{"id":"7","model_name":"double","inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[1.0,2.0,3.0,4.0]}]}'
)
HEAD = (
    b'{"id":"16e299e0-431d-4a1c-83cc-3ab6949d3712","model_name":"double","inputs":[{"name":"x","shape":[1,4],'
    b'"datatype":"FP32","parameters":{"binary_data_size":16}}],'
    b'"outputs":[{"name":"y","parameters":{"binary_data":true}}]}'
)


async def test_its_exchange(served: Instance) -> None:
    async with await RawClient.connect(served.address) as client:

        async def get(path: str) -> tuple[int, Any]:
            response = await client.request("GET", path, None, *HEADERS)
            return response.status, json.loads(response.body or b"null")

        assert await get("/v2/health/live") == (200, {"live": True})
        assert await get("/v2/health/ready") == (200, {"ready": True})
        assert (await get("/v2/models/double/ready"))[0] == 200
        assert (await get("/v2/models/nope/ready"))[0] == 400
        found = await client.request("POST", "/v2/models/double/infer", AS_JSON, *HEADERS, JSON)
        answer = json.loads(found.body)
        assert (found.status, answer["model_name"], answer["id"]) == (200, "double", "7")
        assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2, 4, 6, 8]}]
        kind = (f"inference-header-content-length: {len(HEAD)}", "content-type: application/octet-stream")
        found = await client.request("POST", "/v2/models/double/infer", HEAD + NUMBERS, *HEADERS, *kind)
        length = int(found.headers["inference-header-content-length"])
        (output,) = json.loads(found.body[:length])["outputs"]
        assert (found.status, output["parameters"]) == (200, {"binary_data_size": 16})
        assert struct.unpack("<4f", found.body[length:]) == (2, 4, 6, 8)
        found = await client.request("POST", "/v2/models/nope/infer", AS_JSON, *HEADERS, JSON)
        assert (found.status, json.loads(found.body).keys()) == (404, {"error"})
