"""`shoal keys`: a signer of one's own, and the keys that it signs."""

from __future__ import annotations

import json as json_format
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)

_Signer = Annotated[Path, typer.Option(help="File of the signer: a secret.", metavar="FILE", show_default=True)]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.callback()
def keys() -> None:
    """Make keys for callers of a server with a policy (docs/policy.md). A key says who its holder is."""


@app.command()
def init(
    signer: _Signer = Path("signer.json"),
    jwks: Annotated[Path, typer.Option(help="File for the public key, which a policy names.", metavar="FILE")] = Path(
        "keys.jwks.json"
    ),
    issuer: Annotated[str, typer.Option(help="Name of the signer in its keys and in the policy.")] = "shoal",
) -> None:
    """Make a signer: a private key in a new file that only you can read, and its public key for the policy."""
    from shoal.access import tokens
    from shoal.errors import AlreadyExists, InvalidArgument

    if jwks.exists():
        raise AlreadyExists(f"{jwks} exists already: give another file with --jwks")
    made = tokens.create_signer(signer, issuer)
    try:
        jwks.write_text(json_format.dumps(made.jwks(), indent=2) + "\n")
    except OSError as err:
        signer.unlink()
        raise InvalidArgument(f"cannot write {jwks}: {err.strerror}") from err
    typer.echo(f"{signer}: the signer, a secret (mode 0600)\n{jwks}: its public key, for jwks_file in a policy")


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Tenant of the key.")],
    role: Annotated[str, typer.Option(help="viewer, user, publisher, operator, admin, or a role of the policy.")],
    signer: _Signer = Path("signer.json"),
    subject: Annotated[str, typer.Option(help="The holder's name. [dim]default: the key's id[/dim]")] = "",
    models: Annotated[
        list[str] | None,
        typer.Option(help="Models that the key is for; * stands for any characters. May be repeated. default: all"),
    ] = None,
    grant: Annotated[
        list[str] | None, typer.Option(help="A grant with `by_name` that the key may use. May be repeated.")
    ] = None,
    expires: Annotated[str, typer.Option(help="Life of the key: 90d, 12h, 30m or 60s.", metavar="TIME")] = "90d",
    json: Annotated[bool, typer.Option("--json", help="Print id, key and expiry as JSON.")] = False,
) -> None:
    """Make a key and print it, once: it is stored nowhere. Its id, to revoke it, is printed to standard error.

    [bold]Example[/bold]

      shoal keys create --tenant acme --role user --models 'ocr*' --expires 90d
    """
    from shoal.access import tokens

    made = tokens.create_key(
        tokens.read_signer(signer),
        tenant=tenant,
        role=role,
        subject=subject,
        models=models or ["*"],
        grants=grant or [],
        life_s=_seconds(expires),
        now=time.time(),
    )
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(made.expires_at))
    if json:
        typer.echo(json_format.dumps({"id": made.id, "key": made.text, "expires": until}))
        return
    typer.echo(made.text)
    typer.echo(f"id {made.id}, expires {until}; to revoke it, add the id to `revoked` in the policy", err=True)


def _seconds(text: str) -> int:
    from shoal.errors import InvalidArgument

    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and unit in _UNITS):
        raise InvalidArgument(f"--expires {text!r}: expected a whole number and d, h, m or s, such as 90d")
    return int(number) * _UNITS[unit]
