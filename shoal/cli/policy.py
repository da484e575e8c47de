"""`shoal policy`: checks a policy file, and explains its decisions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)

_File = Annotated[Path, typer.Argument(metavar="FILE", help="The policy.")]


@app.callback()
def policy() -> None:
    """Check a policy file, explain its decisions, print its JSON schema (docs/policy.md)."""


@app.command()
def check(file: _File) -> None:
    """Validate a policy and the files of keys that it names. Each error names its line."""
    from shoal.access import policy as policies

    found = policies.load(file)
    typer.echo(
        f"{file}: valid: {len(found.issuers)} issuers, {len(found.grants)} grants, {len(found.revoked)} revoked keys"
    )
    if not found.grants:
        typer.echo("no grant: every call is refused", err=True)


@app.command()
def explain(
    file: _File,
    call: Annotated[str, typer.Option(help="The RPC, such as ModelInfer or /package.Service/Method.")],
    token: Annotated[
        str, typer.Option(help="A token or key; - reads one from standard input.", envvar="SHOAL_TOKEN")
    ] = "",
    key: Annotated[
        str, typer.Option(help="A key; - reads one from standard input. The same as --token.", show_default=False)
    ] = "",
    model: Annotated[str | None, typer.Option(help="The model that the call names.")] = None,
) -> None:
    """Say whether a policy allows a call, and which rule decides. Exits with 1 when it is refused.

    [bold]Example[/bold]

      shoal policy explain policy.yaml --key - --call ModelInfer --model ocr-en < key.txt
    """
    from shoal.access import policy as policies
    from shoal.access import rpc_groups, tokens
    from shoal.access.decision import caller_of, decide
    from shoal.errors import InvalidArgument, Unauthenticated

    found = policies.load(file)
    rpc = rpc_groups.rpc_named(call)
    if rpc is None:
        raise InvalidArgument(f"--call {call!r}: there is no such RPC: give a name such as ModelInfer, or a path")
    text = key or token
    if text == "-":
        text = typer.get_text_stream("stdin").read()
    caller, why = None, "no token"
    try:
        if text:
            caller = caller_of(found, tokens.verified_claims(found, text, time.time()))
            who = (
                f"{caller.subject or '-'} of tenant {caller.tenant}, role {caller.role or '-'}, key {caller.key or '-'}"
            )
            why = f"{who}, models {' '.join(caller.models)}"
    except Unauthenticated as err:
        why = f"not verified: {err.message}"
    decision = decide(found, caller, rpc, model)
    typer.echo(f"caller: {why}")
    typer.echo(f"call:   {rpc} ({rpc_groups.GROUP_OF[rpc]})" + (f", model {model}" if model is not None else ""))
    typer.echo(f"{'allowed' if decision.allowed else 'refused'}: {decision.rule}")
    if not decision.allowed:
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of a policy, for editors and other checkers."""
    from shoal.access import policy as policies

    typer.echo(json.dumps(policies.json_schema(), indent=2))
