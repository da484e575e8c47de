"""`shoal keys`: keys of a node's cluster; or a signer of one's own for `shoal serve`, and the keys that it signs."""

from __future__ import annotations

import json as json_format
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.output import AsJson, Gateway, connect, show, show_json
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from shoal.client import Client

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)

_Signer = Annotated[Path, typer.Option(help="File of the signer: a secret.", metavar="FILE", show_default=True)]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.callback()
def keys() -> None:
    """Make, list and revoke the keys of callers (docs/policy.md). A key says who its holder is."""


@app.command()
def init(
    signer: _Signer = Path("signer.json"),
    jwks: Annotated[Path, typer.Option(help="File for the public key, which a policy names.", metavar="FILE")] = Path(
        "keys.jwks.json"
    ),
    issuer: Annotated[str, typer.Option(help="Name of the signer in its keys and in the policy.")] = "shoal",
) -> None:
    """Make a signer for `shoal serve`: a private key in a new file that only you can read, and its public key.

    [bold]Example[/bold]

      shoal keys init --signer signer.json --jwks keys.jwks.json
    """
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
    signer: Annotated[
        Path | None,
        typer.Option(
            help="Sign with this file of `shoal keys init`, for `shoal serve`, instead of at a node.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    subject: Annotated[str, typer.Option(help="The holder's name. [dim]default: the key's id[/dim]")] = "",
    models: Annotated[
        list[str] | None,
        typer.Option(help="Models that the key is for; * stands for any characters. May be repeated. default: all"),
    ] = None,
    grant: Annotated[
        list[str] | None, typer.Option(help="A grant with `by_name` that the key may use. May be repeated.")
    ] = None,
    expires: Annotated[str, typer.Option(help="Life of the key: 90d, 12h, 30m or 60s.", metavar="TIME")] = "90d",
    gateway: Gateway = None,
    json: Annotated[bool, typer.Option("--json", help="Print id, key and expiry as JSON.")] = False,
) -> None:
    """Make a key and print it, once: it is stored nowhere. Its id, to revoke it, is printed to standard error.

    [bold]Example[/bold]

      shoal keys create --tenant acme --role user --models 'ocr*' --expires 90d
    """
    life_s = _seconds(expires)
    if signer is None:
        with connect(gateway) as client:
            unknown = _unknown_names(client, role, grant or ())
            new = client.access.create_key(
                tenant=tenant, role=role, subject=subject, models=models or (), grants=grant or (), life_s=life_s
            )
        assert new.info.expires_at is not None
        id, text, expires_at = new.info.id, new.key, new.info.expires_at.timestamp()
        how = f"`shoal keys revoke {id}` revokes it"
    else:
        from shoal.access import tokens

        unknown = []
        made = tokens.create_key(
            tokens.read_signer(signer),
            tenant=tenant,
            role=role,
            subject=subject,
            models=models or ["*"],
            grants=grant or [],
            life_s=life_s,
            now=time.time(),
        )
        id, text, expires_at = made.id, made.text, made.expires_at
        how = "to revoke it, add the id to `revoked` in the policy"
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(expires_at))
    for name in unknown:
        typer.echo(f"warning: the policy has no {name}: the key has no rights by it until the policy has", err=True)
    if json:
        typer.echo(json_format.dumps({"id": id, "key": text, "expires": until}))
        return
    typer.echo(text)
    typer.echo(f"id {id}, expires {until}; {how}", err=True)


def _unknown_names(client: Client, role: str, grants: Sequence[str]) -> list[str]:
    """Return the role and the grants that the policy in force does not have; none when it cannot be read."""
    from shoal.access.policy import BUILTIN_ROLES, Policy

    try:
        policy = Policy.model_validate_json(client.access.policy().in_force)
    except (ShoalError, ValueError):
        return []
    by_name = {grant.name for grant in policy.grants if grant.by_name}
    unknown = [] if role in {*BUILTIN_ROLES, *policy.roles} else [f"role {role!r}"]
    return unknown + [f"grant {name!r} with by_name" for name in grants if name not in by_name]


@app.command(name="list")
def list_keys(gateway: Gateway = None, json: AsJson = False) -> None:
    """List the keys that the cluster has signed and that have not expired, the latest first.

    [bold]Example[/bold]

      shoal keys list
    """
    with connect(gateway) as client:
        found = client.access.keys()
    if json:
        show_json(found)
        return
    rows = [
        (one.id, one.tenant, one.role, one.subject, one.models, one.expires_at, "revoked" if one.revoked else "")
        for one in found
    ]
    show(("id", "tenant", "role", "subject", "models", "expires", ""), rows)


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="Id of the key, as `shoal keys list` shows it.")],
    gateway: Gateway = None,
) -> None:
    """Revoke a key. When the command returns, every instance refuses the key, and its streams have ended.

    [bold]Example[/bold]

      shoal keys revoke k-0123456789abcdef
    """
    with connect(gateway) as client:
        # Before, because the caller may revoke its own key. What fails here must not keep anybody from revoking.
        known = None
        with suppress(ShoalError):
            known = client.access.keys()
        client.access.revoke_key(id)
    typer.echo(f"{id} is revoked everywhere")
    if known is None:
        return
    role_of = {key.id: key.role for key in known}
    if id not in role_of:
        typer.echo(
            f"warning: the cluster has signed no key {id} that has not expired: a token of another issuer with this id "
            "is refused; otherwise see `shoal keys list`",
            err=True,
        )
    elif role_of[id] == "admin" and not any(key.role == "admin" and not key.revoked for key in known if key.id != id):
        typer.echo(
            "warning: no key with the role admin is left: restart the node, which makes one for its user", err=True
        )


@app.command()
def rotate(
    stolen: Annotated[
        bool,
        typer.Option("--stolen", help="The signer was stolen: all keys that it has signed end now, yours, too."),
    ] = False,
    gateway: Gateway = None,
) -> None:
    """Replace the cluster's signer. Keys of the former one stay valid until they expire.

    With --stolen, a new key for you is printed; the key that `shoal up` made for you is replaced in its file.

    [bold]Examples[/bold]

      shoal keys rotate

      shoal keys rotate --stolen      # all keys end now
    """
    import os

    from shoal.cli.contexts import chosen
    from shoal.discovery import find_gateway, replace_key

    with connect(gateway) as client:
        made = client.access.rotate_signer(stolen=stolen, renew_own_key=stolen)
    typer.echo(f"{made.id} signs new keys", err=True)
    if made.unconfirmed:
        typer.echo(f"not confirmed yet by {', '.join(made.unconfirmed)}", err=True)
    # A token of another issuer stays valid.
    if not made.key:
        return
    is_own = chosen(gateway, os.environ) is None and not os.environ.get("SHOAL_TOKEN")
    file = replace_key(find_gateway(gateway, os.environ), made.key, os.environ) if is_own else None
    if file is not None:
        typer.echo(f"your new key is in {file}", err=True)
    else:
        typer.echo(made.key)
        typer.echo(
            "this is your new key, in place of the one that you called with; a node makes one for its user when it is "
            "restarted",
            err=True,
        )


def _seconds(text: str) -> int:
    from shoal.errors import InvalidArgument

    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and unit in _UNITS and int(number)):
        raise InvalidArgument(f"--expires {text!r}: expected a whole number and d, h, m or s, such as 90d")
    return int(number) * _UNITS[unit]
