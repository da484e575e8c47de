"""Paths of REST: each belongs to one RPC and one group, and patterns match what servers read."""

from __future__ import annotations

import re

import pytest

from mesh.rest import target
from mesh.rest.target import MethodNotAllowed
from services.infer.rest.operations import Operations
from shoal.access.rest_paths import REST_PATHS, RestPath, model_path, patterns_of
from shoal.access.rpc_groups import GROUP_OF, INTERNAL
from shoal.errors import NotFound

NAMES = {"{model}": "m%2Fn", "{version}": "3", "{region}": "r"}


def written(template: str) -> str:
    for name, value in NAMES.items():
        template = template.replace(name, value)
    return template


@pytest.mark.parametrize("path", REST_PATHS, ids=lambda path: f"{path.method} {path.template}")
def test_each_path_belongs_to_the_group_of_one_rpc_and_is_read_as_it_is_matched(path: RestPath) -> None:
    assert GROUP_OF[path.rpc] != INTERNAL
    found = target.read(path.method, written(path.template) + "?x=y")
    assert (found.operation, found.rpc) == (path.operation, path.rpc)
    assert found.model == ("m/n" if "{model}" in path.template else "")
    assert found.version == ("3" if "{version}" in path.template else "")
    matching = {other.rpc for other in REST_PATHS if re.fullmatch(other.pattern, written(path.template) + "?x=y")}
    # `stats` could be the name of a model: both RPCs only read.
    assert {GROUP_OF[rpc] for rpc in matching} == {GROUP_OF[path.rpc]}


def test_each_operation_is_served() -> None:
    served = Operations(None, None).by_name  # type: ignore[arg-type] # Nothing is called.
    assert served.keys() == {path.operation for path in REST_PATHS}


@pytest.mark.parametrize("path", ["/", "/v2/", "/v2/models", "/v2/models/", "/v2/models/m/infer/x", "/v3", "v2", ""])
def test_no_other_path_is_read_or_matched(path: str) -> None:
    with pytest.raises(NotFound):
        target.read("GET", path)
    assert not [pattern for pattern in patterns_of(GROUP_OF) if re.fullmatch(pattern, path)]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/models/m/in%66er"),
        ("POST", "/%762/models/m/infer"),
        ("POST", "/v2/m%6Fdels/m/infer"),
        ("POST", "/v2/models/m/%76ersions/1/infer"),
        ("GET", "/v2/health/liv%65"),
        ("GET", "/shoal/v1/jobs/a%3Awatch"),
        ("GET", "/shoal/v1/jobs/a:w%61tch"),
    ],
)
def test_only_names_are_decoded_since_gateways_match_the_rest_as_it_is(method: str, path: str) -> None:
    with pytest.raises(NotFound, match="no call"):
        target.read(method, path)
    assert not [pattern for pattern in patterns_of(GROUP_OF) if re.fullmatch(pattern, path)]


def test_an_encoded_name_is_a_name_also_where_it_spells_another_path() -> None:
    assert target.read("GET", "/v2/models/st%61ts").model == "stats"
    assert target.read("GET", "/v2/models/stats").model == ""


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v2/nope?x=y", "no call GET /v2/nope"),
        ("/v2/models/m/versions/abc", "no call GET /v2/models/m/versions/abc: the version of a model is a number"),
        ("/v2/models/m%2F..%2Fx", "no call GET /v2/models/m%2F..%2Fx: no part of a path is empty, '.' or '..'"),
        ("/v2/models/" + "m" * 8_192, "no call has a path of 8203 characters: at most 8192"),
        ("/v2/" + "m" * 500, "no call GET /v2/" + "m" * 196),
    ],
)
def test_the_error_says_what_is_wrong_with_a_path(path: str, said: str) -> None:
    with pytest.raises(NotFound) as caught:
        target.read("GET", path)
    assert caught.value.message == said


def test_head_is_get_except_of_streams() -> None:
    assert target.read("HEAD", "/v2/models/m?x=y") == target.read("GET", "/v2/models/m")
    with pytest.raises(MethodNotAllowed, match=r"^no call HEAD /v2/models/m/infer: send it with POST$"):
        target.read("HEAD", "/v2/models/m/infer")
    with pytest.raises(MethodNotAllowed, match=r"^no call HEAD /shoal/v1/results:stream: send it with GET$"):
        target.read("HEAD", "/shoal/v1/results:stream")


def test_another_method_is_not_allowed_and_the_error_names_the_right_one() -> None:
    with pytest.raises(MethodNotAllowed, match=r"^no call DELETE /v2/models/m: send it with GET or HEAD$"):
        target.read("DELETE", "/v2/models/m")
    # HTTP/2 bounds a method by the size of all headers only.
    with pytest.raises(MethodNotAllowed, match=r"^no call M{20} /v2/models/m: send it with GET or HEAD$"):
        target.read("M" * 10_000, "/v2/models/m")


def test_the_path_of_a_model_is_as_clients_encode_its_name() -> None:
    assert model_path("a.b-c_d") == "/v2/models/a.b-c_d"
    assert model_path("a/b c") == "/v2/models/a%2Fb%20c"
