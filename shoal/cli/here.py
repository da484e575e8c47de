"""The node of a command that reads what only the node's own machine has, such as its metrics and logs."""

from __future__ import annotations

import os

from shoal.discovery import RunningNode, find_gateway, find_node, node_of
from shoal.errors import InvalidArgument

ADMIN_OF_SERVE = "For `shoal serve --metrics-port N` add --admin 127.0.0.1:N."
"""What else to do, for commands with --admin."""


def node_here(gateway: str | None, what: str, otherwise: str) -> RunningNode:
    """Return the node that the command's gateway, or the context in use, names; else the one on this machine.

    Raises:
        InvalidArgument: it runs on another machine, where `what` is; `otherwise` says what else to do.
        NotFound, FailedPrecondition: none is named, and none or several run here.
    """
    node, url = node_or_url(gateway)
    if node is None:
        raise InvalidArgument(
            f"{url} is no node of this user on this machine, and {what} are on the node's own: run the command there. "
            f"{otherwise}"
        )
    return node


def node_or_url(gateway: str | None) -> tuple[RunningNode | None, str]:
    """Return the node of a command, and its gateway; None for a node that does not run here. Raises as `node_here`."""
    from shoal.cli.contexts import chosen

    context = chosen(gateway, os.environ)
    if context is None and not gateway and not os.environ.get("SHOAL_GATEWAY"):
        node = find_node(os.environ)
        return node, node.url
    url = context.url if context is not None else find_gateway(gateway, os.environ).url
    return node_of(url, os.environ), url
