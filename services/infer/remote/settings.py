"""What a remote model's configuration says about its server: the `parameters` of config.pbtxt.

    url                     grpc://host:port, grpcs://host:port (TLS), unix:/path
    protocol                oip (the default), tensorflow-serving, torchserve
    remote_model            its name there; the same as here when unset
    remote_version          its version there; the server's choice when unset
    signature_name          tensorflow-serving: serving_default when unset
    timeout_ms              the longest that a call may take; 60000 when unset
    max_message_bytes       the largest request and answer; 134217728 when unset
    metadata.<header>       a header of every call: see `credentials`
    ca_file, client_certificate_file, client_key_file, server_name      of TLS
    keepalive_time_ms       a connection on which nothing comes for so long, while calls are under way, is asked for a
                            sign of life; 0: never; when unset, 60000 or timeout_ms, whichever is more
    keepalive_timeout_ms    how long that sign may take; 20000 when unset

Files are named from the model's folder, or absolutely.
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
_LEAST_KEEPALIVE_MS = 10_000
# gRPC's own bound.
_KEEPALIVE_MS = 60_000
# Servers end a connection after a third such question without an answer of theirs in between (gRPC's default): with
# one within the time of a call, and one behind, there is no third.
_KEEPALIVE_TIMEOUT_MS = 20_000
_MOST_BYTES = 999_999_999

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
    """How a model's server is reached, and what it is called there."""

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
    """0: no sign of life is asked for."""
    keepalive_timeout_ms: int = _KEEPALIVE_TIMEOUT_MS
    tls: Tls | None = None
    server_name: str = ""
    """What the server's certificate must be for; empty: the host of the address."""


def read(about: About, environ: Mapping[str, str]) -> RemoteSettings:
    """Raises FailedPrecondition that names the parameter, and says what was expected."""
    values = {key: text.strip() for key, text in texts(about.config).items()}
    _check_keys(values, about)
    where, folder = address.read(values.get("url", "")), about.folder or Path()
    protocol = values.get("protocol") or OIP
    if protocol not in PROTOCOLS:
        raise FailedPrecondition(f"parameter protocol {quoted(protocol)}: expected one of {listed(PROTOCOLS)}")
    timeout_ms = number(values, "timeout_ms", _TIMEOUT_MS, 1, _DAY_MS)
    keepalive_ms = number(values, "keepalive_time_ms", max(_KEEPALIVE_MS, timeout_ms), 0, _DAY_MS)
    if 0 < keepalive_ms < _LEAST_KEEPALIVE_MS:
        raise FailedPrecondition(
            f"parameter keepalive_time_ms '{keepalive_ms}': expected 0 (never), or {_LEAST_KEEPALIVE_MS} to {_DAY_MS}"
        )
    return RemoteSettings(
        where,
        _headers(values, folder, environ),
        protocol,
        values.get("remote_model") or about.name,
        _version(values, protocol),
        _signature_name(values, protocol),
        timeout_ms / 1000,
        number(values, "max_message_bytes", MESSAGE_BYTES, 1024, _MOST_BYTES),
        keepalive_ms,
        number(values, "keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS, 1, _DAY_MS),
        _tls(values, folder) if where.is_secure else None,
        values.get("server_name", ""),
    )


def _check_keys(values: Mapping[str, str], about: About) -> None:
    if about.config.default_model_filename:
        raise FailedPrecondition("default_model_filename does not go with backend 'remote': its file is elsewhere")
    for key in values:
        # Other parameters are the model's owner's, or the scheduler's.
        if key in _KEYS or key.startswith(_METADATA):
            continue
        if meant := difflib.get_close_matches(key, _KEYS, 1, 0.8):
            raise FailedPrecondition(f"parameter {key[:128]} is unknown: is {meant[0]} meant?")
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
