"""`shoal policy`: checks a policy and explains its decisions; applies one to a node, and shows what was applied."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.output import AsJson, Gateway, connect, show, show_json

if TYPE_CHECKING:
    from shoal.access.policy import Policy
    from shoal.client.access import KeyInfo

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", add_completion=False)

_LARGEST = (1 << 32) - 1
_VERSIONS: Any = {"min": 0, "max": _LARGEST}
_File = Annotated[Path, typer.Argument(metavar="FILE", help="The policy.")]


@app.callback()
def policy() -> None:
    """Check, explain and apply policies: who may call what (docs/policy.md)."""


@app.command()
def check(file: _File) -> None:
    """Validate a policy and the files of keys that it names. Each error names its line.

    [bold]Example[/bold]

      shoal policy check policy.yaml
    """
    from shoal.access import limits
    from shoal.access import policy as policies

    found = policies.load(file, is_cluster=True)
    limits.check(found.limits)
    limited = f"{len(found.limits)} limits, " if found.limits else ""
    aimed = f"{len(found.objectives)} objectives, " if found.objectives else ""
    typer.echo(
        f"{file}: valid: {len(found.issuers)} issuers, {len(found.grants)} grants, {limited}{aimed}"
        f"{len(found.revoked)} revoked keys"
    )
    if not found.grants:
        typer.echo("no grant: every call is refused", err=True)


@app.command()
def explain(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="The policy.", show_default="the one in force at the node"),
    ] = None,
    *,
    call: Annotated[str, typer.Option(help="The RPC, such as ModelInfer or /package.Service/Method.")],
    token: Annotated[
        str, typer.Option(help="A token or key; - reads one from standard input.", envvar="SHOAL_TOKEN")
    ] = "",
    key: Annotated[
        str,
        typer.Option(
            help="A key, or at a node its id; - reads a key from standard input.",
            metavar="KEY|ID",
            show_default=False,
        ),
    ] = "",
    model: Annotated[str | None, typer.Option(help="The model that the call names.")] = None,
    gateway: Gateway = None,
) -> None:
    """Say whether a policy allows a call, which rule decides, and which limits hold. Exits with 1 when it is refused.

    With --model, the objectives of the model are shown, too. FILE may be a policy that is not applied yet: the keys of
    the cluster are read from the node.

    [bold]Examples[/bold]

      shoal policy explain --key k-0123456789abcdef --call ModelInfer --model ocr-en

      shoal policy explain policy.yaml --key - --call ModelInfer --model ocr-en < key.txt
    """
    from shoal.access import limits, objectives, rpc_groups
    from shoal.access.decision import caller_of, decide
    from shoal.errors import InvalidArgument, Unauthenticated

    rpc = rpc_groups.rpc_named(call)
    if rpc is None:
        raise InvalidArgument(f"--call {call!r}: there is no such RPC: give a name such as ModelInfer, or a path")
    text = key or token
    if text == "-":
        text = typer.get_text_stream("stdin").read()
    found, claims, why = _verified(file, text.strip(), gateway, is_id=bool(key) and "." not in text)
    caller = None
    if claims is not None:
        try:
            caller = caller_of(found, claims)
            who = (
                f"{caller.subject or '-'} of tenant {caller.tenant}, role {caller.role or '-'}, key {caller.key or '-'}"
            )
            why = f"{who}, models {' '.join(caller.models)}"
        except Unauthenticated as err:
            why = f"not verified: {err.message}"
    decision = decide(found, caller, rpc, model)
    typer.echo(f"caller: {why}")
    typer.echo(f"call:   {rpc} ({rpc_groups.GROUP_OF[rpc]})" + (f", model {model}" if model is not None else ""))
    for limit in limits.applicable(found, caller):
        if model is None or limits.counts_model(limit, model):
            typer.echo(f"limit:  {limits.described(limit)}")
    if model is not None:
        typer.echo(f"objectives: {objectives.described(objectives.objective_of(found.objectives, model))}")
    typer.echo(f"{'allowed' if decision.allowed else 'refused'}: {decision.rule}")
    if not decision.allowed:
        raise typer.Exit(1)


def _verified(
    file: Path | None, text: str, gateway: str | None, *, is_id: bool
) -> tuple[Policy, Mapping[str, Any] | None, str]:
    """Return the policy FILE, else the one in force; and the claims of a token or of a key's id, or why there are none.

    A document lacks the keys of the cluster, and those of issuers from which the node fetches them: the node has them.

    Raises:
        PermissionDenied: the node is asked, and the caller does not administer.
        NotFound: the cluster has no key with the id.
    """
    from shoal.access import cluster, tokens
    from shoal.access import policy as policies
    from shoal.errors import PermissionDenied, Unauthenticated

    now = time.time()
    document = None if file is None else policies.load(file, is_cluster=True)
    if document is not None:
        is_elsewhere = any(issuer.cluster or issuer.is_fetched for issuer in document.issuers)
        if not text:
            return document, None, "no token"
        if not (is_id and is_elsewhere):
            try:
                return document, tokens.verified_claims(document, text, now), ""
            except Unauthenticated as err:
                if not is_elsewhere:
                    return document, None, f"not verified: {err.message}"
    with connect(gateway) as client:
        try:
            found = policies.Policy.model_validate_json(client.access.policy().in_force)
            keys = client.access.keys() if is_id else []
        except PermissionDenied as err:
            raise PermissionDenied(
                "the policy in force and the keys of the cluster are shown to callers with the group administer (the "
                "role admin): ask one"
            ) from err
    if document is not None:
        found = cluster.with_known_keys(document, found)
    if not text:
        return found, None, "no token"
    try:
        return found, _claims_of(text, keys) if is_id else tokens.verified_claims(found, text, now), ""
    except Unauthenticated as err:
        return found, None, f"not verified: {err.message}"


def _claims_of(id: str, keys: Iterable[KeyInfo]) -> Mapping[str, Any]:
    """Return the claims of the key with an id. Raises NotFound."""
    from shoal.access import cluster, tokens
    from shoal.errors import NotFound

    for key in keys:
        if key.id == id:
            return {
                "iss": cluster.issuer_name(tokens.ISSUER, key.signer),
                "jti": key.id,
                "sub": key.subject,
                "tenant": key.tenant,
                "role": key.role,
                "models": [*key.models],
                "grants": [*key.grants],
            }
    raise NotFound(f"--key {id}: the cluster has no such key, or it has expired: `shoal keys list` shows them")


_Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Apply it although you, or everyone, may not administer afterwards. The history says who did."
    ),
]


@app.command()
def apply(
    file: _File,
    expect: Annotated[
        int,
        typer.Option(
            help="Apply only while this version is in force.", metavar="VERSION", show_default=False, **_VERSIONS
        ),
    ] = 0,
    force: _Force = False,
    gateway: Gateway = None,
) -> None:
    """Replace the policy of a node's cluster. It is in force at once, on open connections, too.

    Of open streams, only those end whose caller may no longer call.

    [bold]Examples[/bold]

      shoal policy apply policy.yaml

      shoal policy apply policy.yaml --expect 6     # only while nobody else has applied another one
    """
    from shoal.access import policy as policies

    document, files = policies.read_files(file)
    with connect(gateway) as client:
        applied = client.access.apply(document, files, expected_version=expect, force=force)
    _say(applied.version, applied.unconfirmed)


@app.command(name="show")
def show_policy(
    version: Annotated[
        int, typer.Argument(help="An earlier version.", show_default="the one in force", **_VERSIONS)
    ] = 0,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Print the policy of a node's cluster, as it was applied.

    [bold]Examples[/bold]

      shoal policy show > policy.yaml

      shoal policy show 6
    """
    with connect(gateway) as client:
        found = client.access.policy(version)
    if json:
        show_json(found)
        return
    typer.echo(found.document, nl=not found.document.endswith("\n"))
    how = ", by force" if found.policy.forced else ""
    typer.echo(f"version {found.policy.version}, applied by {found.policy.applied_by}{how}", err=True)


