"""The node of a command that reads what only the node's own machine has: its metrics, spans and logs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.cli.up import default_data_dir
from shoal.discovery import RunningNode, find_gateway, find_node, node_of, running_servers
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound

SERVE = "For `shoal serve`, start it with --metrics-port N, and add --admin 127.0.0.1:N where it is not found."
"""End of an error where no node is found: the metrics and spans of a server are at this address."""


def node_here(gateway: str | None, what: str, otherwise: str) -> RunningNode:
    """Return the node that the command's gateway, or the context in use, names; else the one on this machine.

    Raises:
        InvalidArgument: it runs on another machine, where `what` is; `otherwise` says what else to do.
        NotFound, FailedPrecondition: none is named, and none or several run here.
    """
    url = _named(gateway)
    if url is None:
        return find_node(os.environ)
    node = node_of(url, os.environ)
    if node is None:
        raise InvalidArgument(
            f"{url} is no node of this user on this machine, and {what} are on the node's own: run the command there. "
            f"{otherwise}"
        )
    return node


@contextmanager
def or_stopped(command: str) -> Iterator[None]:
    """Have the error of a node that is not found say how `shoal COMMAND` looks at one that has stopped."""
    try:
        yield
    except NotFound as err:
        folder = default_data_dir(os.environ.get("XDG_DATA_HOME"))
        raise NotFound(f"{err.message}. Of a node that has stopped: shoal {command} --data-dir {folder}") from None


def admin_here(gateway: str | None, what: str) -> str:
    """Return the admin address of the node as of `node_here`; without such a node, that of a `shoal serve`.

    Raises:
        InvalidArgument, NotFound, FailedPrecondition: as `node_here`, and several servers run here.
    """
    url = _named(gateway)
    try:
        return node_here(gateway, what, SERVE).admin
    except (InvalidArgument, NotFound) as err:
        servers = [server for server in running_servers(os.environ) if url in (None, server.gateway)]
        if len(servers) == 1:
            return servers[0].admin
        if servers:
            choices = ", ".join(f"{server.admin} (of {server.gateway})" for server in servers)
            raise FailedPrecondition(
                f"{len(servers)} servers are running on this machine: choose one with --admin: {choices}"
            ) from None
        if url is None:
            raise NotFound(f"{err.message}. {SERVE}") from None
        raise


def _named(gateway: str | None) -> str | None:
    """Return the URL that the command, a variable or the context in use names; None when none does."""
    from shoal.cli.contexts import chosen

    context = chosen(gateway, os.environ)
    if context is not None:
        return context.url
    return find_gateway(gateway, os.environ).url if gateway or os.environ.get("SHOAL_GATEWAY") else None
