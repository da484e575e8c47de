"""Addresses that other machines can reach need an explicit option, and the options about TLS fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.process.sockets import is_local
from shoal.cli.tls import Auto, tls_options
from shoal.errors import InvalidArgument
from shoal.node import exposure
from shoal.node.options import checked
from shoal.node.tls.served import TlsOptions

REACHABLE = ("0.0.0.0:8443", "[::]:8443", "10.0.0.1:1", "[fe80::1]:1", "[::ffff:127.0.0.1]:1", "a.example:1", ":8443")
LOCAL = ("127.0.0.1:8080", "127.8.8.8:1", "[::1]:1", "localhost:1", "unix:/run/x.sock")


@pytest.mark.parametrize("address", REACHABLE)
def test_an_address_of_others_is_refused_and_the_error_names_the_ways(address: str) -> None:
    assert not is_local(address)

    def check(*, has_tls: bool = False, has_policy: bool = False, is_insecure: bool = False) -> None:
        protection = {"has_tls": has_tls, "has_policy": has_policy, "is_insecure": is_insecure}
        exposure.check("--listen", address, **protection, policy_option="--auth")

    with pytest.raises(InvalidArgument) as caught:
        check()
    said = caught.value.message
    assert said.startswith(f"--listen {address}: other machines can reach this address in plaintext")
    for way in ("--auth", "--tls-cert FILE --tls-key FILE", "--tls auto", "--insecure"):
        assert way in said
    with pytest.raises(
        InvalidArgument, match=r"callers are not authenticated: authenticate them with --auth; or add --ins"
    ):
        check(has_tls=True)
    with pytest.raises(InvalidArgument, match=r"in plaintext, and keys can be read on the way: add --tls-cert"):
        check(has_policy=True)
    check(has_tls=True, has_policy=True)
    for has_tls in (False, True):
        check(has_tls=has_tls, is_insecure=True)


@pytest.mark.parametrize("address", LOCAL)
def test_an_address_of_this_machine_needs_no_word(address: str) -> None:
    assert is_local(address)
    exposure.check("--listen", address, has_tls=False, has_policy=False, is_insecure=False)


def test_a_unix_socket_is_local_while_only_its_user_can_use_it() -> None:
    assert [is_local("unix:/x", mode) for mode in (0o600, 0o400, 0o660, 0o666, 0o601)] == [True, True, *[False] * 3]


def test_a_node_listens_where_it_is_told(tmp_path: Path) -> None:
    default = checked(data_dir=tmp_path)
    assert (default.gateway_host, default.gateway_port, default.tls) == ("127.0.0.1", 8080, None)
    opened = checked(data_dir=tmp_path, listen="[::]:8443", is_insecure=True, tls=TlsOptions())
    assert (opened.gateway_host, opened.gateway_port) == ("::", 8443)
    assert checked(data_dir=tmp_path, listen="localhost:0").gateway_host == "127.0.0.1"
    with pytest.raises(InvalidArgument, match=r"--listen 0\.0\.0\.0:8443: other machines"):
        checked(data_dir=tmp_path, listen="0.0.0.0:8443")
    with pytest.raises(InvalidArgument, match=r"--listen 0\.0\.0\.0:8443: other machines"):
        checked(data_dir=tmp_path, listen="0.0.0.0:8443", auth=True)
    assert checked(data_dir=tmp_path, listen="0.0.0.0:8443", auth=True, tls=TlsOptions()).auth
    with pytest.raises(InvalidArgument, match="--listen and --gateway-port are both given"):
        checked(data_dir=tmp_path, listen="127.0.0.1:1", gateway_port=2)


@pytest.mark.parametrize("text", ["0.0.0.0", "8443", "h:x", "127.0.0.1:65536", "no.such.host.invalid:1", "::1:80"])
def test_a_wrong_address_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidArgument, match="--listen '"):
        checked(data_dir=tmp_path, listen=text, is_insecure=True)


def test_options_of_tls_that_contradict_one_another_are_named(tmp_path: Path) -> None:
    cert, key = tmp_path / "a.pem", tmp_path / "a.key"
    assert tls_options(None, None, None, None) is None
    assert tls_options(Auto.auto, None, None, ["n"]) == TlsOptions(names=("n",))
    assert tls_options(None, cert, key, None) == TlsOptions(cert, key)
    assert tls_options(Auto.auto, None, None, ["*.a.b", "10.0.0.1", "::1"]) is not None
    for given, named in (
        ((None, cert, None, None), "--tls-cert needs --tls-key"),
        ((None, None, key, None), "--tls-key needs --tls-cert"),
        ((Auto.auto, cert, key, None), "--tls auto and --tls-cert"),
        ((None, cert, key, ["n"]), "--tls-name is for --tls auto"),
        ((Auto.auto, None, None, ["a b"]), "--tls-name 'a b': expected a DNS name or an IP address"),
        ((Auto.auto, None, None, ["münchen.de"]), "--tls-name 'münchen.de': .*ASCII form"),
    ):
        with pytest.raises(InvalidArgument, match=named):
            tls_options(*given)