@app.command()
def history(gateway: Gateway = None, json: AsJson = False) -> None:
    """List the policies that were applied, the latest first.

    [bold]Example[/bold]

      shoal policy history
    """
    with connect(gateway) as client:
        found = client.access.history()
    if json:
        show_json(found)
        return
    rows = [
        (one.version, one.applied_at, one.applied_by, "yes" if one.forced else "", one.rolled_back_to or "")
        for one in found
    ]
    show(("version", "applied", "by", "forced", "same as"), rows)


@app.command()
def rollback(
    version: Annotated[int, typer.Argument(help="The version to apply again.", min=1, max=_LARGEST)],
    force: _Force = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Data folder of a node of yours: its user needs no key, and is locked out by no policy.",
            show_default=False,
        ),
    ] = None,
    gateway: Gateway = None,
) -> None:
    """Apply an earlier version again, as a new version.

    [bold]Example[/bold]

      shoal policy rollback 6 --data-dir ~/.local/share/shoal     # nobody may administer under version 7
    """
    if data_dir is not None:
        made = _roll_back_as_user(data_dir.expanduser(), version, force=force)
        number, late = int(made.policy.version), tuple(made.unconfirmed)
    else:
        with connect(gateway) as client:
            applied = client.access.roll_back(version, force=force)
        number, late = applied.version, applied.unconfirmed
    _say(number, late, f": the document of version {version}")


