"""Options of `shoal up` and `shoal serve` about the transport of their address for clients."""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.errors import InvalidArgument

if TYPE_CHECKING:
    from shoal.node.tls.served import TlsOptions


class Auto(StrEnum):
    """Origin of a certificate, where not the user's files."""

    auto = "auto"


TlsAuto = Annotated[
    Auto | None,
    typer.Option(
        "--tls",
        help="auto: speak TLS with a certificate of Shoal's own CA, which is made at the first use; "
        "`shoal ca show` prints the CA's certificate for clients.",
        show_default=False,
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        help="Speak TLS with this certificate (PEM, with its chain). A renewed file is taken over.", metavar="FILE"
    ),
]
TlsKey = Annotated[
    Path | None, typer.Option(help="Key of --tls-cert (PEM), readable by its owner only.", metavar="FILE")
]
TlsName = Annotated[
    list[str] | None,
    typer.Option(
        help="With --tls auto: a name or address for the certificate, beside the machine's. May be repeated.",
        metavar="NAME",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Allow an address that other machines can reach. Without `shoal up --auth` or `shoal serve --policy`, "
        "everyone who reaches the address may call every method. Without TLS, everyone on the way can read and change "
        "the calls.",
    ),
]


_DNS_NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?")


def _is_name(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _DNS_NAME.fullmatch(text) is not None
    return True


def tls_options(auto: Auto | None, cert: Path | None, key: Path | None, names: list[str] | None) -> TlsOptions | None:
    """Return the requested certificate; None for plaintext.

    Raises:
        InvalidArgument: the options contradict one another.
    """
    if names and auto is None:
        raise InvalidArgument("--tls-name is for --tls auto: a certificate of --tls-cert has its names already")
    for name in names or ():
        if not _is_name(name):
            raise InvalidArgument(
                f"--tls-name {name!r}: expected a DNS name or an IP address; international names in ASCII form (xn--)"
            )
    if auto is not None and (cert is not None or key is not None):
        raise InvalidArgument("--tls auto and --tls-cert, --tls-key are both given: choose one")
    if (cert is None) != (key is None):
        given, missing = ("--tls-cert", "--tls-key") if key is None else ("--tls-key", "--tls-cert")
        raise InvalidArgument(f"{given} needs {missing}: give both files of the pair")
    if auto is None and cert is None:
        return None
    from shoal.node.tls.served import TlsOptions

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    return TlsOptions(absolute(cert), absolute(key), tuple(names or ()))
