"""Contexts: gateways by name, with the CA and the token for each, in a file that only the user can read.

    --gateway NAME or address  ->  $SHOAL_GATEWAY  ->  the context in use  ->  the node that runs on this machine

$XDG_CONFIG_HOME/shoal/contexts.json:   {"current": "prod", "contexts": {"prod": {"url": ..., "token_file": ...}}}
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mesh.process.files import write_atomically
from shoal.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from shoal.node.folder import locked

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")


@dataclass(frozen=True)
class Context:
    """One gateway, and how to call it."""

    url: str
    ca: str = ""
    """File of the trusted authorities."""
    token_file: str = ""
    """File of the token, read at each command."""
    token: str = field(default="", repr=False)
    """The token itself, where it was given on standard input."""

    def read_token(self) -> str:
        """Return the token; empty without one. Raises InvalidArgument, which never has the token."""
        return read_token(Path(self.token_file)) if self.token_file else self.token


@dataclass(frozen=True)
class Contexts:
    """All contexts of the user."""

    current: str = ""
    contexts: Mapping[str, Context] = field(default_factory=dict)

    def get(self, name: str) -> Context:
        """Return a context. Raises NotFound."""
        if name not in self.contexts:
            known = ", ".join(sorted(self.contexts)) or "none"
            raise NotFound(f"no context is called {name!r}: there are {known}; `shoal context add` makes one")
        return self.contexts[name]

    def adding(self, name: str, context: Context, *, may_replace: bool) -> Contexts:
        """Return the contexts with one more, which is in use when it is the first. Raises AlreadyExists."""
        if not _NAME.match(name):
            raise InvalidArgument(f"context {name!r}: letters, digits, '_', '.' and '-', at most 63")
        if name in self.contexts and not may_replace:
            raise AlreadyExists(f"a context is called {name!r} already: give --replace, or another name")
        return Contexts(self.current if self.contexts else name, {**self.contexts, name: context})

    def using(self, name: str) -> Contexts:
        """Return the contexts with `name` in use; empty: none. Raises NotFound."""
        if name:
            self.get(name)
        return replace(self, current=name)

    def removing(self, name: str) -> Contexts:
        """Return the contexts without `name`. Raises NotFound."""
        self.get(name)
        left = {key: value for key, value in self.contexts.items() if key != name}
        return Contexts("" if self.current == name else self.current, left)


def path(environ: Mapping[str, str]) -> Path:
    """Return the file of the contexts (XDG Base Directory Specification)."""
    configured = environ.get("XDG_CONFIG_HOME", "")
    home = Path(configured) if Path(configured).is_absolute() else Path("~/.config").expanduser()
    return home / "shoal" / "contexts.json"


def load(environ: Mapping[str, str]) -> Contexts:
    """Return the user's contexts; none when there is no file.

    Raises:
        FailedPrecondition: the file is damaged, or other users can read it.
    """
    file = path(environ)
    try:
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise FailedPrecondition(f"other users can read {file}, which may have tokens: chmod 600 {file}")
        document = json.loads(file.read_text())
        contexts = {str(name): Context(**fields) for name, fields in document["contexts"].items()}
        return Contexts(str(document["current"]), contexts)
    except FileNotFoundError:
        return Contexts()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        # The error of a JSON parser has no content of the file.
        reason = err.strerror if isinstance(err, OSError) else "it is damaged"
        raise FailedPrecondition(f"{file} cannot be read ({reason}): correct it, or remove it") from err


def change(changed: Callable[[Contexts], Contexts], environ: Mapping[str, str]) -> Contexts:
    """Replace the user's contexts by `changed` of them, and return those. Changes of several commands take turns.

    Raises:
        FailedPrecondition: as `load`.
        OSError: the file cannot be written.
    """
    folder = path(environ).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(folder):
        contexts = changed(load(environ))
        _save(contexts, environ)
    return contexts


def _save(contexts: Contexts, environ: Mapping[str, str]) -> None:
    """Write the user's contexts, readable by the user only. Raises OSError."""
    file = path(environ)
    known = {name: {k: v for k, v in asdict(context).items() if v} for name, context in contexts.contexts.items()}
    document = {"current": contexts.current, "contexts": known}
    write_atomically(file, json.dumps(document, indent=2) + "\n", is_private=True)


def chosen(gateway: str | None, environ: Mapping[str, str]) -> Context | None:
    """Return the context of a command; None where the command or the environment has an address, or no context is used.

    Raises:
        FailedPrecondition: the file of contexts cannot be used.
        InvalidArgument: the command names a context that is not there.
    """
    if gateway and not _NAME.match(gateway):
        return None
    if gateway:
        known = load(environ).contexts
        if gateway not in known:
            there = f"there are {', '.join(sorted(known))}" if known else "there are none"
            raise InvalidArgument(
                f"--gateway={gateway!r}: no context is called so ({there}), and an address has a port: HOST:PORT"
            )
        return known[gateway]
    if environ.get("SHOAL_GATEWAY"):
        return None
    contexts = load(environ)
    return contexts.contexts.get(contexts.current)


def check_token(token: str, source: str) -> None:
    """Raise InvalidArgument, without the token, when no header carries it."""
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise InvalidArgument(f"{source} has characters that no header carries: expected one token, without spaces")


def read_token(file: Path) -> str:
    """Return the token in a file.

    Raises:
        InvalidArgument: the file cannot be read, is empty, or other users can read it. The message never has the token.
    """
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        text = file.read_text().strip()
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is no text"
        raise InvalidArgument(f"the token file {file} cannot be read: {reason}") from None
    if mode & 0o077 and os.getuid() == file.stat().st_uid:
        raise InvalidArgument(f"other users can read the token file {file} (mode {mode:04o}): chmod 600 {file}")
    if not text:
        raise InvalidArgument(f"the token file {file} is empty")
    check_token(text, f"the token file {file}")
    return text
