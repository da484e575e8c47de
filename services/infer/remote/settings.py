"""Settings of a remote model: the `parameters` of its config.pbtxt.

    url                     grpc://host:port, grpcs://host:port (TLS), unix:/path
    protocol                oip (the default), tensorflow-serving, torchserve
    remote_model            name on the remote server; the local name when unset
    remote_version          version on the remote server; the server's choice when unset
    signature_name          tensorflow-serving: serving_default when unset
    timeout_ms              timeout of a call; 60000 when unset
    max_message_bytes       largest request and response; 134217728 when unset
    metadata.<header>       a header of every call: see `credentials`
    ca_file, client_certificate_file, client_key_file, server_name      for TLS
    keepalive_time_ms       idle time after which a connection with calls in progress sends an HTTP/2 ping; 0: never;
                            when unset, 60000 or timeout_ms, whichever is larger
    keepalive_timeout_ms    time limit of the ping's reply; 20000 when unset

File names are relative to the model's folder, or absolute.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mesh.rpc.limits import MESSAGE_BYTES
from services.infer.error_text import listed, quoted
from services.infer.remote import address, credentials
from services.infer.remote.address import Address
from services.infer.remote.credentials import Headers, Tls
from services.infer.runtimes.parameters import number, texts
from services.infer.runtimes.runtime import About
from shoal.errors import FailedPrecondition

OIP, TENSORFLOW_SERVING, TORCHSERVE = PROTOCOLS = ("oip", "tensorflow-serving", "torchserve")

_TIMEOUT_MS = 60_000
_DAY_MS = 86_400_000
# gRPC's own lower limit.
_MIN_KEEPALIVE_MS = 10_000
# A server closes a connection after the third ping without data of its own in between (gRPC's default). An interval of
# the call's timeout or more allows at most two.
_KEEPALIVE_MS = 60_000
_KEEPALIVE_TIMEOUT_MS = 20_000
_MAX_BYTES = 999_999_999

_METADATA = "metadata."
_TLS = ("ca_file", "client_certificate_file", "client_key_file", "server_name")
_KEYS = (
    "url",
    "protocol",
    "remote_model",
    "remote_version",
    "signature_name",
    "timeout_ms",
    "max_message_bytes",
    "keepalive_time_ms",
    "keepalive_timeout_ms",
    *_TLS,
)


@dataclass(frozen=True)
class RemoteSettings:
    """Address and connection settings of a model's server, and the model's name there."""

    address: Address
    headers: Headers
    protocol: str = OIP
    model: str = ""
    version: str = ""
    """Empty: the server's choice."""
    signature_name: str = ""
    timeout_s: float = _TIMEOUT_MS / 1000
    max_message_bytes: int = MESSAGE_BYTES
    keepalive_time_ms: int = _KEEPALIVE_MS
    """0: no keepalive pings."""
    keepalive_timeout_ms: int = _KEEPALIVE_TIMEOUT_MS
    tls: Tls | None = None
    server_name: str = ""
    """Expected host name of the server's certificate; empty: the host of the address."""


def read(about: About, environ: Mapping[str, str]) -> RemoteSettings:
    """Return the settings of a model. Raises FailedPrecondition with the parameter and the expected value."""
    values = {key: text.strip() for key, text in texts(about.config).items()}
    _check_keys(values, about)
    server, folder = address.read(values.get("url", "")), about.folder or Path()
    protocol = values.get("protocol") or OIP
    if protocol not in PROTOCOLS:
        raise FailedPrecondition(f"parameter protocol {quoted(protocol)}: expected one of {listed(PROTOCOLS)}")
    timeout_ms = number(values, "timeout_ms", _TIMEOUT_MS, 1, _DAY_MS)
    keepalive_ms = number(values, "keepalive_time_ms", max(_KEEPALIVE_MS, timeout_ms), 0, _DAY_MS)
    if 0 < keepalive_ms < _MIN_KEEPALIVE_MS:
        raise FailedPrecondition(
            f"parameter keepalive_time_ms '{keepalive_ms}': expected 0 (never), or {_MIN_KEEPALIVE_MS} to {_DAY_MS}"
        )
    return RemoteSettings(
        server,
        _headers(values, folder, environ),
        protocol,
        values.get("remote_model") or about.name,
        _version(values, protocol),
        _signature_name(values, protocol),
        timeout_ms / 1000,
        number(values, "max_message_bytes", MESSAGE_BYTES, 1024, _MAX_BYTES),
        keepalive_ms,
        number(values, "keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS, 1, _DAY_MS),
        _tls(values, folder) if server.is_secure else None,
        values.get("server_name", ""),
    )


def _check_keys(values: Mapping[str, str], about: About) -> None:
    if about.config.default_model_filename:
        raise FailedPrecondition("default_model_filename does not go with backend 'remote': its file is elsewhere")
    for key in values:
        # Parameters of the scheduler, and free ones of the model's owner, are accepted unless they resemble a key here.
        if key in _KEYS or key.startswith(_METADATA):
            continue
        if similar := difflib.get_close_matches(key, _KEYS, 1, 0.8):
            raise FailedPrecondition(f"parameter {key[:128]} is unknown: is {similar[0]} meant?")
    if not values.get("url", "").startswith("grpcs:"):
        for key in _TLS:
            if values.get(key):
                raise FailedPrecondition(f"parameter {key} needs a url that begins with grpcs://")


def _headers(values: Mapping[str, str], folder: Path, environ: Mapping[str, str]) -> Headers:
    written = {key.removeprefix(_METADATA): text for key, text in values.items() if key.startswith(_METADATA)}
    for name in written:
        credentials.check_name(name)
    return Headers(dict(sorted(written.items())), folder, environ)


def _version(values: Mapping[str, str], protocol: str) -> str:
    version = values.get("remote_version", "")
    is_number = version.isascii() and version.isdecimal() and len(version) <= 18 and int(version) > 0
    if version and protocol == TENSORFLOW_SERVING and not is_number:
        raise FailedPrecondition(f"parameter remote_version {quoted(version)}: expected a number, 1 or more")
    return version


def _signature_name(values: Mapping[str, str], protocol: str) -> str:
    if values.get("signature_name") and protocol != TENSORFLOW_SERVING:
        raise FailedPrecondition(f"parameter signature_name needs protocol '{TENSORFLOW_SERVING}'")
    return values.get("signature_name") or "serving_default"


def _tls(values: Mapping[str, str], folder: Path) -> Tls:
    ca, certificate, key = (folder / values[name] if values.get(name) else None for name in _TLS[:3])
    if (certificate is None) != (key is None):
        raise FailedPrecondition("parameters client_certificate_file and client_key_file go together")
    return Tls(ca, certificate, key)