@app.command()
def restore(
    data_dir: Annotated[Path, typer.Option(metavar="DIR", help="Data folder of a running node of yours.")],
    force: _Force = False,
) -> None:
    """Apply the copy of the last policy in a node's data folder again, after etcd has lost it. No key is needed.

    coord does so by itself when etcd has no policy.

    [bold]Example[/bold]

      shoal policy restore --data-dir ~/.local/share/shoal
    """
    from shoal.access.rpc_groups import APPLY_POLICY
    from shoal.coord.v1 import access_pb2 as pb
    from shoal.errors import FailedPrecondition
    from shoal.node.folder import POLICY_COPY

    path = data_dir.expanduser() / POLICY_COPY
    try:
        copy = json.loads(path.read_text())["applied"]
        version = int(copy["version"])
        request = pb.ApplyPolicyRequest(document=copy["document"], files=copy["files"] or {}, force=force)
    except (OSError, ValueError, LookupError, TypeError) as err:
        why = err.strerror if isinstance(err, OSError) else err
        raise FailedPrecondition(f"{path} is no copy of a policy ({why}): apply a document of your own") from err
    made = _called_as_user(data_dir.expanduser(), APPLY_POLICY, request, pb.ApplyPolicyResponse)
    _say(made.policy.version, made.unconfirmed, f": the copy of version {version}")


def _say(version: int, unconfirmed: Sequence[str], source: str = "") -> None:
    typer.echo(f"version {version} is in force{source}")
    if unconfirmed:
        typer.echo(f"not confirmed yet by {', '.join(unconfirmed)}", err=True)


def _roll_back_as_user(data_dir: Path, version: int, *, force: bool) -> Any:
    """Return the RollBackPolicyResponse. Raises ShoalError."""
    from shoal.access.rpc_groups import ROLL_BACK
    from shoal.coord.v1 import access_pb2 as pb

    request = pb.RollBackPolicyRequest(version=version, force=force)
    return _called_as_user(data_dir, ROLL_BACK, request, pb.RollBackPolicyResponse)


def _called_as_user(data_dir: Path, rpc: str, request: Any, response: Any) -> Any:
    import asyncio

    from shoal.node import folder
    from shoal.node.admin_key import call_as_launcher

    sockets = sorted(folder.running_in(data_dir).glob("coord-*.sock"))
    return asyncio.run(call_as_launcher(sockets, rpc, request, response))


@app.command()
def schema() -> None:
    """Print the JSON schema of a policy, for editors and other checkers.

    [bold]Example[/bold]

      shoal policy schema > policy.schema.json
    """
    from shoal.access import policy as policies

    typer.echo(json.dumps(policies.json_schema(), indent=2))
